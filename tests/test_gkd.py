"""GKD: which steps are on-policy, whose text it is, and what its mean is over."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from policies import Constant

from rarefy.errors import RarefyError
from rarefy.losses.forward_kl import ForwardKL
from rarefy.losses.jsd import JSD
from rarefy.losses.reverse_kl import ReverseKL
from rarefy.objectives.base import Step, Tally
from rarefy.objectives.distil import Distil
from rarefy.objectives.gkd import GKD
from rarefy.objectives.rows import Rows
from rarefy.signals.cached import Cached

PROMPTS = [torch.tensor([0, 1]), torch.tensor([2])]
STUDENT, TEACHER = (0.0, 1.0, -1.0, 0.3), (1.0, 0.0, 0.5, -0.2)


def step(length: int = 3, index: int = 0, seed: int = 0, student: Constant | None = None) -> Step:
    """Rows whose references have ``length`` tokens."""
    references = [torch.full((length,), 3), torch.full((length,), 1)]
    return Step(
        student or Constant(STUDENT),
        Constant(TEACHER),
        Rows.join(PROMPTS, references),
        torch.Generator().manual_seed(seed),
        index,
    )


def mean(tally: Tally) -> float:
    return float(tally.total.detach()) / tally.tokens


def written(on: Step) -> list[list[int]]:
    """The counted tokens of the rows that the teacher was last asked about."""
    assert isinstance(on.teacher, Constant)
    rows = on.teacher.seen[-1]
    return [ids[counted].tolist() for ids, counted in zip(rows.ids, rows.counted, strict=True)]


@pytest.mark.parametrize("loss", [JSD(0.1), ForwardKL(), ReverseKL()], ids=str)
def test_on_policy_the_references_do_not_matter(loss: JSD) -> None:
    objective = GKD(loss, share=1.0, tokens=5)
    short, long = step(3), step(30)
    a, b = objective.loss(short), objective.loss(long)
    assert written(short) == written(long)
    assert a.tokens == b.tokens == 10
    assert torch.equal(a.total, b.total)
    # The distributions are the same everywhere, so the mean over what was drawn is known.
    exact = loss.per_token(
        Constant(STUDENT).read(step(1).rows),
        Distil().signal.target(Constant(TEACHER), step(1).rows),
    )
    assert mean(a) == pytest.approx(float(exact[0].detach()), rel=1e-9)


def test_the_mean_is_over_the_tokens_that_were_drawn() -> None:
    """Rows that end early count for what they have."""
    student = Constant((0.0, 0.0, 0.0, 1.0))
    student.stop = (3,)
    on = step(7, student=student)
    tally = GKD(share=1.0, tokens=40).loss(on)
    texts = written(on)
    assert tally.tokens == sum(len(text) for text in texts) < 80
    assert all(text[-1] == 3 and 3 not in text[:-1] for text in texts)


def test_text_is_the_students_as_it_is_now() -> None:
    student = Constant((0.0, 0.0, 50.0, 0.0))
    on = step(student=student)
    GKD(share=1.0, tokens=4).loss(on)
    assert written(on) == [[2] * 4] * 2
    assert on.teacher is not None
    prompts = [p.tolist() for p in on.teacher.seen[-1].prompts()]
    assert prompts == [p.tolist() for p in PROMPTS]
    with torch.no_grad():
        student.table.copy_(torch.tensor([[50.0, 0.0, -50.0, 0.0]]))
    GKD(share=1.0, tokens=4).loss(on)
    assert written(on) == [[0] * 4] * 2


def test_off_policy_is_distillation_of_the_data() -> None:
    on = step()
    found = GKD(JSD(0.3), share=0.0, temperature=2.0).loss(on)
    assert written(on) == [[3] * 3, [1] * 3]
    expected = Distil(distance=JSD(0.3), temperature=2.0).loss(on)
    assert torch.equal(found.total, expected.total)
    assert found.parts["on-policy"] == 0


def test_share_of_the_steps() -> None:
    found = sum(step(index=i).coin(0.3) for i in range(1000))
    assert abs(found - 300) <= 45
    assert not any(step(index=i).coin(0.0) for i in range(200))
    assert all(step(index=i).coin(1.0) for i in range(200))


def test_micro_batches_of_a_step_are_of_one_kind() -> None:
    kinds = set()
    for index in range(12):
        tallies = [GKD(tokens=2).loss(step(3, index, seed)) for seed in (1, 2, 3)]
        fresh = {tally.parts["on-policy"] / tally.tokens for tally in tallies}
        assert len(fresh) == 1
        kinds |= fresh
    assert kinds == {0.0, 1.0}


def test_another_seed_tosses_another_coin() -> None:
    one, two = (
        [dataclasses.replace(step(index=i), seed=seed).coin(0.5) for i in range(64)]
        for seed in (0, 1)
    )
    assert one != two


def test_the_gradient_is_that_of_the_distance_on_fixed_text() -> None:
    """Nothing flows through the choice of tokens."""
    student = Constant(STUDENT)
    on = step(student=student)
    tally = GKD(ReverseKL(), share=1.0, tokens=6).loss(on)
    (tally.total / tally.tokens).backward()
    theta = torch.tensor([STUDENT], dtype=torch.float64, requires_grad=True)
    q, p = torch.log_softmax(theta, -1), torch.log_softmax(Constant(TEACHER).table, -1).detach()
    (q.exp() * (q - p)).sum().backward()
    torch.testing.assert_close(student.table.grad, theta.grad)


def test_plain_text_gives_its_first_tokens_as_prompts() -> None:
    on = dataclasses.replace(step(), rows=Rows.text(torch.arange(12).view(2, 6) % 4))
    GKD(share=1.0, tokens=3, prompt=4).loss(on)
    assert on.teacher is not None
    rows = on.teacher.seen[-1]
    assert rows.ids[:, :4].tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]
    assert rows.counted[:, :4].sum() == 0
    assert rows.tokens == 6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="use the signal 'teacher', or share: 0"):
        GKD(signal=Cached("folder"))
    assert GKD(ForwardKL(), share=0.0, signal=Cached("folder")).level == 3
    with pytest.raises(ValueError, match=r"share must lie in 0\.\.1"):
        GKD(share=1.5)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        GKD(tokens=0)
    with pytest.raises(RarefyError, match="needs logits or top-k"):
        GKD(JSD(), share=0.0, signal=Cached("folder", tail=False))
    with pytest.raises(RarefyError, match="the objective 'gkd' needs a teacher"):
        GKD().loss(dataclasses.replace(step(), teacher=None))
