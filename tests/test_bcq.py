"""Binary coding: the alternation's contract, its closed form, its size, and integers relabelled."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from planted import logits, tensors, write_recipe, write_text
from tiny import save_tiny

import rarefy
from rarefy import Calibration
from rarefy.checkpoint.load import load_model
from rarefy.errors import RarefyError
from rarefy.formats.base import stored_bytes
from rarefy.formats.bcq import BCQ, from_int
from rarefy.formats.integer import Int
from rarefy.rules import binary
from rarefy.runtime.packed import PackedLinear

if TYPE_CHECKING:
    from pathlib import Path


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(fmt: Any, W: torch.Tensor) -> float:
    return float((fmt.fit(W).round(W) - W).square().mean())


# The rule


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("start", ["greedy", "uniform"])
def test_no_half_step_raises_the_error(start: str, bits: int, offset: bool) -> None:
    W = normal(6, 96).unflatten(1, (3, 32)).double()
    h = torch.rand(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A = binary.greedy(W, h, bits) if start == "greedy" else binary.uniform(W, bits, offset)
    errors, before = [], A
    for found, claimed in binary.alternate(W, h, A, offset, 8):
        values = binary.sums(found)
        rounded = values.gather(-1, binary.nearest(W, values))
        true = ((rounded - W).square() * h).sum(-1)
        # After the first half-step the signs still are those of the scales before.
        assert bool((true <= claimed + 1e-9).all())
        errors.append(claimed)
        before = found
    for earlier, later in itertools.pairwise(errors):
        assert bool((later <= earlier + 1e-12).all())
    assert float(errors[-1].sum()) < 0.999 * float(errors[0].sum()) or bits == 1
    assert offset or not before[..., -1].any()


def test_least_squares_are_those_of_a_library() -> None:
    W, bits = normal(4, 40).double().unsqueeze(1), 3
    h = torch.rand(1, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    start = binary.greedy(W, h, bits)
    steps = binary.alternate(W, h, start, True, 1)
    next(steps)
    solved, _ = next(steps)
    codes = binary.nearest(W, binary.sums(start))
    for row in range(4):
        B = torch.cat([binary.signs(bits, W)[codes[row, 0]], torch.ones(40, 1).double()], 1)
        root = h[0].sqrt().unsqueeze(1)
        exact = torch.linalg.lstsq(B * root, (W[row, 0].unsqueeze(1) * root)).solution.squeeze(1)
        torch.testing.assert_close(solved[row, 0], exact, rtol=1e-7, atol=1e-9)


def test_nearest_finds_what_a_search_finds() -> None:
    A = normal(5, 4).abs().unsqueeze(1)
    W = normal(5, 50, 3).unsqueeze(1)
    values = binary.sums(A)
    codes = binary.nearest(W, values)
    distances = (W.unsqueeze(-1) - values.unsqueeze(-2)).abs()
    found = values.gather(-1, codes)
    assert torch.equal((W - found).abs(), distances.min(-1).values)
    signs = binary.signs(3, A)[codes]
    by_hand = A[..., -1:] + (signs * A[..., None, :3]).sum(-1)
    torch.testing.assert_close(found, by_hand)


def test_one_plane_is_the_closed_form() -> None:
    W = normal(8, 64)
    W[2, ::3] = 0
    for rule in ("alternating", "greedy"):
        fmt = BCQ(1, 32, offset=False, rule=rule, scale_dtype="float32")
        grid = fmt.fit(W)
        mean = W.unflatten(1, (2, 32)).abs().mean(-1)
        torch.testing.assert_close(grid.scale.squeeze(-1), mean, rtol=1e-6, atol=0)
        expected = torch.where(W < 0, -1.0, 1.0) * grid.scale.squeeze(-1).repeat_interleave(32, 1)
        assert torch.equal(grid.round(W)[W != 0], expected[W != 0])
        # A zero has one of the two signs, not none.
        assert torch.equal(grid.round(W).abs(), expected.abs())


def test_two_planes_of_four_values_lose_nothing() -> None:
    g = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (2, 6, 64), generator=g) * 2.0 - 1
    W = 0.75 * signs[0] + 0.25 * signs[1] + 0.125
    assert error(BCQ(2, 64), W) < 1e-12
    assert error(BCQ(2, 64, offset=False), W) > 1e-3


def test_errors_on_normal_weights_are_the_published_ones() -> None:
    W = normal(512, 512)
    greedy = {q: error(BCQ(q, 128, offset=False, rule="greedy"), W) for q in (2, 3, 4)}
    best = {q: error(BCQ(q, 128, offset=False), W) for q in (2, 3, 4)}
    offset = {q: error(BCQ(q, 128), W) for q in (2, 3, 4)}
    nearest = {q: error(Int(q, 128), W) for q in (2, 3, 4)}
    assert best[2] == pytest.approx(0.115, rel=0.03)
    assert best[3] == pytest.approx(0.035, rel=0.06)
    for q in (2, 3, 4):
        assert offset[q] < nearest[q]
        assert best[q] < 0.99 * greedy[q]
        assert offset[q] <= 1.001 * best[q]
    # The greedy start alone would lose to rounding at four bits.
    assert greedy[4] > nearest[4] > best[4]


def test_every_group_is_at_least_as_good_as_rounding() -> None:
    W = torch.distributions.StudentT(3.0).sample((64, 256)) * 0.02
    for bits in (2, 3, 4):
        ours, plain = BCQ(bits, 64), Int(bits, 64)
        mine = (ours.fit(W).round(W) - W).square().unflatten(1, (4, 64)).sum(-1)
        theirs = (plain.fit(W).round(W) - W).square().unflatten(1, (4, 64)).sum(-1)
        assert bool((mine <= 1.002 * theirs + 1e-9).all())
        assert float(mine.sum()) < 0.9 * float(theirs.sum())


def test_importance_moves_the_error_to_where_it_costs_less() -> None:
    W = normal(32, 64)
    h = torch.ones(64)
    h[:16] = 100
    fmt = BCQ(2, 64)
    plain, weighted = (fmt.fit(W, some).round(W) - W for some in (None, h))
    assert float((weighted.square() * h).sum()) < 0.9 * float((plain.square() * h).sum())
    assert float(weighted[:, :16].square().sum()) < 0.8 * float(plain[:, :16].square().sum())


# The layout


def test_a_plane_is_a_bit_a_weight_the_first_column_lowest() -> None:
    W = normal(5, 70)
    fmt = BCQ(3, 64, scale_dtype="float32")
    packed = fmt.fit(W).encode(W)
    octets = packed["weight_planes"].view(torch.uint8)
    value = torch.zeros(5, 70)
    for r in range(5):
        for j in range(70):
            value[r, j] = packed["weight_offset"][r, j // 64]
            for i in range(3):
                sign = 1 if octets[r, i, j // 8] >> (j % 8) & 1 else -1
                value[r, j] += sign * packed["weight_scale"][r, j // 64, i]
    torch.testing.assert_close(value, fmt.decode(packed), rtol=1e-6, atol=1e-6)
    scale = packed["weight_scale"]
    assert bool((scale[..., :-1] >= scale[..., 1:]).all())


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
@pytest.mark.parametrize(("bits", "offset"), [(1, False), (2, True), (3, False), (4, True)])
def test_size(shape: tuple[int, int], bits: int, offset: bool) -> None:
    fmt = BCQ(bits, 64, offset=offset, rounds=0)
    W = normal(*shape)
    stored = sum(t.nbytes for t in fmt.fit(W).encode(W).values())
    assert stored == stored_bytes(fmt, *shape)
    per_weight = bits + 16 * bits / 64 + (16 / 64 if offset else 0)
    assert stored - 16 == per_weight * W.numel() / 8


# Integers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 64), (4, 32), (4, None), (8, 40)])
def test_integers_relabelled_are_the_same_matrix(
    bits: int, group: int | None, symmetric: bool, dtype: str
) -> None:
    W = normal(13, 101) * 0.05
    fmt = Int(bits, group, symmetric, scale_dtype=dtype)
    grid = fmt.fit(W)
    ours, packed = from_int(fmt, grid.encode(W))
    assert ours.layout(13, 101).keys() == packed.keys()
    decoded = ours.decode(packed)
    size = group or 101
    scale = grid.scale.repeat_interleave(size, 1)[:, :101]
    zero = grid.zero.repeat_interleave(size, 1)[:, :101]
    assert torch.equal(decoded, scale * (grid.codes(W) - zero))
    assert torch.equal(decoded, grid.round(W))
    assert torch.equal(ours.stored_grid(packed).round(decoded), decoded)


def test_scales_too_small_to_halve_become_wider() -> None:
    fmt = Int(4, 32)
    for factor, wanted in ((1.0, "float16"), (1e-5, "float32")):
        W = normal(4, 64) * factor
        grid = fmt.fit(W)
        ours, packed = from_int(fmt, grid.encode(W))
        assert ours.scale_dtype == wanted
        exact = grid.scale.repeat_interleave(32, 1) * (
            grid.codes(W) - grid.zero.repeat_interleave(32, 1)
        )
        assert torch.equal(ours.decode(packed), exact)


def test_groups_that_no_table_fits_are_refused() -> None:
    fmt = Int(4, 12)
    with pytest.raises(RarefyError, match="multiple of 8 columns, not of 12"):
        from_int(fmt, fmt.fit(normal(2, 24)).encode(normal(2, 24)))
    with pytest.raises(ValueError, match="multiple of 8"):
        BCQ(3, 12)


def test_the_uniform_rule_is_rounding_to_nearest() -> None:
    W = normal(16, 128)
    ours = BCQ(3, 32, rule="uniform")
    rounded, plain = ours.fit(W).round(W), Int(3, 32).fit(W).round(W)
    torch.testing.assert_close(rounded, plain, rtol=2e-3, atol=2e-3)
    assert not rounded[:, :1].eq(0).all()
    assert torch.equal(ours.fit(W).round(torch.zeros_like(W)), torch.zeros_like(W))


# The model


def data(folder: Path) -> Calibration:
    return Calibration(str(write_text(folder)), sequences=4, length=32)


def test_gptq_relabelled_gives_the_same_logits(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    scheme = {"*": {"format": "int", "bits": 3, "group": 32}}
    recipe = write_recipe(tmp_path, {"solver": "gptq", "schemes": scheme})
    out = rarefy.compress(source, recipe, tmp_path / "out", calibration=data(tmp_path)).path
    ids = torch.arange(2 * 24).view(2, 24) * 37 % 251
    with torch.no_grad():
        model = load_model(out)
        before = model(ids).logits
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]
        assert len(layers) == 3 * 7
        for name, layer in layers:
            assert isinstance(layer.fmt, Int)
            fmt, packed = from_int(layer.fmt, layer.tensors())
            other = PackedLinear(fmt, layer.shape, layer.bias)
            for suffix, tensor in packed.items():
                setattr(other, suffix, tensor)
            model.set_submodule(name, other)
        after = model(ids).logits
    # Integer weights are rounded to 16 bits once more, sums of planes are not.
    assert float((after - before).norm() / before.norm()) < 1e-3
    with torch.no_grad():
        dense = load_model(source)(ids).logits
    assert float((after - before).norm()) < 0.01 * float((dense - before).norm())


@pytest.mark.parametrize("preset", ["bcq3-g64", "gptq-bcq3-g64"])
def test_presets_store_planes_and_open_to_the_same_logits(preset: str, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    out = rarefy.compress(source, preset, tmp_path / "out", calibration=data(tmp_path))
    assert {node["format"] for node in out.manifest["nodes"]} == {"bcq3 g64"}
    stored = tensors(out.path)
    assert sum(name.endswith("weight_planes") for name in stored) == 3 * 7
    first = logits(out.path)
    load_model(out.path).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), first)
    relative = (first - logits(source)).square().mean() / logits(source).square().mean()
    assert 0 < float(relative) < 0.6
