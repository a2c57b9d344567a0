"""The integer grids against figures worked out by hand and against plain loops."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, stored_bytes
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack
from rarefy.rules import ranges


def weights(rows: int = 6, columns: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes_of(fmt: Int, W: torch.Tensor) -> list[list[int]]:
    packed = fmt.fit(W).encode(W)["weight_packed"]
    return unpack(packed, fmt.bits, W.shape[1]).tolist()


def test_asymmetric_grid_by_hand() -> None:
    # Range [-1, 2.75] in 15 steps of 0.25; zero is code 4.
    W = torch.tensor([[-1.0, 0.0, 0.1, 0.13, 1.0, 2.75]])
    fmt = Int(4)
    grid = fmt.fit(W)
    assert (grid.scale.item(), grid.zero.item()) == (0.25, 4)
    assert codes_of(fmt, W) == [[0, 4, 4, 5, 8, 15]]
    assert grid.round(W).tolist() == [[-1.0, 0.0, 0.0, 0.25, 1.0, 2.75]]


def test_symmetric_grid_by_hand() -> None:
    # scale = 2 * 3.75 / 15: the positive extreme has no code of its own, the negative one has.
    W = torch.tensor([[3.75, -3.75, 0.3, -0.2]])
    fmt = Int(4, symmetric=True)
    grid = fmt.fit(W)
    assert (grid.scale.item(), grid.zero.item()) == (0.5, 8)
    assert codes_of(fmt, W) == [[15, 0, 9, 8]]
    assert grid.round(W).tolist() == [[3.5, -4.0, 0.5, 0.0]]
    assert "weight_zero_point" not in grid.encode(W)


def test_zero_points_are_packed_along_rows() -> None:
    W = torch.tensor([[-k / 8, (15 - k) / 8] for k in range(9)])
    packed = Int(4).fit(W).encode(W)["weight_zero_point"]
    assert packed.shape == (2, 1)
    assert [int(word) & 0xFFFFFFFF for word in packed[:, 0]] == [0x76543210, 0x8]


@pytest.mark.parametrize(("sign", "zero"), [(1.0, 0), (-1.0, 15)])
def test_zero_lies_in_the_range_of_one_sided_groups(sign: float, zero: int) -> None:
    W = sign * (weights().abs() + 1)
    grid = Int(4).fit(W)
    assert (grid.zero == zero).all()
    assert torch.allclose(grid.scale[:, 0], W.abs().amax(1) / 15, rtol=2**-11)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_min_max_rounds_to_the_nearest_code(bits: int, symmetric: bool) -> None:
    W = weights()
    fmt = Int(bits, 16, symmetric)
    grid = fmt.fit(W)
    scale = grid.scale.repeat_interleave(16, 1)
    levels = torch.arange(1 << bits) - grid.zero.repeat_interleave(16, 1)[..., None]
    nearest = (levels * scale[..., None] - W[..., None]).abs().amin(-1)
    error = (grid.round(W) - W).abs()
    assert (error <= nearest + W.abs().amax() * 2**-22).all()


def test_groups_are_columns_in_order_and_the_last_may_be_short() -> None:
    W = torch.ones(2, 10)
    W[:, 4:8] *= 2
    W[:, 8:] *= 3
    grid = Int(2, group=4).fit(W)
    assert grid.scale.shape == (2, 3)
    assert grid.scale[0].tolist() == pytest.approx([1 / 3, 2 / 3, 1], rel=2**-11)
    assert torch.allclose(grid.round(W), W, rtol=2**-10)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_exact_in_the_stored_type_and_values_in_float32(dtype: str) -> None:
    stored = getattr(torch, dtype)
    W = weights().double()
    grid = Int(5, 16, scale_dtype=dtype).fit(W)
    assert torch.equal(grid.scale.to(stored).double(), grid.scale)
    assert torch.equal(grid.round(W).float().double(), grid.round(W))
    assert not torch.equal(grid.round(W).to(stored).double(), grid.round(W))
    # The two types differ, so a format dressed for the wrong checkpoint would show.
    other = "bfloat16" if dtype == "float16" else "float16"
    assert not torch.equal(Int(5, 16, scale_dtype=other).fit(W).scale, grid.scale)


def test_empty_groups_have_scale_one() -> None:
    W = weights()
    W[2] = 0
    for symmetric in (False, True):
        grid = Int(4, symmetric=symmetric).fit(W)
        assert grid.scale[2].item() == 1
        assert not grid.round(W)[2].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_rule_equals_a_plain_search(weighted: bool, symmetric: bool) -> None:
    W = weights(5, 32, seed=1).double()
    importance = torch.rand(32, generator=torch.Generator().manual_seed(2)).double()
    fmt = Int(3, symmetric=symmetric, rule="mse")
    grid = fmt.fit(W, importance if weighted else None)
    for r, row in enumerate(W):
        best, scale, zero = float("inf"), None, None
        lo, hi = float(row.clamp(max=0).min()), float(row.clamp(min=0).max())
        for step in range(13):
            p = 1 - (1 - 0.64) * step / 12
            low, high = p * lo, p * hi
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            s = torch.tensor((high - low) / 7).half().double()
            z = torch.tensor(4.0) if symmetric else torch.round(-low / s)
            q = (torch.round(row / s) + z).clamp(0, 7)
            error = (s * (q - z) - row).square()
            total = float((error * importance if weighted else error).sum())
            if total < best:
                best, scale, zero = total, s, z
        assert grid.scale[r, 0] == scale
        assert grid.zero[r, 0] == zero


def test_mse_rule_gives_up_an_outlier() -> None:
    W = weights(4, 512)
    W[:, 0] = 8
    plain, searched = Int(3).fit(W), Int(3, rule="mse").fit(W)
    assert (searched.scale < 0.8 * plain.scale).all()
    error = [(g.round(W) - W).square().sum(1) for g in (plain, searched)]
    assert (error[1] < error[0]).all()


def test_importance_decides_where_the_error_goes() -> None:
    W = weights(8, 64)
    W[:, 0] = 8
    importance = torch.ones(64)
    importance[0] = 1e4
    fmt = Int(3, rule="mse")
    careless, careful = fmt.fit(W), fmt.fit(W, importance)
    spike = [(g.round(W) - W)[:, 0].abs().sum() for g in (careless, careful)]
    assert spike[1] < 0.5 * spike[0]


def test_min_max_rule_forces_zero_into_the_range() -> None:
    groups = torch.tensor([[[1.0, 2.0], [-3.0, -1.0], [-1.0, 4.0]]])
    lo, hi = ranges.minmax(groups)
    assert lo.tolist() == [[0, -3, -1]]
    assert hi.tolist() == [[2, 0, 4]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_bits_per_weight_of_the_formula(bits: int, group: int) -> None:
    # b + (16 + b) / g, and the eight-byte shape.
    rows, columns = 64, 256
    expected = rows * columns * (bits + (16 + bits) / group) / 8 + 16
    assert stored_bytes(Int(bits, group), rows, columns) == expected
    without_zero = rows * columns * (bits + 16 / group) / 8 + 16
    assert stored_bytes(Int(bits, group, symmetric=True), rows, columns) == without_zero


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4, "group": 0},
        {"bits": 4, "rule": "best"},
        {"bits": 4, "scale_dtype": "float32"},
    ],
)
def test_refuses_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(RarefyError, match=f"here: {list(options)[-1]} must"):
        FORMATS.build("int", options, "here")


def test_labels_and_checkpoint_dtypes() -> None:
    assert Int(4, 64).label() == "int4 g64"
    assert Int(8, symmetric=True).label() == "int8 row sym"
    assert Int(4).for_dtype("BF16").scale_dtype == "bfloat16"
    assert Int(4, scale_dtype="bfloat16").for_dtype("F32").scale_dtype == "float16"
    assert Int(4).span is None
    assert Int(4, 64).span == 64
