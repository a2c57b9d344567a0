"""Rows and masks, models as policies, sampling, and objectives on given text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from policies import PROMPT, Constant, Table
from tiny import FAMILIES, tiny
from torch.nn import functional as F

from rarefy.errors import RarefyError
from rarefy.losses.forward_kl import ForwardKL
from rarefy.losses.hidden import HiddenCosine, HiddenMSE
from rarefy.losses.reverse_kl import ReverseKL
from rarefy.objectives.base import OBJECTIVES, Step, Tally, at_the_rate_of
from rarefy.objectives.cross_entropy import LanguageModelling
from rarefy.objectives.distil import Distil
from rarefy.objectives.policy import ModelPolicy
from rarefy.objectives.rows import Rows
from rarefy.objectives.sampling import Draw
from rarefy.signals.cached import Cached
from rarefy.signals.hidden import Hidden
from rarefy.signals.teacher import Teacher

if TYPE_CHECKING:
    from pathlib import Path

EOS = 257
every_family = pytest.mark.parametrize("family", FAMILIES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rows() -> Rows:
    g = generator(1)
    prompts = [torch.randint(0, 250, (n,), generator=g) for n in (3, 7, 5)]
    answers = [torch.randint(0, 250, (n,), generator=g) for n in (4, 2, 6)]
    answers[0][-1] = answers[1][-1] = EOS
    return Rows.join(prompts, answers, (EOS,))


def padded(rows: Rows, by: int) -> Rows:
    """The same rows with more padding, made of a token that exists."""
    extra = torch.zeros(len(rows.ids), by, dtype=torch.bool)
    return Rows(
        torch.cat([rows.ids, torch.full(extra.shape, 9)], 1),
        torch.cat([rows.counted, extra], 1),
        torch.cat([rows.valid, extra], 1),
    )


def pair() -> tuple[ModelPolicy, ModelPolicy]:
    """A student and another model as its teacher."""
    _, teacher = tiny("llama")
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(2)))
    return ModelPolicy(student), ModelPolicy(teacher)


def gradients(policy: ModelPolicy, total: torch.Tensor) -> torch.Tensor:
    policy.model.zero_grad()
    total.backward()
    found = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return torch.cat(found)


# Rows.


def test_the_first_end_of_text_counts_and_nothing_behind_it() -> None:
    prompt, answer = torch.tensor([5, EOS, 6]), torch.tensor([7, 8, EOS, 9, EOS])
    rows = Rows.join([prompt, prompt[:1]], [answer, answer[3:4]], (EOS,))
    assert rows.ids[0].tolist() == [5, EOS, 6, 7, 8, EOS]
    assert rows.counted[0].tolist() == [False, False, False, True, True, True]
    assert rows.valid[1].tolist() == [True, True, False, False, False, False]
    assert rows.labels.tolist() == [7, 8, EOS, 9]
    assert rows.tokens == 4
    assert rows.predicting.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 0]]


def test_plain_text_counts_all_but_the_first_token() -> None:
    rows = Rows.text(torch.arange(8).view(2, 4))
    assert rows.labels.tolist() == [1, 2, 3, 5, 6, 7]
    assert rows.valid.all()
    assert [p.tolist() for p in rows.prompts()] == [[0], [4]]
    assert [p.tolist() for p in rows.prompts(3)] == [[0, 1, 2], [4, 5, 6]]


def test_prompts_are_what_stands_before_the_counted_tokens() -> None:
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    answers = [torch.tensor([7]), torch.tensor([8, 9, 9]), torch.tensor([], dtype=torch.long)]
    found = Rows.join(prompts, answers).prompts()
    assert [p.tolist() for p in found] == [[1, 2, 3], [4], [5, 6]]


def test_spread_puts_values_back() -> None:
    rows = some_rows()
    assert torch.equal(rows.spread(rows.labels.double())[rows.counted].long(), rows.labels)
    assert (rows.spread(rows.labels + 1)[~rows.counted] == 0).all()


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 2)])
def test_refuses_to_count_what_nothing_predicts(row: int, column: int) -> None:
    rows = Rows.join([PROMPT] * 2, [torch.tensor([1, 2]), torch.tensor([1])])
    counted = rows.counted.clone()
    counted[row, column] = True
    with pytest.raises(RarefyError, match="count only tokens that follow another one"):
        Rows(rows.ids, counted, rows.valid)
    with pytest.raises(RarefyError, match="one shape"):
        Rows(rows.ids, counted[:, 1:], rows.valid)


# Models.


@every_family
def test_reading_is_the_models_own_forward(family: str) -> None:
    """Whatever a family does behind its head (scales, caps) is kept."""
    _, model = tiny(family)
    rows = some_rows()
    with torch.no_grad():
        out = model(input_ids=rows.ids, attention_mask=rows.valid.long(), output_hidden_states=True)
        reading = ModelPolicy(model).read(rows, (0, 1, -1))
        states = ModelPolicy(model).hidden(rows.ids, rows.valid)
        whole = ModelPolicy(model).logits(rows.ids, rows.valid)
    at = rows.predicting
    torch.testing.assert_close(reading.logits, out.logits[at], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, out.logits)
    for layer, state in zip((0, 1, -1), reading.states, strict=True):
        torch.testing.assert_close(state, out.hidden_states[layer][at])
        torch.testing.assert_close(states[layer], out.hidden_states[layer])


def test_the_head_runs_only_where_tokens_are_predicted() -> None:
    _, model = tiny("llama")
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[:2].numel()))
    rows = some_rows()
    ModelPolicy(model).read(rows)
    assert seen == [rows.tokens]
    ModelPolicy(model).logits(rows.ids, rows.valid)
    assert seen[1] == rows.ids.numel()


@every_family
def test_a_cache_and_padding_on_the_left_change_no_logits(family: str) -> None:
    _, model = tiny(family)
    policy, prompts = ModelPolicy(model), some_rows().prompts()
    with torch.no_grad():
        fast, slow = policy.decode(prompts), super(ModelPolicy, policy).decode(prompts)
        a, b = next(fast), next(slow)
        for _ in range(5):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            chosen = b.argmax(-1)
            a, b = fast.send(chosen), slow.send(chosen)


def test_fingerprints_tell_models_apart() -> None:
    student, teacher = pair()
    assert student.fingerprint != teacher.fingerprint
    assert ModelPolicy(copy.deepcopy(teacher.model)).fingerprint == teacher.fingerprint
    assert ModelPolicy(teacher.model, "given").fingerprint == "given"


def test_end_of_text_is_the_models_own() -> None:
    _, model = tiny("llama")
    assert ModelPolicy(model).stop == (EOS,)
    model.generation_config.eos_token_id = [3, 4]
    assert ModelPolicy(model).stop == (3, 4)


# Sampling.


def test_samples_follow_the_policys_own_distribution() -> None:
    policy = Table(3)
    drawn = policy.sample([PROMPT] * 20000, Draw(2), generator())
    first = torch.bincount(drawn.rows.ids[:, 1], minlength=4) / 20000
    assert 0.5 * (first - torch.softmax(policy.table[0], -1)).abs().sum() < 0.02
    after = drawn.rows.ids[drawn.rows.ids[:, 1] == 2][:, 2]
    second = torch.bincount(after, minlength=4) / len(after)
    assert 0.5 * (second - torch.softmax(policy.table[3], -1)).abs().sum() < 0.03


def test_generation_settings_of_a_model_do_not_matter() -> None:
    _, model = tiny("llama")
    prompts = some_rows().prompts()
    plain = ModelPolicy(model).sample(prompts, Draw(6), generator(3))
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0, do_sample=True)
    again = ModelPolicy(model).sample(prompts, Draw(6), generator(3))
    assert torch.equal(plain.rows.ids, again.rows.ids)
    other = ModelPolicy(model).sample(prompts, Draw(6), generator(4))
    assert not torch.equal(plain.rows.ids, other.rows.ids)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_recorded_log_probabilities_are_those_of_the_mixture(alpha: float) -> None:
    student, teacher = pair()
    how = Draw(8, temperature=1.5, alpha=alpha)
    drawn = student.sample(some_rows().prompts(), how, generator(), teacher)
    rows = drawn.rows
    with torch.no_grad():
        q, p = (torch.softmax(side.read(rows).logits / 1.5, -1) for side in (student, teacher))
    mixed = (alpha * p + (1 - alpha) * q).gather(1, rows.labels[:, None])[:, 0]
    torch.testing.assert_close(drawn.log_prob, mixed.log(), rtol=1e-3, atol=1e-3)
    assert rows.tokens <= 24


def test_a_row_ends_with_its_first_end_of_text() -> None:
    policy = Constant([0.0, 1.0, 0.5])
    policy.stop = (2,)
    drawn = policy.sample([PROMPT, torch.tensor([2, 1])] * 100, Draw(6), generator())
    lengths = drawn.rows.counted.sum(1)
    for ids, counted, valid in zip(
        drawn.rows.ids, drawn.rows.counted, drawn.rows.valid, strict=True
    ):
        answer = ids[counted].tolist()
        assert 2 not in answer[:-1]
        assert len(answer) == 6 or answer[-1] == 2
        assert not ids[~valid].any()
    assert len(drawn.log_prob) == int(lengths.sum())
    assert sorted(set(lengths.tolist())) == [1, 2, 3, 4, 5, 6]
    expected = torch.log_softmax(policy.table[0], -1)[drawn.rows.labels]
    torch.testing.assert_close(drawn.log_prob, expected.detach())


# Objectives on given text.


def test_registered() -> None:
    names = {card.name for card in OBJECTIVES}
    assert {"cross-entropy", "distil", "gkd", "minillm", "single-sample-rkl"} <= names
    assert not LanguageModelling().needs_teacher
    assert Distil().needs_teacher
    assert Distil().level == 3
    assert Distil(Hidden(), HiddenMSE()).level == 5
    assert not Distil(Cached("folder", read_only=True)).needs_teacher


def brute_force(policy: ModelPolicy, rows: Rows) -> list[torch.Tensor]:
    """Cross entropy of every counted token, each row alone and without padding."""
    found = []
    for ids, counted, valid in zip(rows.ids, rows.counted, rows.valid, strict=True):
        logits = policy.model(input_ids=ids[valid][None]).logits[0]
        for t in range(1, int(valid.sum())):
            if counted[t]:
                found.append(-torch.log_softmax(logits[t - 1], -1)[ids[t]])
    return found


def test_cross_entropy_is_the_mean_over_tokens_by_brute_force() -> None:
    student, _ = pair()
    rows = some_rows()
    tally = LanguageModelling().loss(Step(student, None, rows, generator()))
    expected = brute_force(student, rows)
    assert tally.tokens == len(expected) == 12
    torch.testing.assert_close(tally.total / tally.tokens, torch.stack(expected).mean())
    mine = gradients(student, tally.total / tally.tokens)
    theirs = gradients(student, torch.stack(brute_force(student, rows)).mean())
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    student, teacher = pair()
    rows = some_rows()
    parts = [Rows(*(x[i : i + 1] for x in (rows.ids, rows.counted, rows.valid))) for i in range(3)]

    def tally(part: Rows) -> Tally:
        return Distil(cross_entropy=0.3).loss(Step(student, teacher, part, generator()))

    whole, pieces = tally(rows), [tally(part) for part in parts]
    assert sum(piece.tokens for piece in pieces) == whole.tokens
    total = sum(float(piece.total.detach()) for piece in pieces)
    assert total == pytest.approx(float(whole.total.detach()), rel=1e-5)
    for name, value in whole.parts.items():
        assert sum(piece.parts[name] for piece in pieces) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        LanguageModelling(),
        Distil(),
        Distil(distance=ReverseKL(), temperature=2.0),
        Distil(Hidden("1:2"), HiddenCosine()),
    ],
    ids=str,
)
def test_padding_changes_nothing(objective: Distil) -> None:
    student, teacher = pair()
    plain = objective.loss(Step(student, teacher, some_rows(), generator()))
    wider = objective.loss(Step(student, teacher, padded(some_rows(), 5), generator()))
    assert wider.tokens == plain.tokens
    assert float(wider.total.detach()) == pytest.approx(float(plain.total.detach()), rel=1e-5)


def test_terms_of_distillation_are_weighed_as_declared() -> None:
    student, teacher = pair()
    rows = some_rows()
    objective = Distil(Hidden("1:1,-1:-1"), ForwardKL(), 2.0, 0.25, 3.0)
    tally = objective.loss(Step(student, teacher, rows, generator()))
    with torch.no_grad():
        q, p = student.read(rows, (1, -1)), teacher.read(rows, (1, -1))
    kl = 4 * F.kl_div(
        torch.log_softmax(q.logits / 2, -1), torch.softmax(p.logits / 2, -1), reduction="sum"
    )
    plain = F.cross_entropy(q.logits, rows.labels, reduction="sum")
    apart = [
        ((s - t).square().mean(-1) / t.square().mean(-1)).sum()
        for s, t in zip(q.states, p.states, strict=True)
    ]
    expected = kl + 0.25 * plain + 3 * sum(apart) / 2
    torch.testing.assert_close(tally.total.detach(), expected, rtol=1e-4, atol=1e-4)
    assert tally.parts["distance"] == pytest.approx(float(kl), rel=1e-4)
    assert tally.parts["cross-entropy"] == pytest.approx(float(plain), rel=1e-4)
    assert tally.parts["hidden"] == pytest.approx(float(sum(apart)) / 2, rel=1e-4)


@pytest.mark.parametrize("distance", [ForwardKL(), ReverseKL()], ids=str)
def test_an_uncompressed_copy_has_nothing_to_learn(distance: ForwardKL) -> None:
    _, teacher = pair()
    student, rows = ModelPolicy(copy.deepcopy(teacher.model)), some_rows()
    step = Step(student, teacher, rows, generator())
    tally = Distil(distance=distance).loss(step)
    assert abs(float(tally.total.detach())) / tally.tokens < 1e-6
    assert gradients(student, tally.total / tally.tokens).norm() < 1e-5
    plain = LanguageModelling().loss(step)
    assert gradients(student, plain.total / plain.tokens).norm() > 0.1


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = pair()
    step = Step(student, teacher, some_rows(), generator())
    Distil(Hidden(), hidden=1.0).loss(step).total.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert any(p.grad is not None for p in student.model.parameters())


def test_a_few_steps_of_distillation_approach_the_teacher() -> None:
    student, teacher = pair()
    g = generator(5)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=2e-3)

    def text() -> Rows:
        return Rows.text(torch.randint(0, 250, (8, 24), generator=g))

    def distance(batch: Rows) -> torch.Tensor:
        tally = Distil().loss(Step(student, teacher, batch, generator()))
        return tally.total / tally.tokens

    held_out = text()
    before = float(distance(held_out).detach())
    for _ in range(40):
        optimizer.zero_grad()
        distance(text()).backward()
        optimizer.step()
    assert float(distance(held_out).detach()) < 0.7 * before


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_distributions_train_like_fresh_ones(tmp_path: Path, temperature: float) -> None:
    student, teacher = pair()
    rows = some_rows()
    found = []
    for signal in (Teacher(), Cached(str(tmp_path), 320)):
        objective = Distil(signal, temperature=temperature)
        tally = objective.loss(Step(student, teacher, rows, generator()))
        found.append(gradients(student, tally.total))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_refusals() -> None:
    student, _ = pair()
    with pytest.raises(RarefyError, match="there is none; name a teacher"):
        Distil().loss(Step(student, None, some_rows(), generator()))
    with pytest.raises(RarefyError, match="the loss 'hidden-mse' needs states"):
        Distil(distance=HiddenMSE())
    with pytest.raises(RarefyError, match="the loss 'hidden-mse' needs states"):
        Distil(hidden=0.5)
    with pytest.raises(RarefyError, match="the loss 'reverse-kl' needs logits or top-k"):
        Distil(Cached("folder", tail=False), ReverseKL())
    for options in ({"temperature": 0.0}, {"cross_entropy": -1.0}, {"hidden": -1.0}):
        with pytest.raises(ValueError, match="must"):
            Distil(**options)


def test_a_second_branch_counts_by_its_own_mean() -> None:
    """60 tokens of one branch must not drown 2 of the other."""
    first, second = torch.tensor(10.0), torch.tensor(300.0)
    total = first + at_the_rate_of(2, second, 60)
    assert float(total / 2) == 10 / 2 + 300 / 60
    assert float(at_the_rate_of(2, torch.tensor(0.0), 0)) == 0
