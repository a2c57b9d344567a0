"""Integers whose scales and zero points are integers, too: brute force, recovery, bytes, tuners."""

from __future__ import annotations

import itertools

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.base import stored_bytes
from rarefy.formats.bilevel import Bilevel, BilevelGrid
from rarefy.formats.integer import Int
from rarefy.kernels import library
from rarefy.kernels.bind import kernel_for

SHAPES = (Bilevel(4), Bilevel(3, scale_bits=3, zero_bits=5), Bilevel(2, zero_bits=2, group=24))


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(fmt: Bilevel, W: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    squares = (fmt.fit(W, weights).round(W) - W).square()
    return float((squares if weights is None else squares * weights).sum())


@pytest.mark.parametrize("fmt", SHAPES, ids=Bilevel.label)
def test_a_matrix_on_such_a_grid_is_found_again(fmt: Bilevel) -> None:
    g = torch.Generator().manual_seed(1)
    rows, count, steps = 16, 6, 1 << fmt.scale_bits
    unit = (torch.rand(rows, 1, generator=g) * 0.02 + 0.01).half().float()
    c = torch.randint(0, steps, (rows, count), generator=g)
    c[:, 2] = steps - 1  # the unit follows from the widest range
    scale = (c + steps // 2) * (unit / steps)
    k = torch.randint(1 << fmt.zero_bits, (rows, count), generator=g)
    zero = (k / fmt.fraction).clamp(0, fmt.levels)
    q = torch.randint(0, fmt.levels + 1, (rows, count, fmt.group), generator=g)
    q[..., 0], q[..., 1] = 0, fmt.levels  # every range is used to both ends
    W = ((q - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
    grid = fmt.fit(W)
    assert torch.equal(grid.unit, unit)
    torch.testing.assert_close(grid.round(W), W, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", SHAPES, ids=Bilevel.label)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_comes_near_the_best_of_all_codes(fmt: Bilevel, weighted: bool) -> None:
    W = normal(64, 2 * fmt.group, seed=3)
    weights = torch.ones(W.shape[1])
    if weighted:
        weights = torch.rand(W.shape[1], generator=torch.Generator().manual_seed(4)) + 0.1
    unit, steps = fmt.fit(W, weights).unit, 1 << fmt.scale_bits
    groups, by = fmt.grouped(W), fmt.grouped(weights[None])
    best = torch.full(groups.shape[:2], torch.inf)
    for c, k in itertools.product(range(steps), range(1 << fmt.zero_bits)):
        scale, zero = ((c + steps // 2) * unit / steps).unsqueeze(-1), k / fmt.fraction
        q = (groups / scale + zero).round().clamp(0, fmt.levels)
        best = torch.minimum(best, (((q - zero) * scale - groups).square() * by).sum(-1))
    assert float(best.sum()) * 0.999 <= error(fmt, W, weights) <= float(best.sum()) * 1.05


def test_searching_beats_taking_the_nearest_ends() -> None:
    W = normal(32, 576)
    assert error(Bilevel(3), W) < 0.9 * error(Bilevel(3, rule="minmax"), W)


def test_small_groups_beat_large_ones_at_the_same_bytes() -> None:
    W = normal(64, 576)
    small, large = Bilevel(4, 32, scale_bits=3, zero_bits=6), Int(4, 64, rule="mse")
    assert stored_bytes(small, *W.shape) <= stored_bytes(large, *W.shape)
    assert error(small, W) < 0.9 * float((large.fit(W).round(W) - W).square().sum())


def test_bits_of_a_weight() -> None:
    fmt = Bilevel(4, 32, scale_bits=3, zero_bits=6)
    bits = 8 * (stored_bytes(fmt, 64, 576) - 16) / (64 * 576)  # without the shape's 16 bytes
    assert bits == 4 + (3 + 6) / 32 + 16 / 576


def test_units_move_and_codes_stay() -> None:
    W = normal(8, 96)
    grid = Bilevel(4).fit(W)
    moved = grid.rescaled(grid.scales * 1.25)
    assert torch.equal(moved.unit, (grid.unit * 1.25).half().float())
    torch.testing.assert_close(moved.scale / moved.unit, grid.scale / grid.unit)
    codes = grid.codes(grid.round(W))
    assert torch.equal(moved.codes(moved.round(grid.round(W) * moved.unit / grid.unit)), codes)
    values = grid.units(W) * grid.spread(grid.scales, 96)
    torch.testing.assert_close(values, grid.round(W), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1.0, 0.9, 0.8])
def test_adjusted_ranges_stay_on_the_codes(factor: float) -> None:
    W = normal(8, 96)
    grid = Bilevel(3).fit(W)
    ends = torch.full_like(grid.zero, factor)
    moved = grid.adjusted(ends, ends)
    assert isinstance(moved, BilevelGrid)
    assert torch.equal(moved.unit, grid.unit)
    form = grid.form
    assert torch.equal(form.scale_of(form.scale_codes(moved.scale, moved.unit), moved.unit),
                       moved.scale)  # fmt: skip
    assert torch.equal(form.zero_of(moved.zero), moved.zero)
    if factor == 1.0:
        assert torch.equal(moved.scale, grid.scale) and torch.equal(moved.zero, grid.zero)


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"group": 0}, {"scale_bits": 7}, {"zero_bits": 3}, {"rule": "best"}]
)
def test_wrong_fields_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bilevel(**({"bits": 4} | wrong))


def test_weights_beyond_the_unit_are_refused() -> None:
    with pytest.raises(RarefyError, match="beyond float16"):
        Bilevel(4).fit(torch.full((1, 32), 3e6))


@pytest.mark.skipif(not library.available(), reason="no compiled kernels")
@pytest.mark.parametrize("vectors", [1, 3, 40])
@pytest.mark.parametrize(
    "fmt",
    [
        *SHAPES,
        Bilevel(8, 64, scale_bits=6, zero_bits=8),
        Bilevel(4, 32, scale_bits=3, zero_bits=6),
        Bilevel(3, 40, scale_dtype="bfloat16"),
        Bilevel(2, 576, zero_bits=4),
        Bilevel(5),
        Bilevel(6, 48, zero_bits=8),
    ],
    ids=Bilevel.label,
)
def test_kernels_multiply_by_what_is_decoded(fmt: Bilevel, vectors: int) -> None:
    W, x = normal(50, 576), normal(vectors, 576, seed=2)
    packed = fmt.fit(W).encode(W)
    kernel = kernel_for(fmt)
    assert kernel is not None
    expected = x.double() @ fmt.decode(packed).double().T
    found = kernel.product(x, packed, None).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(kernel.rows(ids, packed, 576), fmt.decode(packed)[ids])


@pytest.mark.skipif(not library.available(), reason="no compiled kernels")
@pytest.mark.parametrize("per", ["token", "group"])
@pytest.mark.parametrize("fmt", SHAPES, ids=Bilevel.label)
def test_kernels_with_int8_inputs(fmt: Bilevel, per: str) -> None:
    W, x = normal(50, 576), normal(2, 576, seed=2)
    packed = fmt.fit(W).encode(W)
    rounding = IntActivation(8, per, group=64 if per == "group" else 1)
    kernel = kernel_for(fmt, rounding)
    assert kernel is not None
    expected = rounding.round(x).double() @ fmt.decode(packed).double().T
    found = kernel.product(x, packed, None).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
