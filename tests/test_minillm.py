"""MiniLLM against enumeration: every text of a tiny vocabulary, weighed by its probability."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from policies import PROMPT, Constant, Table, every_text
from test_objectives import padded, pair, some_rows

from rarefy.objectives.base import Step
from rarefy.objectives.minillm import MiniLLM
from rarefy.objectives.returns import Returns, prefix_products, returns
from rarefy.objectives.rows import Rows
from rarefy.objectives.sampling import Draw, Sample
from rarefy.objectives.single_sample import SingleSampleRKL
from rarefy.teachers.base import TeacherCapabilityError

EXACT = MiniLLM(clip=None, normalise=False, product=True, plain_text=0.0)
endings = pytest.mark.parametrize("stop", [(), (3,)], ids=["fixed length", "end of text"])
mixtures = pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5])


def models(stop: tuple[int, ...] = ()) -> tuple[Table, Table]:
    student, teacher = Table(0), Table(1)
    student.stop = stop
    return student, teacher


def token_log_prob(policy: Table, rows: Rows) -> torch.Tensor:
    """Of each counted token, with a gradient, by torch's own softmax."""
    logits = torch.log_softmax(policy.logits(rows.ids, rows.valid)[rows.predicting], -1)
    return logits.gather(1, rows.labels[:, None])[:, 0]


def per_text(rows: Rows, values: torch.Tensor) -> torch.Tensor:
    return rows.spread(values).sum(1)


def exact_gradient(student: Table, teacher: Table, rows: Rows) -> torch.Tensor:
    """Of KL(Q || P) between whole texts, all of which are in ``rows``."""
    log_q = per_text(rows, token_log_prob(student, rows))
    log_p = per_text(rows, token_log_prob(teacher, rows)).detach()
    assert float(log_q.exp().sum()) == pytest.approx(1)
    (found,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student.table)
    return found


