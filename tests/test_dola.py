"""DoLa against a plain reference: probabilities in float64, one position and token at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import FAMILIES, tiny, tiny_tokenizer

from rarefy.errors import RarefyError
from rarefy.evaluate.dola import buckets, candidates, contrast, contrast_logits, divergence

DEPTH = 6
MAIN = ("llama", "gpt2", "qwen2")
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


def deep(family, **overrides):
    if family == "gemma2":
        overrides["final_logit_softcapping"] = None
    _, model = tiny(family, num_hidden_layers=DEPTH, **overrides)
    return model


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd(p, q):
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def reference(model, ids, layers, alpha, normed=False):
    """Scores [B, L, V] by the paper's formulas, and the chosen layers in order of position."""
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        norm = model.model.norm if normed else torch.nn.Identity()
        head = model.get_output_embeddings()
        early = [head(norm(hidden[j])).double().softmax(-1) for j in layers]
        last = head(hidden[-1]).double().softmax(-1)
    scores, chosen = torch.full_like(last, -math.inf), []
    for b in range(ids.shape[0]):
        for at in range(ids.shape[1]):
            q = last[b, at].tolist()
            each = [p[b, at].tolist() for p in early]
            best = max(range(len(layers)), key=lambda j, each=each, q=q: jsd(q, each[j]))
            chosen.append(layers[best])
            ratio = {
                v: x / each[best][v] for v, x in enumerate(q) if x >= alpha * max(q)
            }  # fmt: skip
            total = sum(ratio.values())
            for v, x in ratio.items():
                scores[b, at, v] = math.log(x / total)
    return scores, chosen


def same(found, expected):
    """Equal where finite, and minus infinity at the same places."""
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)


def run(model, ids=IDS, **setting):
    with torch.no_grad(), contrast(model, **{"outside": -math.inf, **setting}) as found:
        return model(input_ids=ids).logits, found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family_follow_the_paper(family):
    model = deep(family)
    scores, found = run(model, layers=[2, 3, 5])
    expected, chosen = reference(model, IDS, [2, 3, 5], 0.1)
    same(scores, expected)
    assert found.chosen == {j: chosen.count(j) for j in set(chosen)}
    assert 0.02 < torch.isfinite(scores).float().mean() < 0.98


