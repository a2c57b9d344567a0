"""The contract of a format, checked bit for bit on matrices that are awkward to store."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load, save

from conformance.samples import format_params, registered_formats, require_samples
from rarefy.checkpoint.reader import DTYPES
from rarefy.formats.base import FORMATS, Format, stored_bytes
from rarefy.recipe import describe, format_from

WIDTHS = (1, 7, 64, 101)
every_format = pytest.mark.parametrize("fmt", format_params())
every_width = pytest.mark.parametrize("columns", WIDTHS)


def matrix(columns: int) -> torch.Tensor:
    """[13, n]: ordinary rows, then rows that are zero, constant, spiked, tiny, large, one-sided."""
    g = torch.Generator().manual_seed(columns)
    W = torch.randn(13, columns, generator=g)
    W[3] = 0
    W[4] = 0.37
    W[5] = -0.37
    W[6, columns // 2] = 60.0
    W[7] *= 1e-5
    W[8] *= 300
    W[9].abs_()
    W[10] = -W[10].abs()
    W[11, ::2] = 0
    W[12] *= 1e-9
    return W


def importance(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) + 0.1


def matrix_for(fmt: Format, columns: int) -> torch.Tensor:
    W = matrix(columns)
    if why := fmt.misfit(*W.shape):
        pytest.skip(why)
    return W


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", registered_formats())
def test_has_samples(name: str) -> None:
    require_samples("format", name)


@every_format
@every_width
def test_rounding_twice_is_rounding_once(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    grid = fmt.fit(W)
    once = grid.round(W)
    assert torch.isfinite(once).all()
    assert torch.equal(grid.round(once), once)


@every_format
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_gives_what_was_rounded(fmt: Format, columns: int, dtype: torch.dtype) -> None:
    W = matrix_for(fmt, columns).to(dtype)
    for grid in (fmt.fit(W), fmt.fit(W, importance(columns).to(dtype))):
        rounded = grid.round(W).float()
        assert torch.equal(fmt.decode(grid.encode(W)), rounded)
        # A solver hands over values that are on the grid already.
        assert torch.equal(fmt.decode(grid.encode(grid.round(W))), rounded)


@every_format
@every_width
def test_rows_can_be_decoded_alone(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    packed = fmt.fit(W).encode(W)
    whole = fmt.decode(packed)
    for rows in (slice(3, 9), slice(12, 13), torch.tensor([11, 0, 5, 5])):
        assert torch.equal(fmt.decode(packed, rows), whole[rows])


@every_format
@every_width
def test_layout_and_bytes_are_what_is_stored(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    grid = fmt.fit(W)
    packed, layout = grid.encode(W), grid.form.layout(*W.shape)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == {
        k: (shape, DTYPES[dtype]) for k, (shape, dtype) in layout.items()
    }
    assert stored_bytes(grid.form, *W.shape) == sum(t.nbytes for t in packed.values())


@every_format
def test_stored_tensors_survive_a_file(fmt: Format) -> None:
    W = matrix_for(fmt, 101)
    packed = fmt.fit(W).encode(W)
    assert torch.equal(fmt.decode(load(save(packed))), fmt.fit(W).round(W))


@every_format
@every_width
def test_columns_may_be_rounded_in_pieces(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    grid = fmt.fit(W)
    edges = sorted({0, 1, 5, 15, 16, 33, 100, columns} & set(range(columns + 1)))
    pieces = [grid.round(W[:, a:b], a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces, 1), grid.round(W))


@every_format
@every_width
def test_a_grid_is_cut_by_rows(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    grid = fmt.fit(W)
    for a, b in ((0, 13), (2, 9), (12, 13)):
        part = grid.rows(a, b)
        assert torch.equal(part.round(W[a:b]), grid.round(W)[a:b])
        assert torch.equal(fmt.decode(part.encode(W[a:b])), grid.round(W)[a:b])
        if fmt.rows_independent:
            assert same(part.encode(W[a:b]), fmt.fit(W[a:b]).encode(W[a:b]))


@every_format
@every_width
def test_grids_of_spans_join_to_the_grid_of_the_whole(fmt: Format, columns: int) -> None:
    W, weights = matrix_for(fmt, columns), importance(columns)
    if not fmt.spans_independent:
        pytest.skip("the grid of a span depends on the others")
    span = fmt.span or columns
    grids = [fmt.fit(W[:, a : a + span], weights[a : a + span]) for a in range(0, columns, span)]
    joined = type(grids[0]).join(grids)
    assert same(joined.encode(W), fmt.fit(W, weights).encode(W))
    assert torch.equal(joined.round(W), fmt.fit(W, weights).round(W))


@every_format
@every_width
def test_zero_stays_zero(fmt: Format, columns: int) -> None:
    W = matrix_for(fmt, columns)
    if fmt.inner_width(*W.shape) is not None:
        pytest.skip("a product of factors has no zeros of its own")
    if not fmt.holds_zero:
        pytest.skip("the set has no zero")
    rounded = fmt.fit(W).round(W)
    assert not rounded[W == 0].any()


@every_format
def test_fitting_is_deterministic_and_changes_nothing(fmt: Format) -> None:
    W, weights = matrix_for(fmt, 101), importance(101)
    before, weights_before = W.clone(), weights.clone()
    grid = fmt.fit(W, weights)
    rounded, packed = grid.round(W), grid.encode(W)
    stored = {k: t.clone() for k, t in packed.items()}
    decoded = fmt.decode(packed)
    assert torch.equal(W, before)
    assert torch.equal(weights, weights_before)
    assert same(packed, stored)
    assert torch.equal(grid.round(W), rounded)
    assert torch.equal(fmt.decode(packed), decoded)
    assert same(fmt.fit(W, weights).encode(W), packed)


@every_format
def test_memory_order_of_the_weights_does_not_matter(fmt: Format) -> None:
    W = matrix_for(fmt, 64)
    turned = W.T.contiguous().T
    assert not turned.is_contiguous()
    assert same(fmt.fit(turned).encode(turned), fmt.fit(W).encode(W))


@every_format
def test_rounding_keeps_close_to_ordinary_weights(fmt: Format) -> None:
    W = matrix_for(fmt, 64)[:3]
    if fmt.misfit(*W.shape):
        pytest.skip("three rows are too few")
    error = (fmt.fit(W).round(W) - W).square().sum() / W.square().sum()
    # Any format worth the name beats storing zeros by far, and more bits are not required for it.
    assert error < 0.5


@every_format
def test_survives_the_recipe_and_the_dtype_of_a_checkpoint(fmt: Format) -> None:
    name = FORMATS.name_of(fmt)
    assert describe(fmt)["format"] == name
    for dtype in ("F32", "F16", "BF16"):
        dressed = fmt.for_dtype(dtype)
        assert type(dressed) is type(fmt)
        assert dressed.span == fmt.span
        assert dressed.for_dtype(dtype) == dressed
        assert format_from(describe(dressed)) == dressed
