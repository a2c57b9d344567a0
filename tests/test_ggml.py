"""llama.cpp's blocks as a format: what solvers and tuners do with it."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.formats.ggml import TYPES, Ggml
from rarefy.solvers.base import Problem
from rarefy.solvers.gptq import GPTQ
from rarefy.solvers.nearest import Nearest

every_type = pytest.mark.parametrize("name", TYPES)


def weights(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def gram(columns: int = 96) -> torch.Tensor:
    """Of inputs that depend on one another."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(512, 16, generator=g) @ torch.randn(16, columns, generator=g)
    x += 0.3 * torch.randn(512, columns, generator=g)
    return x.T @ x / len(x)


@every_type
@pytest.mark.parametrize("static", [False, True])
def test_gptq_solves_on_the_blocks(name: str, static: bool) -> None:
    W, H, fmt = weights(), gram(), Ggml(name)
    problem = Problem("layer", W, H)

    def loss(Q: torch.Tensor) -> float:
        return float(((W - Q) @ H * (W - Q)).sum())

    solved, rounded = (s.solve(problem, fmt) for s in (GPTQ(static_groups=static), Nearest()))
    assert loss(solved.weight) < 0.6 * loss(rounded.weight)
    assert torch.equal(fmt.decode(solved.grid.encode(solved.weight)), solved.weight)


@pytest.mark.parametrize("name", [name for name in TYPES if Ggml(name).scaled])
def test_units_times_scales_are_the_values(name: str) -> None:
    W = weights()
    grid = Ggml(name).fit(W)
    rounded, units = grid.round(W), grid.units(W)
    assert torch.equal(units * grid.spread(grid.scales, 96), rounded)
    doubled = grid.rescaled(2 * grid.scales)
    assert torch.equal(doubled.round(2 * W), 2 * rounded)
    low, high = grid.limits()
    assert bool((units.reshape(24, 3, 32) >= low.unsqueeze(-1)).all())
    assert bool((units.reshape(24, 3, 32) <= high.unsqueeze(-1)).all())


@pytest.mark.parametrize("name", [name for name in TYPES if Ggml(name).learnable])
def test_soft_rounding_is_rounding_with_gradients(name: str) -> None:
    W = weights()
    grid = Ggml(name).fit(W)
    low, high = (torch.full_like(grid.scales, f).requires_grad_() for f in (0.9, 0.93))
    offset = torch.zeros_like(W).requires_grad_()
    soft = grid.soft(W, low, high, offset)
    hard = grid.adjusted(low.detach(), high.detach()).round(W)
    torch.testing.assert_close(soft.detach(), hard, rtol=1e-5, atol=1e-7)
    (soft - W).square().sum().backward()
    assert high.grad is not None and offset.grad is not None
    # A smaller range clips more: the error falls when the range grows again.
    assert float(high.grad.mean()) < 0 or name == "q8_0"
    if TYPES[name].minimum:
        assert low.grad is not None and float(low.grad.abs().max()) > 0
    inside = offset.grad != 0
    expected = (
        2 * (hard - W) * grid.adjusted(low.detach(), high.detach()).scales.repeat_interleave(32, 1)
    )
    torch.testing.assert_close(offset.grad[inside], expected[inside], rtol=1e-3, atol=1e-7)


def test_what_the_format_refuses() -> None:
    with pytest.raises(ValueError, match="type must be one of q4_0"):
        Ggml("q4_k")
    assert Ggml().misfit(4, 96) == ""
    assert "not blocks of 32" in Ggml().misfit(4, 100)
    with pytest.raises(RarefyError, match="scale beyond float16"):
        Ggml("q8_0").fit(torch.full((1, 32), 1e8))


@every_type
def test_zeros_stay_zeros(name: str) -> None:
    grid = Ggml(name).fit(torch.zeros(2, 64))
    assert not grid.round(torch.zeros(2, 64)).any()
    assert bool((grid.scales > 0).all()) is (Ggml(name).holds_zero)
