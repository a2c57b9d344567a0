"""Blocks of ggml: bytes against golden blocks and the gguf package, scales against exact search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from rarefy.export import blocks, kquants
from rarefy.export.gguf import encode
from rarefy.export.regrid import exact_blocks, exact_type
from rarefy.formats.bilevel import Bilevel
from rarefy.formats.ggml import TYPES, Ggml
from rarefy.formats.integer import Int
from rarefy.rules.blocks import Levels, affine, symmetric, weights_of

RAMP = (torch.arange(32) - 15.5) / 8
# Of the ramp, as ggml's own encoder writes it.
GOLDEN = {
    "q4_0": "c033809191a2a2b3b3c4c4d5d5e6e6f7f7f8",
    "q4_1": "2234c0bf80809191a2a2b3b3c4c4d5d5e6e6f7f7",
    "q5_0": "c02f0000ffff102132435465768798a9bacbdcedfeff",
    "q5_1": "0030c0bf0000ffff00112233445566778899aabbccddeeff",
    "q8_0": "d0238189919aa2aab2bac3cbd3dbe3ecf4fc040c141d252d353d464e565e666f777f",
}


def kind(name: str) -> Any:
    return GGMLQuantizationType[name.upper()]


def decoded(octets: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(octets, kind(name)))


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, as trained matrices are."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g) * 0.05
    return W * torch.empty(rows, columns).exponential_(generator=g).add_(0.3)


def importance(columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(columns, generator=g).mul(1.5).exp()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_blocks(name: str) -> None:
    block = TYPES[name]
    top = block.levels.high - block.levels.low
    if block.minimum:
        scale, minimum = (RAMP.max() - RAMP.min()) / top, RAMP.min().reshape(1, 1)
        codes = ((RAMP - minimum) / scale + 0.5).floor()
    elif name == "q8_0":
        scale, minimum = RAMP.abs().max() / 127, None
        units = RAMP / scale
        codes = units.sign() * (units.abs() + 0.5).floor() + 128
    else:
        scale, minimum = RAMP[0] / block.levels.low, None
        codes = (RAMP / scale - block.levels.low + 0.5).floor().clamp(max=top)
    found = blocks.small(codes.reshape(1, 32).long(), scale.reshape(1, 1), minimum, block.bits)
    assert found.tobytes().hex() == GOLDEN[name]


@pytest.mark.parametrize("name", TYPES)
def test_gguf_decodes_what_the_format_decodes(name: str) -> None:
    W, fmt = weights(7, 96), Ggml(name)
    grid = fmt.fit(W, importance(96))
    rounded = grid.round(W)
    assert torch.equal(decoded(encode(name, W, importance(96)), name), rounded)
    assert torch.equal(decoded(exact_blocks(fmt, grid.encode(W))[0], name), rounded)


@pytest.mark.parametrize("name", kquants.TYPES)
def test_super_blocks_lie_where_gguf_looks_for_them(name: str) -> None:
    """Random codes and steps, decoded by the gguf package, against the formula."""
    spec, g = kquants.TYPES[name], torch.Generator().manual_seed(1)
    rows, subs = 3, 2 * 256 // spec.sub
    low, high = spec.levels.low, spec.levels.high
    q = torch.randint(low, high + 1, (rows, subs, spec.sub), generator=g)
    s = torch.randint(spec.steps[0], spec.steps[1] + 1, (rows, subs), generator=g)
    t = torch.randint(0, spec.steps[1] + 1, (rows, subs), generator=g)
    d, e = (torch.rand(rows, 2, generator=g).half().float() for _ in range(2))
    spread = 256 // spec.sub
    expected = (d.repeat_interleave(spread, 1) * s).unsqueeze(-1) * q
    codes = (q - low).reshape(rows, 512)
    if spec.minimum:
        expected = expected - (e.repeat_interleave(spread, 1) * t).unsqueeze(-1)
        if name == "q2_k":
            octets = blocks.q2_k(codes, (s, t), (d, e))
        else:
            octets = blocks.q45_k(codes, (s, t), (d, e), 4 if name == "q4_k" else 5)
    else:
        octets = (blocks.q3_k if name == "q3_k" else blocks.q6_k)(codes, s, d)
    assert torch.equal(decoded(octets, name), expected.reshape(rows, 512))


def error(W: torch.Tensor, values: torch.Tensor, w: torch.Tensor | None = None) -> float:
    squares = (W - values).square()
    return float((squares if w is None else squares * w).sum())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_search_beats_the_encoder_of_the_gguf_package(name: str) -> None:
    W = weights(40, 256)
    theirs = decoded(quantize(W.numpy(), kind(name)), name)
    ours = decoded(encode(name, W), name)
    assert error(W, ours) < (0.999 if name == "q8_0" else 0.95) * error(W, theirs)


@pytest.mark.parametrize("name", [*TYPES, *kquants.TYPES])
def test_importance_moves_error_to_columns_that_do_not_matter(name: str) -> None:
    W, w = weights(20, 256), importance(256)
    plain, weighted = decoded(encode(name, W), name), decoded(encode(name, W, w), name)
    assert error(W, weighted, w) < 0.97 * error(W, plain, w)
    assert error(W, plain) < error(W, weighted)


def test_more_bits_lose_less() -> None:
    W = weights(20, 256)
    errors = [error(W, decoded(encode(n, W), n)) for n in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")]
    assert all(after < 0.4 * before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_shared_scales_cost_little(name: str) -> None:
    """Against blocks of the same bits with scales and minima of their own."""
    W = weights(20, 512)
    own = "q4_1" if name == "q4_k" else "q5_1"
    free, shared = (error(W, decoded(encode(n, W), n)) for n in (own, name))
    assert shared < 1.12 * free


def test_symmetric_scales_are_nearly_those_of_exact_search() -> None:
    x, levels = weights(30, 32), Levels(-8, 7)
    w = weights_of(importance(32), x)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        units = levels.nearest(x / scale.unsqueeze(-1))
        return (w * (x - units * scale.unsqueeze(-1)).square()).sum(-1)

    peak = x.abs().amax(-1)
    tried = [loss(sign * peak / reach) for sign in (1, -1) for reach in np.linspace(4, 14, 4000)]
    exact = torch.stack(tried).amin(0)
    found = loss(symmetric(x, w, levels))
    assert float((found / exact).mean()) < 1.02
    assert float((found / exact).max()) < 1.25


def test_minima_that_may_not_be_positive_are_not() -> None:
    x = weights(30, 32).abs() + 0.1
    scale, minimum = affine(x, weights_of(None, x), 15, below=True)
    assert float(minimum.max()) <= 0
    assert float(affine(x, weights_of(None, x), 15)[1].min()) > 0
    assert bool((scale > 0).all())


@pytest.mark.parametrize("name", [*TYPES, *kquants.TYPES])
@pytest.mark.parametrize("special", ["zero", "constant", "negative", "spike", "tiny"])
def test_awkward_blocks(name: str, special: str) -> None:
    W = {
        "zero": torch.zeros(2, 256),
        "constant": torch.full((2, 256), 0.37),
        "negative": -weights(2, 256).abs() - 0.1,
        "spike": torch.nn.functional.one_hot(torch.tensor([3, 200]), 256) * 60.0,
        "tiny": weights(2, 256) * 1e-9,
    }[special]
    values = decoded(encode(name, W, torch.zeros(256)), name)
    assert torch.isfinite(values).all()
    assert error(W, values) <= 0.35 * float(W.square().sum()) + 1e-12


INTS = [
    (Int(4, group=32, symmetric=True), "q4_0"),
    (Int(4, group=64, symmetric=True), "q4_0"),
    (Int(2, group=32), "q4_0"),
    (Int(3, group=96), "q4_0"),
    (Int(5, symmetric=True), "q5_0"),
    (Int(8, symmetric=True), "q8_0"),
    (Int(7, group=32), "q8_0"),
    (Int(4, group=32, symmetric=True, scale_dtype="bfloat16"), "q4_0"),
]


@pytest.mark.parametrize(
    ("fmt", "name"), INTS, ids=lambda x: x if isinstance(x, str) else x.label()
)
def test_integers_keep_their_codes(fmt: Int, name: str) -> None:
    W = weights(5, 192)
    packed = fmt.fit(W).encode(W)
    assert exact_type(fmt, 192, packed) == name
    octets, moved = exact_blocks(fmt, packed)
    assert moved == 0
    assert torch.equal(decoded(octets, name), fmt.decode(packed))


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (Int(4, group=64), "q4_1"),
        (Int(5, group=64), "q5_1"),
        (Bilevel(3), "q4_1"),
        (Bilevel(4, 64, scale_bits=3, zero_bits=6), "q4_1"),
        (Bilevel(5), "q5_1"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.label(),
)
def test_zero_points_become_minima_within_float16(fmt: Int | Bilevel, name: str) -> None:
    W = weights(5, 192)
    packed = fmt.fit(W).encode(W)
    assert exact_type(fmt, 192, packed) == name
    octets, moved = exact_blocks(fmt, packed)
    assert 0 < moved < 0.02
    assert fmt.group is not None
    steps = fmt.stored_grid(packed).scale.repeat_interleave(fmt.group, 1)
    apart = (decoded(octets, name) - fmt.decode(packed)).abs() / steps
    assert float(apart.max()) < moved + 0.01


def test_what_no_block_type_holds() -> None:
    W = weights(4, 96)
    for fmt in (Int(8, group=32), Int(4, group=48), Int(4, group=16)):
        assert exact_type(fmt, 96, fmt.fit(W).encode(W)) is None
    fmt = Int(4, symmetric=True, scale_dtype="bfloat16")
    assert exact_type(fmt, 96, fmt.fit(W * 1e-6).encode(W * 1e-6)) is None