def test_layer_0_is_the_embedding_and_no_layer_always_wins():
    model = deep("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(2)
    scores, found = run(model, layers=range(DEPTH), alpha=0.3)
    expected, chosen = reference(model, IDS, list(range(DEPTH)), 0.3)
    same(scores, expected)
    assert len(set(chosen)) > 1
    assert found.chosen == {j: chosen.count(j) for j in set(chosen)}
    assert found.chosen.total() == IDS.numel()


def test_normed_applies_the_final_norm_to_premature_states():
    model = deep("llama")
    scores, _ = run(model, layers=[2, 4], normed=True)
    same(scores, reference(model, IDS, [2, 4], 0.1, normed=True)[0])
    assert not torch.equal(scores, run(model, layers=[2, 4])[0])


def test_divergence_is_the_textbook_one():
    p, q = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    expected = [jsd(a.exp().tolist(), b.exp().tolist()) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(divergence(p, q), torch.tensor(expected))
    torch.testing.assert_close(divergence(p, q), divergence(q, p))
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).clamp_min(1e-30).log()
    assert divergence(*apart).item() == pytest.approx(math.log(2))


def test_alpha_1_leaves_the_mature_greedy_token_alone():
    model = deep("llama")
    scores, _ = run(model, layers="high", alpha=1)
    with torch.no_grad():
        best = model(input_ids=IDS).logits.argmax(-1)
    assert torch.equal(scores.argmax(-1), best)
    assert torch.isfinite(scores).sum() == IDS.numel()


@pytest.mark.parametrize("alpha", [0, 1e-12])
def test_alpha_towards_0_contrasts_the_whole_vocabulary(alpha):
    model = deep("llama")
    scores, _ = run(model, layers=[3], alpha=alpha)
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
        last, early = (model.lm_head(hidden[j]).log_softmax(-1) for j in (-1, 3))
    torch.testing.assert_close(scores, (last - early).log_softmax(-1), atol=1e-5, rtol=1e-4)


def test_scores_are_log_probabilities_of_the_plausible_tokens():
    scores, _ = run(deep("qwen2"), outside=-1000.0)
    plausible = scores > -1000
    assert 0 < plausible.sum() < plausible.numel()
    total = scores.exp().where(plausible, 0).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert torch.equal(scores[~plausible], torch.full_like(scores[~plausible], -1000))


def test_static_equals_one_candidate_and_differs_from_another():
    model = deep("gpt2")
    scores, found = run(model, static=4)
    assert torch.equal(scores, run(model, layers=[4])[0])
    assert not torch.equal(scores, run(model, static=2)[0])
    assert found.layers == (4,)
    assert found.chosen == {4: IDS.numel()}


@pytest.mark.parametrize("family", MAIN)
def test_positions_picked_between_decoder_and_head_are_matched(family):
    model = deep(family)
    whole, _ = run(model, layers=[2, 4])
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([3, 8, 0])
    with torch.no_grad(), contrast(model, [2, 4], outside=-math.inf) as found:
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        picked = model.get_output_embeddings()(hidden[rows, columns])
        kept = model(input_ids=IDS, logits_to_keep=2).logits
    torch.testing.assert_close(picked, whole[rows, columns], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kept, whole[:, -2:], atol=1e-5, rtol=1e-4)
    assert found.chosen.total() == 3 + 4


def test_many_positions_go_through_the_head_in_pieces():
    model = deep("llama")
    ids = torch.randint(0, 256, (3, 70), generator=torch.Generator().manual_seed(2))
    scores, found = run(model, ids, layers="high")
    assert found.chosen.total() == 210
    torch.testing.assert_close(scores[2:], run(model, ids[2:], layers="high")[0])


@pytest.mark.parametrize("family", MAIN)
def test_generation_with_and_without_a_cache_is_the_contrasted_greedy_one(family):
    model = deep(family)
    setting = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    plain = model.generate(IDS, **setting)
    with contrast(model, "high") as found:
        cached = model.generate(IDS, use_cache=True, **setting)
        assert found.chosen.total() == 20
        assert torch.equal(model.generate(IDS, use_cache=False, **setting), cached)
    ids = IDS
    for _ in range(10):
        best = reference(model, ids, found.layers, 0.1)[0][:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    assert torch.equal(cached, ids)
    assert not torch.equal(cached, plain)


def test_repetition_penalty_acts_on_the_contrasted_scores():
    model = deep("llama")
    setting = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = IDS[:1]
    with contrast(model, "high"), torch.no_grad():
        free = model.generate(ids, **setting)
        penalised = model.generate(ids, repetition_penalty=1.8, **setting)
        for _ in range(12):
            scores = model(input_ids=ids).logits[0, -1]
            seen = ids[0].unique()
            scores[seen] *= 1.8  # log-probabilities are negative
            ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    assert torch.equal(penalised, ids)
    assert not torch.equal(penalised, free)


@pytest.mark.parametrize("family", MAIN)
def test_afterwards_the_model_is_as_before_even_after_an_error(family):
    model = deep(family)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        run(model)
        after = model(input_ids=IDS).logits
        with pytest.raises(ZeroDivisionError), contrast(model):
            model(input_ids=IDS)
            raise ZeroDivisionError
        last = model(input_ids=IDS).logits
    assert torch.equal(before, after)
    assert torch.equal(before, last)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_forward_that_someone_else_replaced_is_put_back():
    model = deep("llama")
    plain = model.lm_head.forward

    def theirs(hidden):
        return plain(hidden)

    model.lm_head.forward = theirs
    run(model)
    assert model.lm_head.forward is theirs


def test_layers_by_name():
    assert [(b.start, b.stop) for b in buckets(32)] == [(0, 16), (16, 32)]
    assert [b.start for b in buckets(40)] == [0, 20]
    assert [b.start for b in buckets(60)] == [0, 20, 40]
    assert [b.start for b in buckets(80)] == [0, 20, 40, 60]
    assert candidates(32, "low") == tuple(range(0, 16, 2))
    assert candidates(32, "high") == tuple(range(16, 32, 2))
    assert candidates(30, "low", tied=True) == tuple(range(2, 15, 2))
    assert candidates(30, "high", tied=True) == tuple(range(16, 30, 2))
    assert candidates(2, "high") == (1,)
    assert candidates(8, [5, 0, 2, 5], tied=True) == (2, 5)
    for depth in range(4, 100):
        low, high = candidates(depth, "low", tied=True), candidates(depth, "high", tied=True)
        assert 0 < low[0] <= low[-1] < high[0] <= high[-1] < depth


def test_contrast_divides_out_the_premature_prediction_that_differs_most():
    mature = torch.tensor([0.6, 0.3, 0.1])
    near, far = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.1, 0.8])
    scores, chosen = contrast_logits(torch.stack([mature, near, far])[None].log(), 0.4, -9.0)
    assert chosen.tolist() == [1]
    torch.testing.assert_close(scores.exp()[0, :2], torch.tensor([6.0, 3.0]) / 9)
    assert scores[0, 2] == -9


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"layers": "middle"}, "middle"),
        ({"layers": [2, 6]}, "from 0 to 5"),
        ({"layers": [-1]}, "from 0 to 5"),
        ({"layers": []}, "from 0 to 5"),
        ({"static": 6}, r"\[6\]"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_bad_settings_are_refused(setting, words):
    with pytest.raises(RarefyError, match=words), contrast(deep("llama"), **setting):
        pass


def test_models_that_it_cannot_serve_are_refused():
    with pytest.raises(RarefyError, match="tied embedding"), contrast(deep("qwen2"), static=0):
        pass
    _, capped = tiny("gemma2", final_logit_softcapping=30.0)
    with pytest.raises(RarefyError, match="final_logit_softcapping"), contrast(capped):
        pass
    model = deep("llama")
    model.config.model_type = "never-heard-of"
    with pytest.raises(RarefyError, match="never-heard-of"), contrast(model):
        pass


def test_states_from_outside_the_context_are_refused():
    model = deep("llama")
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        with contrast(model), pytest.raises(RarefyError, match="same context"):
            model.lm_head(hidden)
        with contrast(model), contrast(model), pytest.raises(RarefyError, match="one context"):
            model(input_ids=IDS)


def test_a_decoder_that_returns_a_tuple_is_served():
    model = deep("llama")
    whole, _ = run(model, layers=[2, 4])
    with torch.no_grad(), contrast(model, [2, 4], outside=-math.inf):
        hidden = model.base_model(input_ids=IDS, return_dict=False)[0]
        torch.testing.assert_close(model.lm_head(hidden), whole)


def test_the_harness_ranks_options_and_writes_answers_by_contrasted_scores(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from rarefy.evaluate import harness, tree
    from rarefy.tasks.local import local_task

    extra = []
    for name, row in {
        "options": {
            "question": "Where?",
            "choices": ["to the sea", "up", "on the moon"],
            "answer": 0,
        },
        "written": {"question": "Where?", "answers": ["up"]},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        extra.append(local_task(tmp_path / f"{name}.jsonl"))
    model, tokenizer = deep("llama"), tiny_tokenizer()

    def ask(name):
        wanted = dict.fromkeys([info.name for info, _ in extra])
        return harness.score(model, tokenizer, wanted, tmp_path / name, extra=extra, identity=name)

    plain = ask("plain")
    with contrast(model, "high") as found:
        trees = ask("trees")
        assert found.chosen.total() > 0
        monkeypatch.setattr(tree, "objection", lambda model: "a test")
        rows = ask("rows")
    assert trees[0].logprobs == pytest.approx(rows[0].logprobs, rel=1e-4)
    assert trees[0].logprobs != pytest.approx(plain[0].logprobs, rel=1e-2)
    assert trees[1].output == rows[1].output != plain[1].output