def every_draw(student: Table, teacher: Table, rows: Rows, alpha: float) -> tuple[Sample, Any]:
    """All texts as if drawn, and the probability of each under the mixture."""
    with torch.no_grad():
        q, p = token_log_prob(student, rows), token_log_prob(teacher, rows)
        mixed = (alpha * p.exp() + (1 - alpha) * q.exp()).log()
        return Sample(rows, mixed), per_text(rows, mixed).exp()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def expected_gradient(
    objective: MiniLLM, alpha: float, stop: tuple[int, ...] = (), *, long: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean gradient of the estimator over all draws, and the exact gradient."""
    student, teacher = models(stop)
    rows = every_text(4, 3, stop)
    drawn, chance = every_draw(student, teacher, rows, alpha)
    single, behind = objective.policy_terms(student, teacher, drawn)
    terms = single + behind if long else single
    (found,) = torch.autograd.grad((chance * per_text(rows, terms)).sum(), student.table)
    return found, exact_gradient(student, teacher, rows)


@endings
@mixtures
def test_the_estimators_mean_is_the_exact_gradient(alpha: float, stop: tuple[int, ...]) -> None:
    found, exact = expected_gradient(EXACT, alpha, stop)
    assert error(found, exact) < 1e-6


@endings
@mixtures
def test_the_single_step_term_alone_is_not(alpha: float, stop: tuple[int, ...]) -> None:
    found, exact = expected_gradient(EXACT, alpha, stop, long=False)
    assert error(found, exact) > 0.1


def test_what_each_shortcut_costs() -> None:
    """Weights of one token, normalised returns and a reward counted twice are biased."""
    for changed in ({"product": False}, {"normalise": True}, {"lmops": True}):
        found, exact = expected_gradient(dataclasses.replace(EXACT, **changed), 0.2)
        assert error(found, exact) > 0.02, changed
    found, exact = expected_gradient(dataclasses.replace(EXACT, product=False), 0.0)
    assert error(found, exact) < 1e-6


def test_single_sample_is_exact_too_without_normalisation() -> None:
    """Through the objective itself, one text at a time."""
    student, teacher = models()
    rows = every_text(4, 3)
    drawn, chance = every_draw(student, teacher, rows, 0.0)
    student.sample = lambda *_: drawn  # type: ignore[method-assign]
    log_q = token_log_prob(student, rows)
    step = Step(student, teacher, rows, torch.Generator())
    reward = (token_log_prob(teacher, rows) - log_q).detach()
    R = returns(rows, reward, torch.ones_like(reward), Returns(normalise=False, own=True))
    (expected,) = torch.autograd.grad((chance * per_text(rows, -log_q * R)).sum(), student.table)
    assert error(expected, exact_gradient(student, teacher, rows)) < 1e-6
    # The objective sums over texts without weighing them by their probability.
    (found,) = torch.autograd.grad(SingleSampleRKL(normalise=False).loss(step).total, student.table)
    (plain,) = torch.autograd.grad(
        per_text(rows, -token_log_prob(student, rows) * R).sum(), student.table
    )
    torch.testing.assert_close(found, plain)
    assert SingleSampleRKL().level == 2


def test_drawn_text_approaches_the_exact_gradient() -> None:
    """The whole path: drawing, recording, terms, total."""
    student, teacher = models()
    n = 8000
    step = Step(
        student,
        teacher,
        Rows.join([PROMPT] * n, [torch.tensor([1])] * n),
        torch.Generator().manual_seed(0),
    )
    objective = dataclasses.replace(EXACT, tokens=3)
    tally = objective.loss(step)
    assert tally.tokens == 3 * n
    (found,) = torch.autograd.grad(tally.total / n, student.table)
    assert error(found, exact_gradient(student, teacher, every_text(4, 3))) < 0.15


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_importance_weights(alpha: float) -> None:
    student, teacher = models()
    drawn = student.sample(
        [PROMPT] * 7000, Draw(3, alpha=alpha), torch.Generator().manual_seed(0), teacher
    )
    weights = (student.score(drawn.rows) - drawn.log_prob).exp()
    assert len(weights) == 21000
    assert weights.min() > 0
    assert weights.max() <= 1 / (1 - alpha) + 1e-12
    assert weights.max() > 1 + 0.5 * alpha
    sigma = float(weights.std()) / len(weights) ** 0.5
    assert abs(float(weights.mean()) - 1) < 3 * sigma


def test_draws_follow_the_mixture() -> None:
    student, teacher = models()
    drawn = student.sample(
        [PROMPT] * 20000, Draw(1, alpha=0.2), torch.Generator().manual_seed(0), teacher
    )
    found = torch.bincount(drawn.rows.labels, minlength=4) / 20000
    q, p = (torch.softmax(side.table[0], -1).detach() for side in (student, teacher))
    assert 0.5 * (found - (0.2 * p + 0.8 * q)).abs().sum() < 0.02
    assert 0.5 * (found - q).abs().sum() > 0.02


def lengths(*sizes: int) -> Rows:
    return Rows.join([PROMPT] * len(sizes), [torch.ones(n, dtype=torch.long) for n in sizes])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("own", [False, True])
def test_a_constant_reward_is_worth_the_same_in_a_text_of_any_length(
    gamma: float, own: bool
) -> None:
    rows = lengths(2, 5, 11)
    reward = torch.full((rows.tokens,), 0.7, dtype=torch.float64)
    R = returns(rows, reward, torch.ones_like(reward), Returns(gamma, own=own))
    last = torch.tensor([n == t + 1 for n in (2, 5, 11) for t in range(n)])
    torch.testing.assert_close(R[~last], torch.full_like(R[~last], 0.7))
    torch.testing.assert_close(R[last], torch.full_like(R[last], 0.7 if own else 0.0))
    raw = returns(rows, reward, torch.ones_like(reward), Returns(1.0, normalise=False))
    assert raw[:1].item() == pytest.approx(0.7)
    assert raw[7].item() == pytest.approx(7.0)


def test_returns_by_hand() -> None:
    rows = lengths(3, 1)
    reward = torch.tensor([1.0, 2.0, 4.0, 8.0])
    weight = torch.tensor([0.5, 2.0, 3.0, 5.0])
    R = returns(rows, reward, weight, Returns(0.5, normalise=False))
    # 2 (2 + 0.5 * 3 * 4), then 3 * 4, then nothing; the second row has one token.
    torch.testing.assert_close(R, torch.tensor([16.0, 12.0, 0.0, 0.0]))
    R = returns(rows, reward, torch.ones(4), Returns(0.5))
    torch.testing.assert_close(R, torch.tensor([4 / 1.5, 4.0, 0.0, 0.0]))
    torch.testing.assert_close(prefix_products(rows, weight), torch.tensor([1.0, 0.5, 1.0, 1.0]))


def long_term(objective: MiniLLM, ratio: float, reward: float) -> tuple[float, float]:
    """L_long of the first of two tokens, and its slope, where rho and R are as given.

    The student is uniform over two tokens; the second token's reward is R of the first one.
    """
    student = Constant((0.0, 0.0))
    teacher = Table(0, 2, 2)
    with torch.no_grad():
        share = 0.5 * torch.tensor(reward).exp()
        teacher.table[:] = torch.stack([share, 1 - share]).log().double()
    rows = Rows.join([PROMPT], [torch.tensor([0, 0])])
    drawn = Sample(rows, torch.log(torch.full((2,), 0.5 / ratio, dtype=torch.float64)))
    _, terms = objective.policy_terms(student, teacher, drawn)
    (slope,) = torch.autograd.grad(terms[0], student.table)
    return float(terms[0].detach()), float(slope[0, 0])


@pytest.mark.parametrize(
    ("ratio", "reward", "clipped"),
    [
        (1.25, 0.5, True),
        (1.1, 0.5, False),
        (0.7, 0.5, False),
        (0.7, -0.5, True),
        (1.25, -0.5, False),
    ],
)
def test_clipping_is_pessimistic(ratio: float, reward: float, clipped: bool) -> None:
    objective = MiniLLM(plain_text=0.0)
    bound = min(max(ratio, 0.8), 1.2)
    value, slope = long_term(objective, ratio, reward)
    assert value == pytest.approx(-(bound if clipped else ratio) * reward, rel=1e-6)
    # d rho / dz = rho (1 - q) at a uniform student of two tokens.
    assert slope == pytest.approx(0.0 if clipped else -ratio * reward * 0.5, rel=1e-6)
    free = long_term(dataclasses.replace(objective, clip=None), ratio, reward)
    assert free[0] == pytest.approx(-ratio * reward, rel=1e-6)


@pytest.mark.parametrize("lmops", [False, True])
def test_padding_changes_nothing(lmops: bool) -> None:
    student, teacher = pair()
    drawn = student.sample(
        some_rows().prompts(), Draw(6, alpha=0.2), torch.Generator().manual_seed(0), teacher
    )
    found = []
    objective = MiniLLM(lmops=lmops)
    for by in (0, 7):
        step = Step(student, teacher, padded(some_rows(), by), torch.Generator())
        wide = Sample(padded(drawn.rows, by), drawn.log_prob)
        tally = objective.surrogate(step, wide)
        found.append(float(tally.total.detach()) / tally.tokens)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert abs(found[0]) > 0.1


def test_whitened_returns_of_the_authors_code() -> None:
    """At rho = 1 the long-term terms are the whitened returns: mean 0, deviation 1."""
    student, teacher = models()
    rows = every_text(4, 3)
    drawn, _ = every_draw(student, teacher, rows, 0.0)
    _, long = MiniLLM(gamma=0.95, lmops=True).policy_terms(student, teacher, drawn)
    assert float(long.detach().mean()) == pytest.approx(0, abs=1e-9)
    assert float(long.detach().std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_plain_text_counts_by_its_own_mean() -> None:
    student, teacher = models()
    drawn, _ = every_draw(student, teacher, every_text(4, 3), 0.2)
    text = Rows.text(torch.tensor([[0, 1, 2], [0, 3, 3]]))
    step = Step(student, teacher, drawn.rows, torch.Generator(), text=text)
    without = dataclasses.replace(EXACT, plain_text=0.0).surrogate(step, drawn)
    with_text = dataclasses.replace(EXACT, plain_text=0.5).surrogate(step, drawn)
    assert with_text.tokens == without.tokens == 192
    expected = 0.5 * float(-token_log_prob(student, text).mean().detach())
    added = float((with_text.total - without.total).detach()) / 192
    assert added == pytest.approx(expected, rel=1e-9)
    assert with_text.parts["plain-text"] / 192 == pytest.approx(2 * expected, rel=1e-9)


def test_an_equal_teacher_has_no_advice() -> None:
    student, _ = models()
    teacher = Table(0)
    drawn, _ = every_draw(student, teacher, every_text(4, 3), 0.2)
    step = Step(student, teacher, drawn.rows, torch.Generator())
    tally = MiniLLM(plain_text=0.0).surrogate(step, drawn)
    assert float(tally.total.detach()) == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(tally.total, student.table)
    assert slope.abs().max() < 1e-12


def test_refusals() -> None:
    student, teacher = models()
    teacher.level = 3
    step = Step(student, teacher, every_text(4, 3), torch.Generator().manual_seed(0))
    assert MiniLLM().level == 4
    assert MiniLLM(alpha=0.0).level == 3
    with pytest.raises(
        TeacherCapabilityError, match="the objective 'minillm' needs a teacher of level T4"
    ):
        MiniLLM().loss(step)
    assert MiniLLM(alpha=0.0, tokens=3).loss(step).tokens == 192
    for options in ({"alpha": 1.0}, {"alpha": -0.1}, {"gamma": 0.0}, {"tokens": 0}):
        with pytest.raises(ValueError, match="must"):
            MiniLLM(**options)  # type: ignore[arg-type]
