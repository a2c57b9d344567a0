"""LLM.int8(): exact integers, the threshold's two ends, planted outliers, dynamic channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from planted import logits, planted, write_text
from test_kernels_lut import compiled, normal, off
from tiny import save_tiny

import rarefy
from rarefy import Calibration
from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.state import read_state
from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.llm_int8 import INNER, LLMInt8
from rarefy.kernels import mixed
from rarefy.runtime.packed import PackedLinear

if TYPE_CHECKING:
    from pathlib import Path

INT8 = Int(8, symmetric=True)
NEVER = LLMInt8(threshold=1e9)


def weights(rows: int = 48, columns: int = 96) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    W = normal(rows, columns) * 0.05
    return W, INT8.fit(W).encode(W)


def tokens(count: int = 40, columns: int = 96, seed: int = 1) -> torch.Tensor:
    return normal(count, columns, seed=seed).clamp(-4, 4)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return off(y, exact.double())


def test_integer_sums_are_those_of_float64() -> None:
    for columns in (96, 2000):
        _, packed = weights(columns=columns)
        codes, _ = INNER.codes(tokens(columns=columns))
        q = mixed.signed_codes(INT8, packed)
        assert int(q.min()) >= -128 and int(q.max()) <= 127
        exact = codes.double() @ q.double().T
        assert torch.equal(mixed.accumulate(codes, q).double(), exact)
        assert torch.equal(exact, (codes.int().unsqueeze(1) * q.int()).sum(-1).double())


def test_without_outliers_it_is_the_vector_wise_product() -> None:
    _, packed = weights()
    x = 10 * tokens()
    codes, scale = IntActivation().codes(x)
    q = mixed.signed_codes(INT8, packed).double()
    plain = codes.double() @ q.T * scale.double() * packed["weight_scale"].double().T
    assert relative(mixed.mixed_product(x, INT8, packed, NEVER), plain) < 1e-6
    assert torch.equal(NEVER.round(x), IntActivation().round(x))
    assert relative(mixed.mixed_product(x, INT8, packed, LLMInt8()), plain) > 1e-3


def test_with_nothing_but_outliers_it_is_the_float_product() -> None:
    W, packed = weights()
    x, always = tokens(), LLMInt8(threshold=1e-6)
    assert bool(always.outliers(x).all())
    kept = mixed.mixed_product(x, INT8, packed, always, kept=W)
    assert relative(kept, x.double() @ W.double().T) < 1e-6
    stored = mixed.mixed_product(x, INT8, packed, always)
    assert relative(stored, x.double() @ INT8.decode(packed).double().T) < 1e-6
    assert torch.equal(always.round(x), x)


def test_a_planted_outlier_costs_only_the_plain_product() -> None:
    W, packed = weights()
    x = tokens()
    calm = relative(mixed.mixed_product(x, INT8, packed, LLMInt8()), x.double() @ W.double().T)
    loud = x.clone()
    loud[:, 17] = 60 * torch.sign(x[:, 17])
    exact = loud.double() @ W.double().T
    apart = relative(mixed.mixed_product(loud, INT8, packed, LLMInt8()), exact)
    plain = relative(mixed.mixed_product(loud, INT8, packed, NEVER), exact)
    assert LLMInt8().outliers(loud).nonzero().tolist() == [[17]]
    assert apart <= 1.1 * calm
    # Errors beside the channel's own share, which is large in itself.
    rest = (loud.double() @ W.double().T - 0).norm() / (x.double() @ W.double().T).norm()
    assert plain * float(rest) > 5 * calm


def test_outlier_channels_depend_on_the_batch() -> None:
    rounding, first, second = LLMInt8(), tokens(4), tokens(4, seed=2)
    first[1, 3] = 7.0
    second[2, 9] = -6.0
    assert rounding.outliers(first).nonzero().flatten().tolist() == [3]
    assert rounding.outliers(second).nonzero().flatten().tolist() == [9]
    together = rounding.round(torch.cat([first, second]))
    assert torch.equal(together[:, [3, 9]], torch.cat([first, second])[:, [3, 9]])
    assert not torch.equal(rounding.round(second)[:, 3], second[:, 3])
    # So a token's result depends on its neighbours, which plain rounding by token does not.
    assert not torch.equal(together[4:], rounding.round(second))
    assert torch.equal(rounding.outliers(first.view(2, 2, -1)), rounding.outliers(first))


def test_lower_thresholds_lose_less_with_kept_weights() -> None:
    W, packed = weights(columns=128)
    g = torch.Generator().manual_seed(4)
    # Inputs of a down projection: heavy tails, of channels unlike in size.
    x = normal(200, 128, seed=5) ** 3 * torch.rand(128, generator=g).exp()
    exact = x.double() @ W.double().T
    errors = [
        relative(mixed.mixed_product(x, INT8, packed, LLMInt8(threshold=t), kept=W), exact)
        for t in (200.0, 20.0, 6.0, 2.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    stored = relative(mixed.mixed_product(x, INT8, packed, LLMInt8(2.0)), exact)
    assert stored > errors[-1]


def test_columns_are_those_of_the_decoded_matrix() -> None:
    W = normal(9, 101)
    columns = torch.tensor([0, 7, 100, 50])
    for fmt in (INT8, Int(8, group=40), Int(8, group=16, scale_dtype="bfloat16"), Int(4, group=16)):
        packed = fmt.fit(W).encode(W)
        found = mixed.decode_columns(fmt, packed, columns)
        assert torch.equal(found, fmt.decode(packed)[:, columns])


def test_gradients_pass_the_rounding() -> None:
    rounding, x = LLMInt8(), tokens(5).requires_grad_(True)
    with torch.no_grad():
        x[0, 2] = 9.0
    y = rounding.soft(x)
    torch.testing.assert_close(y, rounding.round(x))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, 2], torch.ones(5))
    assert float(x.grad.mean()) == pytest.approx(1, abs=0.2)


def test_bad_thresholds_and_stored_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold must be positive"):
        LLMInt8(threshold=0.0)
    with pytest.raises(RarefyError, match="while it runs"):
        LLMInt8().scale(torch.ones(3))


@compiled
def test_a_layer_runs_the_mixed_product() -> None:
    _, packed = weights()
    bias = torch.nn.Parameter(normal(48, seed=7))
    layer = PackedLinear(INT8, (48, 96), bias, LLMInt8())
    for suffix, tensor in packed.items():
        setattr(layer, suffix, tensor)
    assert layer.kernel.startswith("int8 x int8 and fp32")
    x = tokens().view(4, 10, 96)
    x[1, 2, 30] = -25.0
    exact = mixed.mixed_product(x, INT8, packed, LLMInt8()) + bias
    with torch.no_grad():
        y = layer(x)
    assert relative(y, exact) < 1e-5
    # What the reference runs differs by the rounding of stored weights to 16 bits only.
    rounded = LLMInt8().round(x) @ INT8.decode(packed).T + bias
    assert relative(y, rounded) < 5e-4


def test_the_preset_keeps_a_planted_model_alive(tmp_path: Path) -> None:
    source = planted("llama", tmp_path, 60.0)
    data = Calibration(str(write_text(tmp_path)), sequences=2, length=16)
    results = {}
    for preset in ("rtn-w8a8", "llm-int8"):
        out = rarefy.compress(source, preset, tmp_path / preset, calibration=data)
        results[preset] = float((logits(out.path) - logits(source)).square().mean())
    assert set(read_state(out.path).inputs.values()) == {LLMInt8()}
    assert results["llm-int8"] < 0.5 * results["rtn-w8a8"]
    first = logits(out.path)
    load_model(out.path).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), first)


def test_an_ordinary_model_hardly_changes(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    data = Calibration(str(write_text(tmp_path)), sequences=2, length=16)
    out = rarefy.compress(source, "llm-int8", tmp_path / "out", calibration=data)
    assert {node["format"] for node in out.manifest["nodes"]} == {"int8 row sym"}
    assert relative(logits(out.path), logits(source)) < 0.05
