"""Codes and scales trained together, on single matrices: where they begin, move, and must stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.formats.bilevel import Bilevel
from rarefy.formats.integer import Int
from rarefy.formats.nf4 import NF4
from rarefy.tuners.base import MatrixView
from rarefy.tuners.codes import Codes

ROWS, COLUMNS = 24, 40
FORMATS = [Int(3, group=16), Int(4), Int(2, group=24), Int(4, group=16, symmetric=True)]
EVERY = [*FORMATS, Bilevel(3, group=16), Bilevel(4, group=8, scale_bits=3, zero_bits=6)]


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def view(fmt: Any) -> MatrixView:
    packed = fmt.fit(drawn(ROWS, COLUMNS) * 0.2).encode(drawn(ROWS, COLUMNS) * 0.2)
    weight, grid = fmt.decode(packed), fmt.stored_grid(packed)
    return MatrixView("model.layers.0.mlp.up_proj", weight, grid, packed=packed)


def stored(adapter: Any) -> dict[str, torch.Tensor]:
    outcome = adapter.finish()
    return dict(outcome.grid.encode(outcome.weight))


@pytest.mark.parametrize("fmt", EVERY)
def test_at_rest_nothing_changes(fmt: Any) -> None:
    given = view(fmt)
    found = stored(Codes().adapt(given))
    assert given.packed is not None
    assert all(torch.equal(found[name], value) for name, value in given.packed.items())


@pytest.mark.parametrize("fmt", EVERY)
def test_gradients(fmt: Any) -> None:
    """Of a position: a code's width; of a scale's share: the sum of what the scale multiplies."""
    given = view(fmt)
    assert given.grid is not None
    tuner = Codes()
    adapter: Any = tuner.adapt(given)
    dW = drawn(ROWS, COLUMNS, seed=2)
    (adapter.matrix() * dW).sum().backward()
    scales = given.grid.scales
    spread = given.grid.spread(scales * given.grid.pitch, COLUMNS)
    assert torch.allclose(adapter.moved.grad, dW * spread * tuner.travel, rtol=1e-5)
    units = given.grid.units(given.weight)
    for number in range(scales.shape[1]):
        one = torch.zeros_like(scales)
        one[:, number] = 1
        expected = (dW * units * given.grid.spread(one, COLUMNS)).sum(1) * scales[:, number]
        assert torch.allclose(adapter.share.grad[:, number], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fmt", EVERY)
def test_codes_stay_on_the_grid_and_scales_above_zero(fmt: Any) -> None:
    given = view(fmt)
    assert given.grid is not None
    adapter: Any = Codes().adapt(given)
    with torch.no_grad():
        adapter.moved.normal_(0, 20)
        adapter.share.normal_(0, 20)
    adapter.constrain()
    low, high = (given.grid.spread(end, COLUMNS) for end in given.grid.limits())
    position = adapter.begin + adapter.travel * adapter.moved
    assert bool((position >= low - 0.5001).all())
    assert bool((position <= high + 0.5001).all())
    outcome = adapter.finish()
    assert bool((outcome.grid.scales > 0).all())
    assert torch.allclose(outcome.grid.round(outcome.weight), outcome.weight, rtol=1e-2)
    assert torch.allclose(outcome.weight, adapter.matrix(), rtol=2e-3, atol=1e-6)
    assert given.packed is not None
    found = stored(adapter)
    assert not torch.equal(found["weight_packed"], given.packed["weight_packed"])
    if "weight_zero_point" in found:
        assert torch.equal(found["weight_zero_point"], given.packed["weight_zero_point"])


def test_training_reaches_codes_that_rounding_does_not() -> None:
    """A target on the grid, one code away from the start in every tenth place, is found."""
    given = view(Int(4, group=16))
    assert given.grid is not None
    units = given.grid.units(given.weight)
    low, high = (given.grid.spread(end, COLUMNS) for end in given.grid.limits())
    moved = torch.where(drawn(ROWS, COLUMNS, seed=3) > 1.3, 1.0, 0.0)
    target = torch.clamp(units + moved, low, high) * given.grid.spread(given.grid.scales, COLUMNS)
    tuner = Codes(steps=60, schedule="constant")
    adapter: Any = tuner.adapt(given)
    optimizer = tuner.optimizer([{"params": [*adapter.parameters()], "lr": tuner.learning_rate}])
    for _ in range(60):
        optimizer.zero_grad()
        (adapter.matrix() - target).square().sum().backward()
        optimizer.step()
        adapter.constrain()
    before = (given.weight - target).square().sum()
    after = (adapter.finish().weight - target).square().sum()
    assert float(after) < 0.2 * float(before)


def test_a_code_changes_only_if_the_gradient_keeps_its_sign() -> None:
    """Over the whole run a position travels ``reach``, and half a code only with a steady sign."""
    tuner = Codes(steps=40)
    adapter: Any = tuner.adapt(view(Int(4, group=16)))
    optimizer = tuner.optimizer([{"params": [adapter.moved], "lr": tuner.learning_rate}])
    steady = drawn(ROWS, COLUMNS, seed=8) > 0
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = tuner.learning_rate * tuner.loop.factor(step)
        adapter.moved.grad = torch.where(steady, torch.tensor(-1.0), drawn(ROWS, COLUMNS, step))
        optimizer.step()
    gone = (adapter.moved.detach() * adapter.travel).abs()
    assert torch.allclose(gone[steady], torch.tensor(tuner.reach), rtol=1e-3)
    assert float((gone[~steady] > 0.5).float().mean()) < 0.02


def test_without_reach_only_scales_move() -> None:
    adapter: Any = Codes(reach=0).adapt(view(Int(4, group=16)))
    adapter.matrix().sum().backward()
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["share"]


def test_other_matrices_are_left_alone() -> None:
    weight = drawn(ROWS, COLUMNS)
    assert Codes().adapt(MatrixView("a.b", weight)) is None
    assert Codes().adapt(view(NF4())) is None
