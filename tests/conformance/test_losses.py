"""The contract of a loss: its formula and gradient, zero where both sides agree, never negative.

A loss without an entry in ``NAIVE`` fails with the mend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.losses.base import LOSSES, Loss, Reading, Target
from rarefy.losses.divergence import top_k
from rarefy.losses.jsd import JSD

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

N, V, WIDTH = 13, 37, 8

SAMPLES: dict[str, list[Any]] = {
    "jsd": [JSD(), JSD(0.1), JSD(0.9), JSD(0.2, rescale=True)],
}


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def naive_jsd(loss: Any, p: Tensor, q: Tensor) -> Tensor:
    m = loss.beta * p + (1 - loss.beta) * q
    value = loss.beta * naive_kl(p, m) + (1 - loss.beta) * naive_kl(q, m)
    return value / min(loss.beta, 1 - loss.beta) if loss.rescale else value


def naive_mse(loss: Any, t: Tensor, s: Tensor) -> Tensor:
    error = ((s - t) ** 2).mean(-1)
    return error / (t**2).mean(-1) if loss.relative else error


def naive_cosine(loss: Any, t: Tensor, s: Tensor) -> Tensor:
    return 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))


# (loss, the teacher's probabilities, states or labels, the student's probabilities or states)
NAIVE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "forward-kl": lambda loss, p, q: naive_kl(p, q),
    "reverse-kl": lambda loss, p, q: naive_kl(q, p),
    "jsd": naive_jsd,
    "cross-entropy": lambda loss, y, q: -q.log()[torch.arange(len(y)), y],
    "hidden-mse": naive_mse,
    "hidden-cosine": naive_cosine,
}


def params(kind: str | None = None) -> list[Any]:
    """Every sample of every registered loss that accepts ``kind``."""
    return [
        pytest.param(card.name, loss, id=f"{card.name} {i}")
        for card in LOSSES
        if kind is None or kind in card.cls.accepts
        for i, loss in enumerate(SAMPLES.get(card.name) or [card.cls()])
    ]


every_loss = pytest.mark.parametrize(("name", "loss"), params())
every_divergence = pytest.mark.parametrize(("name", "loss"), params("logits"))
every_state_loss = pytest.mark.parametrize(("name", "loss"), params("states"))
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])


def draw(seed: int, width: int = V) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(N, width, generator=g, dtype=torch.float64)


def reading_and_target(loss: Loss, seed: int = 0) -> tuple[Reading, Target]:
    """A student and something that the loss accepts."""
    g = torch.Generator().manual_seed(seed)
    states = (draw(seed + 2, WIDTH), draw(seed + 3, WIDTH))
    target = Target(
        logits=draw(seed + 1),
        states=(draw(seed + 4, WIDTH), draw(seed + 5, WIDTH)),
        labels=torch.randint(V, (N,), generator=g),
    )
    return Reading(draw(seed), states), target


def leaf(values: Tensor) -> Tensor:
    return values.clone().requires_grad_()


def agree(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients of two ways to compute the same thing, tokens weighed unequally."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(0.5, 2, len(found), dtype=found.dtype)
    mine = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("name", [card.name for card in LOSSES])
def test_has_an_oracle(name: str) -> None:
    if name not in NAIVE:
        pytest.fail(f"add a naive implementation of the loss {name!r} to NAIVE in {__file__}")


@every_divergence
@temperatures
def test_equals_the_naive_formula(name: str, loss: Loss, temperature: float) -> None:
    z, t = leaf(draw(0)), draw(1)
    p, q = torch.softmax(t / temperature, -1), torch.softmax(z / temperature, -1)
    expected = temperature**2 * NAIVE[name](loss, p, q)
    agree(loss.per_token(Reading(z), Target(logits=t), temperature), expected, (z,))


@every_divergence
@temperatures
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_shortened_equals_the_naive_formula_of_buckets(
    name: str, loss: Loss, temperature: float, k: int
) -> None:
    z, t = leaf(draw(0)), draw(1)
    top = top_k(t, k, temperature)

    def merged(logits: Tensor) -> Tensor:
        whole = torch.softmax(logits / temperature, -1)
        entries = whole.gather(1, top.indices)
        others = whole.scatter(1, top.indices, 0.0).sum(-1, keepdim=True)
        return torch.cat([entries, others], 1)

    expected = temperature**2 * NAIVE[name](loss, merged(t), merged(z))
    agree(loss.per_token(Reading(z), Target(top=top), temperature), expected, (z,))


@every_state_loss
def test_states_equal_the_naive_formula(name: str, loss: Loss) -> None:
    reading, target = reading_and_target(loss)
    states = tuple(leaf(state) for state in reading.states)
    pairs = zip(target.states, states, strict=True)
    expected = sum(NAIVE[name](loss, t, s) for t, s in pairs) / 2
    assert isinstance(expected, torch.Tensor)
    agree(loss.per_token(Reading(reading.logits, states), target), expected, states)


@pytest.mark.parametrize(("name", "loss"), params("labels"))
def test_labels_equal_the_naive_formula(name: str, loss: Loss) -> None:
    reading, target = reading_and_target(loss)
    z = leaf(reading.logits)
    assert target.labels is not None
    expected = NAIVE[name](loss, target.labels, torch.softmax(z, -1))
    agree(loss.per_token(Reading(z), target), expected, (z,))


@every_loss
def test_slope_is_that_of_finite_differences(name: str, loss: Loss) -> None:
    reading, target = reading_and_target(loss, 10)
    inputs = (reading.logits, *reading.states)
    steps = tuple(draw(20 + i, x.shape[1]) for i, x in enumerate(inputs))

    def value(shift: float) -> Tensor:
        moved = [x + shift * d for x, d in zip(inputs, steps, strict=True)]
        return loss.per_token(Reading(moved[0], tuple(moved[1:])), target).sum()

    leaves = tuple(leaf(x) for x in inputs)
    total = loss.per_token(Reading(leaves[0], leaves[1:]), target).sum()
    slopes = torch.autograd.grad(total, leaves, allow_unused=True)
    along = sum(float((g * d).sum()) for g, d in zip(slopes, steps, strict=True) if g is not None)
    assert along == pytest.approx(float(value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


@every_divergence
@temperatures
@pytest.mark.parametrize("short", [False, True])
def test_zero_with_zero_gradient_where_both_agree(
    name: str, loss: Loss, temperature: float, short: bool
) -> None:
    z = leaf(draw(3))
    same = z.detach() + 4
    target = Target(top=top_k(same, 6, temperature)) if short else Target(logits=same)
    values = loss.per_token(Reading(z), target, temperature)
    assert values.abs().max() < 1e-13
    values.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-13


@every_state_loss
def test_zero_where_the_states_agree(name: str, loss: Loss) -> None:
    reading, _ = reading_and_target(loss)
    values = loss.per_token(reading, Target(states=reading.states))
    assert values.abs().max() < 1e-12


@every_loss
def test_never_negative_and_not_always_zero(name: str, loss: Loss) -> None:
    for seed in range(20):
        values = loss.per_token(*reading_and_target(loss, 100 * seed))
        assert values.shape == (N,)
        assert values.min() >= 0
        assert values.max() > 1e-3


@every_divergence
def test_a_constant_on_the_logits_changes_nothing(name: str, loss: Loss) -> None:
    z, t = draw(0), draw(1)
    plain = loss.per_token(Reading(z), Target(logits=t), 2.0)
    shift = torch.linspace(-50, 50, N, dtype=torch.float64)[:, None]
    moved = loss.per_token(Reading(z + shift), Target(logits=t - 2 * shift), 2.0)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-12)


@every_loss
def test_tokens_do_not_depend_on_each_other(name: str, loss: Loss) -> None:
    reading, target = reading_and_target(loss)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    assert target.logits is not None
    assert target.labels is not None
    permuted = loss.per_token(
        Reading(reading.logits[order], tuple(s[order] for s in reading.states)),
        Target(
            target.logits[order], None, tuple(s[order] for s in target.states), target.labels[order]
        ),
    )
    assert torch.equal(permuted, loss.per_token(reading, target)[order])


@every_loss
def test_refuses_a_target_that_it_cannot_use(name: str, loss: Loss) -> None:
    with pytest.raises(RarefyError, match=f"the loss '{name}' needs"):
        loss.per_token(Reading(draw(0)), Target())
