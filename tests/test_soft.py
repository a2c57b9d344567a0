"""Rounding with gradients: the closed forms against automatic differentiation, and bit for bit."""

from __future__ import annotations

import pytest
import torch

from rarefy.formats.integer import Int, IntGrid
from rarefy.formats.sparse import Sparse
from rarefy.kernels import library

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = [
    Int(2, group=4),
    Int(3),
    Int(3, group=5, scale_dtype="bfloat16"),
    Int(4, group=8, symmetric=True),
    Int(3, symmetric=True, scale_dtype="bfloat16"),
    Int(8, group=6),
]


def weights(rows: int = 5, columns: int = 18, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def spread(rows: int, groups: int, low: float, high: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(rows, groups, generator=g, dtype=torch.float64)


def through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value with the derivative of x."""
    return x + (value - x).detach()


def naive(
    grid: IntGrid, W: torch.Tensor, low: torch.Tensor, high: torch.Tensor, V: torch.Tensor | None
) -> torch.Tensor:
    """The documented formula, column by column, with straight-through roundings."""
    form, columns = grid.form, []
    kind = STORED[form.scale_dtype]
    for j in range(W.shape[1]):
        k = j // (form.group or W.shape[1])
        s0, z0 = grid.scale[:, k], grid.zero[:, k]
        if form.symmetric:
            s, z = s0 * high[:, k], z0
        else:
            lo = -z0 * s0 * low[:, k]
            s = ((form.levels - z0) * s0 * high[:, k] - lo) / form.levels
        s = through(s, s.to(kind).double())
        if not form.symmetric:
            z = -lo / s
            z = through(z, z.round())
        u = W[:, j] / s + (0 if V is None else V[:, j])
        c = (through(u, u.round()) + z).clamp(0, form.levels)
        columns.append(s * (c - z))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("form", CASES, ids=lambda f: f"{f.label()} {f.scale_dtype}")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shares", [(0.3, 0.7), (0.9, 1.3)], ids=["clipping", "moderate"])
def test_values_and_gradients_are_those_of_automatic_differentiation(
    form: Int, offset: bool, shares: tuple[float, float]
) -> None:
    W = weights()
    grid = form.fit(W)
    m, n = W.shape
    G = grid.scales.shape[1]
    low, high = (spread(m, G, *shares, seed) for seed in (1, 2))
    V = spread(m, n, -0.5, 0.5, 3) if offset else None
    leaves = [x for x in (W, low, high, V) if x is not None]
    slopes = weights(seed=4)
    results = []
    for function in (IntGrid.soft, naive):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        value = function(grid, *own[:3], own[3] if offset else None)
        (value * slopes).sum().backward()
        results.append((value.detach(), [leaf.grad for leaf in own]))
    (value, gradients), (expected, wanted) = results
    assert torch.equal(value, expected)
    clipped = gradients[0] == 0
    assert clipped.any() or shares[1] > 1
    assert not clipped.all()
    for name, mine, theirs in zip(["W", "low", "high", "V"], gradients, wanted, strict=False):
        if name == "low" and form.symmetric:
            assert mine is None
            continue
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_by_hand() -> None:
    # Range [-1, 2.75] in steps of 0.25, zero is code 4. Halved: [-0.5, 1.375], s = 0.125, z = 4.
    W = torch.tensor([[-1.0, 0.30, 2.75]], dtype=torch.float64)
    grid = Int(4).fit(W)
    W.requires_grad_()
    low, high = (torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True) for _ in "lh")
    value = grid.soft(W, low, high)
    assert value.tolist() == [[-0.5, 0.25, 1.375]]
    value.sum().backward()
    assert W.grad is not None and W.grad.tolist() == [[0, 1, 0]]
    # By s: -4, 2 - 0.3 / 0.125 and 11; by z: -s of the two that are clipped. s moves by 1 / 15 of
    # each end; z = 0.5 / s by 0.5 / s^2 less with s, and by 1 / s less with the lower end.
    by_s = -4 + (2 - 2.4) + 11 + 2 * 0.125 * 0.5 / 0.125**2
    assert high.grad is not None and high.grad.item() == pytest.approx(by_s / 15 * 2.75)
    assert low.grad is not None
    assert low.grad.item() == pytest.approx(-1 * (-by_s / 15 + 2 * 0.125 / 0.125))


def ones(grid: IntGrid) -> torch.Tensor:
    return torch.ones_like(grid.scales)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", list(STORED))
def test_with_factors_of_one_it_rounds_as_the_grid_does(
    bits: int, symmetric: bool, kind: str
) -> None:
    W = weights(7, 40, seed=bits).float() * torch.logspace(-6, 1, 7)[:, None]
    W[3] = W[3].abs()
    W[4, :16] = 0
    grid = Int(bits, group=16, symmetric=symmetric, scale_dtype=kind).fit(W)
    same = grid.adjusted(ones(grid), ones(grid))
    assert torch.equal(same.scale, grid.scale)
    assert torch.equal(same.zero, grid.zero)
    assert torch.equal(grid.soft(W, ones(grid), ones(grid)), grid.round(W))


@pytest.mark.parametrize("form", CASES, ids=lambda f: f"{f.label()} {f.scale_dtype}")
def test_it_rounds_as_the_adjusted_grid_does(form: Int) -> None:
    W = weights().float()
    grid = form.fit(W)
    low, high = (spread(*grid.scales.shape, 0.4, 1.2, seed).float() for seed in (1, 2))
    moved = grid.adjusted(low, high)
    assert torch.equal(grid.soft(W, low, high), moved.round(W))
    assert not torch.equal(moved.round(W), grid.round(W))
    decoded = form.decode(moved.encode(W))
    assert torch.equal(decoded, moved.round(W))


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_that_vanishes_leaves_finite_numbers(symmetric: bool) -> None:
    W = weights().float()
    grid = Int(4, group=6, symmetric=symmetric).fit(W)
    low, high = (torch.zeros_like(grid.scales, requires_grad=True) for _ in "lh")
    moved = grid.adjusted(low.detach(), high.detach())
    assert (moved.scale > 0).all()
    value = grid.soft(W.requires_grad_(), low, high)
    value.square().sum().backward()
    assert value.isfinite().all()
    assert high.grad is not None and high.grad.isfinite().all()


@pytest.mark.parametrize("form", CASES, ids=lambda f: f"{f.label()} {f.scale_dtype}")
def test_a_stored_matrix_tells_its_grid(form: Int) -> None:
    W = weights(9, 18, seed=5).float()
    grid = form.fit(W)
    read = form.stored_grid(grid.encode(W))
    assert torch.equal(read.scale, grid.scale)
    assert torch.equal(read.zero, grid.zero)
    other = weights(9, 18, seed=6).float()
    assert torch.equal(read.round(other), grid.round(other))
    assert read.form == form


def test_units_times_scales_are_the_rounded_matrix() -> None:
    W = weights().float()
    grid = Int(3, group=5).fit(W)
    values = grid.units(W) * grid.spread(grid.scales, W.shape[1])
    assert torch.equal(values, grid.round(W))
    doubled = grid.rescaled(2 * grid.scales)
    assert torch.equal(doubled.round(2 * W), 2 * grid.round(W))


def test_what_a_sparse_grid_leaves_out_gets_neither_value_nor_gradient() -> None:
    W = weights().float()
    grid = Sparse(0.5, values=Int(4, group=6)).fit(W)
    low, high = torch.ones_like(grid.scales), torch.ones_like(grid.scales)
    value = grid.soft(W.requires_grad_(), low, high)
    assert torch.equal(value, grid.round(W.detach()))
    value.sum().backward()
    assert W.grad is not None
    assert (W.grad[~grid.chosen] == 0).all()
    assert (W.grad[grid.chosen] != 0).any()
    read = grid.form.stored_grid(grid.encode(W.detach()))
    assert read is not None and torch.equal(read.round(W.detach()), value)


@pytest.mark.parametrize("form", CASES, ids=lambda f: f"{f.label()} {f.scale_dtype}")
@pytest.mark.parametrize("offset", [False, True])
def test_the_compiled_kernel_does_what_torch_does(
    form: Int, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library.available():
        pytest.skip(library.reason())
    W = weights(70, 50).float()
    grid = form.fit(W)
    m, G = grid.scales.shape
    low, high = (spread(m, G, 0.6, 1.1, seed).float() for seed in (1, 2))
    V = spread(*W.shape, -0.5, 0.5, 3).float() if offset else None
    slopes = weights(70, 50, seed=4).float()
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("rarefy.formats.soft.soft_rounding", lambda *given: None)
        leaves = [x if x is None else x.clone().requires_grad_() for x in (W, low, high, V)]
        value = grid.soft(*leaves)
        (value * slopes).sum().backward()
        results.append([value.detach(), *(x.grad for x in leaves if x is not None)])
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
