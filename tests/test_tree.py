"""Many continuations in one row give the numbers of separate rows."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny

from rarefy.evaluate import tree

PAIRS = [
    ([5, 6, 7, 8, 9], [1]),
    ([5, 6, 7, 8, 9], [2, 3, 4]),
    ([40], [41, 42]),
    ([5, 6, 7, 8, 9], [2, 3]),
    ([5, 6, 7, 8, 9], [1]),
    ([5, 6, 7], [8, 9, 1, 1]),
]


@torch.no_grad()
def separately(model, pairs):
    answers = []
    for context, continuation in pairs:
        ids = torch.tensor([[*context, *continuation]])
        logprobs = model(ids).logits[0].log_softmax(-1)[len(context) - 1 : -1]
        target = ids[0, len(context) :]
        total = logprobs.gather(1, target[:, None]).sum()
        answers.append((total.item(), bool((logprobs.argmax(-1) == target).all())))
    return answers


def in_trees(model, pairs, limit):
    answers = {}
    for batch in tree.batches_of(tree.rows_of(pairs, limit), limit):
        answers |= tree.score_batch(model, batch)
    return [answers[i] for i in range(len(pairs))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [1, 12, 1000])
def test_trees_equal_separate_rows(family, limit):
    _, model = tiny(family)
    expected = separately(model, PAIRS)
    found = in_trees(model, PAIRS, limit)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_objection_to_families_that_take_trees(family):
    assert tree.objection(tiny(family)[1]) is None


def test_greedy_continuations_are_seen():
    _, model = tiny("llama")
    context = [5, 6, 7]
    for _ in range(3):
        context.append(int(model(torch.tensor([context])).logits[0, -1].argmax()))
    pairs = [(context[:3], context[3:]), (context[:3], [*context[3:5], 1])]
    assert [greedy for _, greedy in in_trees(model, pairs, 100)] == [True, False]


def test_logits_are_made_only_where_needed():
    _, model = tiny("llama")
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(tuple(out.shape[:2]))
    )
    in_trees(model, [(range(50), [1]), (range(50), [2, 3]), (range(50), [4])], 1000)
    assert seen == [(1, 2)]


def test_rows_share_contexts_up_to_the_limit():
    rows = tree.rows_of(PAIRS, 1000)
    assert [row.indices for row in rows] == [[0, 1, 3, 4], [2], [5]]
    assert [(row.length, row.kept) for row in rows] == [(8, 4), (2, 2), (6, 4)]
    assert [row.indices for row in tree.rows_of(PAIRS, 7)] == [[0, 1], [2], [3, 4], [5]]


def test_batches_respect_the_limit_and_lose_nothing():
    rows = tree.rows_of([(range(n), [1] * (n % 4 + 1)) for n in range(1, 40)], 64)
    batches = list(tree.batches_of(rows, 64))
    assert sorted(row.length for batch in batches for row in batch) == sorted(
        row.length for row in rows
    )
    for batch in batches:
        assert len(batch) * max(row.length for row in batch) <= 64


def test_a_model_that_ignores_the_mask_is_refused():
    _, model = tiny("llama")
    forward = model.forward
    model.forward = lambda **kwargs: forward(**{**kwargs, "attention_mask": None})
    assert "other numbers" in tree.objection(model)


def test_a_model_that_fails_on_the_mask_is_refused():
    _, model = tiny("llama")

    def forward(input_ids=None, use_cache=None):
        raise AssertionError("not reached")

    model.forward = forward
    assert "TypeError" in tree.objection(model)


def test_a_head_changed_for_a_while_is_obeyed():
    _, model = tiny("llama")
    plain = in_trees(model, PAIRS, 100)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: out.roll(1, -1) * 2)
    scores = [score for score, _ in in_trees(model, PAIRS, 100)]
    assert scores == pytest.approx([score for score, _ in separately(model, PAIRS)], abs=1e-4)
    handle.remove()
    assert in_trees(model, PAIRS, 100) == plain


@pytest.mark.parametrize(
    ("family", "size"), [("llama", None), ("mistral", 16), ("gemma3_text", 16), ("qwen2", None)]
)
def test_the_window_of_sight(family, size):
    assert tree.window(tiny(family)[1]) == size


def test_rounded_inputs_may_differ_by_a_step_and_no_more(monkeypatch):
    _, model = tiny("llama")
    monkeypatch.setattr(tree, "TOLERANCE", -1.0)
    assert tree.objection(model) == "the model gives other numbers in trees"
    model.model.layers[0].rounding = object()
    assert tree.objection(model) is None
    monkeypatch.setattr(tree, "_ROUNDED", -1.0)
    assert tree.objection(model) == "the model gives other numbers in trees"
