"""Rounded activations: what is stored is what runs, and it is what integers would compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from planted import IDS, logits, tensors, write_recipe, write_text
from tiny import save_tiny
from torch.nn import functional as F

import rarefy
from rarefy import Calibration
from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.state import read_state
from rarefy.data import corpora
from rarefy.data.tokens import calibration
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.evaluate.run import evaluate
from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.packing import unpack
from rarefy.recipe import parse_recipe
from rarefy.runtime import packed
from rarefy.runtime.packed import PackedLinear, hold_dense

if TYPE_CHECKING:
    from pathlib import Path

ROW8 = {"format": "int", "bits": 8, "symmetric": True}
TOKEN8 = {"format": "int", "bits": 8}
STATIC8 = {"format": "int", "bits": 8, "per": "tensor", "dynamic": False}
W8A8 = {"solver": "nearest", "schemes": {"*": ROW8 | {"input": TOKEN8}}}
W8A8_STATIC = {"solver": "nearest", "schemes": {"*": ROW8 | {"input": STATIC8}}}
DYNAMIC = IntActivation()
PER_TENSOR = IntActivation(per="tensor")
STATIC = IntActivation(per="tensor", dynamic=False)


def data(folder: Path) -> Calibration:
    return Calibration(str(write_text(folder)), sequences=6, length=32)


def rows(folder: Path) -> torch.Tensor:
    """The token rows that calibration reads."""
    tokenizer, wanted = load_tokenizer(folder / "dense"), data(folder)
    corpus = corpora.load(wanted.text, tokenizer)
    return calibration(corpus, tokenizer, wanted.sequences, wanted.length, wanted.seed).ids


def compressed(folder: Path, *stages: dict[str, Any], family: str = "llama") -> Path:
    source = folder / "dense"
    if not source.exists():
        save_tiny(family, source)
    name = f"out{len(list(folder.iterdir()))}"
    recipe = write_recipe(folder, *stages, name=name)
    return rarefy.compress(source, recipe, folder / name, calibration=data(folder)).path


def activations(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 10, 32, generator=g) * torch.randn(3, 10, 1, generator=g).exp()


# The rounding


def test_one_scale_for_each_token() -> None:
    x = activations()
    rounded = DYNAMIC.round(x)
    for c in (0.01, 3.0, 1024.0):
        louder = x.clone()
        louder[1, 4] *= c
        found = DYNAMIC.round(louder)
        expected = rounded.clone()
        expected[1, 4] *= c
        torch.testing.assert_close(found[1, 4], expected[1, 4], rtol=1e-6, atol=0)
        found[1, 4] = expected[1, 4]
        assert torch.equal(found, expected)
    peaks = x.abs().amax(-1)
    assert bool(((rounded - x).abs() <= 0.501 * peaks[..., None] / 127).all())


def test_one_scale_for_the_tensor() -> None:
    x = activations()
    step = float(x.abs().max()) / 127
    codes = PER_TENSOR.round(x) / step
    torch.testing.assert_close(codes, (x / step).round(), rtol=1e-5, atol=1e-5)
    louder = x.clone()
    louder[1, 4] *= 100
    assert not torch.equal(PER_TENSOR.round(louder)[0], PER_TENSOR.round(x)[0])


def test_a_static_scale_clips_what_is_louder_than_calibration() -> None:
    x = activations()
    scale = STATIC.scale(x.abs().flatten(0, 1).amax(0))
    assert float(scale) == pytest.approx(float(x.abs().max()) / 127)
    torch.testing.assert_close(STATIC.round(x, scale), PER_TENSOR.round(x))
    found = STATIC.round(100 * x, scale)
    assert float(found.max()) == pytest.approx(127 * float(scale))
    assert float(found.min()) == pytest.approx(-128 * float(scale))


def test_a_static_scale_for_each_token_is_refused() -> None:
    scheme = ROW8 | {"input": {"format": "int", "dynamic": False}}
    with pytest.raises(RarefyError, match="a scale for each token is always dynamic"):
        parse_recipe({"stages": [{"solver": "nearest", "schemes": {"*": scheme}}]}, "trial")


# The layer


def integer_product(
    layer: PackedLinear, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer as int32 GEMM of the stored codes, scales afterwards; then codes and scales."""
    fmt, stored = layer.fmt, layer.tensors()
    assert isinstance(fmt, Int) and isinstance(layer.rounding, IntActivation)
    m, n = layer.shape
    q = unpack(stored["weight_packed"], fmt.bits, n).to(torch.int32)
    zero = torch.full((m, 1), 1 << (fmt.bits - 1), dtype=torch.int32)
    if not fmt.symmetric:
        zero = unpack(stored["weight_zero_point"].T.contiguous(), fmt.bits, m).T.to(torch.int32)
    xq, xs = layer.rounding.codes(x, layer.input_scale)
    xi = xq.to(torch.int32)
    assert torch.equal(xi.to(xq), xq)
    assert int(xi.min()) >= -128
    assert int(xi.max()) <= 127
    sums = (xi.flatten(0, -2) @ (q - zero).T).view(*x.shape[:-1], m)
    scales = stored["weight_scale"].double().T
    y = sums.double() * scales * xs.double()
    sizes = xi.abs().double() @ (q - zero).abs().double().T * scales * xs.double()
    return (y if layer.bias is None else y + layer.bias), sizes, scales


@pytest.mark.parametrize("stage", [W8A8, W8A8_STATIC])
def test_a_layer_computes_what_integers_would(stage: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(compressed(tmp_path, stage, family="qwen2"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        x = activations(1)[..., :1] * torch.randn(
            3, 10, layer.shape[1], generator=torch.Generator().manual_seed(2)
        )
        exact, sizes, _ = integer_product(layer, x)
        # A stored weight is scale times code rounded to 16 bits, by at most 2^-11 of itself.
        off = (layer(x).double() - exact).abs()
        assert bool((off <= 2**-11 * sizes + 1e-5 * exact.abs().max()).all()), name
        assert float(off.square().mean().sqrt() / exact.square().mean().sqrt()) < 5e-4, name


@pytest.mark.parametrize("rounding", [DYNAMIC, PER_TENSOR, STATIC])
def test_where_scales_are_powers_of_two_it_is_exactly_integers(rounding: IntActivation) -> None:
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (20, 32), generator=g)
    codes[:, 0], codes[:, 1] = -128, 127
    W = codes * 2.0 ** torch.randint(-9, -5, (20, 1), generator=g)
    fmt = Int(8)
    grid = fmt.fit(W)
    assert torch.equal(grid.round(W), W)
    x = activations(4)
    bias = torch.nn.Parameter(torch.randn(20, generator=g))
    layer = PackedLinear(fmt, (20, 32), bias, rounding)
    for name, tensor in grid.encode(W).items():
        setattr(layer, name, tensor)
    if rounding.static:
        layer.input_scale = rounding.scale(0.7 * x.abs().flatten(0, 1).amax(0))
    exact, _, _ = integer_product(layer, x)
    found = layer(x).double()
    assert float((found - exact).abs().max() / exact.abs().max()) <= 1e-5
    plain = F.linear(x, W, bias).double()
    assert float((plain - exact).abs().max() / exact.abs().max()) > 1e-3


# The model


def test_a_static_scale_is_that_of_the_compressed_model(tmp_path: Path) -> None:
    """What calibration saw is what the result sees: earlier groups rounded, inputs included."""
    out = compressed(tmp_path, W8A8_STATIC)
    model = load_model(out)
    hold_dense(model)  # calibration saw decoded weights; sums of integers differ a little
    peaks: dict[str, float] = {}

    def watch(name: str) -> Any:
        def enter(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            peaks[name] = float(args[0].abs().max())

        return enter

    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(rows(tmp_path), use_cache=False)
    assert len(layers) == 3 * 7
    for name, layer in layers.items():
        assert layer.input_scale is not None
        assert float(layer.input_scale) == pytest.approx(peaks[name] / 127, rel=1e-4), name


@pytest.mark.parametrize("stage", [W8A8, W8A8_STATIC])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_saved_model_opens_to_the_same_logits(
    stage: dict[str, Any], family: str, tmp_path: Path
) -> None:
    out = compressed(tmp_path, stage, family=family)
    first = logits(out)
    load_model(out).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), first)
    scales = {n: t for n, t in tensors(out).items() if n.endswith("input_scale")}
    assert bool(scales) == (stage is W8A8_STATIC)
    again = tensors(tmp_path / "again")
    assert all(torch.equal(again[n], t) for n, t in scales.items())


@pytest.mark.parametrize("stage", [W8A8, W8A8_STATIC])
def test_the_folder_runs_as_the_formats_say(stage: dict[str, Any], tmp_path: Path) -> None:
    """The dense model with decoded matrices and rounded inputs, put together by hand."""
    out = compressed(tmp_path, stage)
    model, stored, state = load_model(tmp_path / "dense"), tensors(out), read_state(out)
    assert state.formats.keys() == state.inputs.keys()
    skeleton = Skeleton(Checkpoint(out), torch.device("cpu"))

    def rounding(name: str) -> Any:
        def enter(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (state.inputs[name].round(args[0], stored.get(f"{name}.input_scale")),)

        return enter

    for name in state.inputs:
        linear = model.get_submodule(name)
        linear.weight.data = skeleton.read(f"{name}.weight")
        linear.register_forward_pre_hook(rounding(name))
    ours = load_model(out)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        by_kernels = ours(IDS, use_cache=False).logits
        hold_dense(ours)
        assert torch.equal(ours(IDS, use_cache=False).logits, expected)
    # Sums of integers leave out the rounding of each weight to 16 bits, and codes of inputs flip.
    assert float((by_kernels - expected).norm() / expected.norm()) < 5e-2


def test_what_is_evaluated_is_the_rounded_model(tmp_path: Path) -> None:
    found = {}
    for bits in (None, 8, 4, 2):
        scheme = ROW8 if bits is None else ROW8 | {"input": {"format": "int", "bits": bits}}
        out = compressed(tmp_path, {"solver": "nearest", "schemes": {"*": scheme}})
        text = str(write_text(tmp_path))
        result = evaluate(out, tmp_path / "dense", text=text, sequences=4, length=32, speed=False)
        found[bits] = result.quality.kl_mean.value
    assert 0 < found[None] < found[8] < 0.2 * found[4]
    assert found[4] < 0.5 * found[2]


def test_calibrated_solvers_work_with_rounded_inputs(tmp_path: Path) -> None:
    scheme = {"format": "int", "bits": 4, "group": 32, "input": STATIC8}
    solve = [{"solver": name, "schemes": {"*": scheme}} for name in ("nearest", "gptq")]
    smooth = {"transform": "smoothquant", "inner": True}
    stages = {"nearest": solve[:1], "gptq": solve[1:], "smooth gptq": [smooth, solve[1]]}
    folders = {name: compressed(tmp_path, *some) for name, some in stages.items()}
    ids = rows(tmp_path)
    with torch.no_grad():
        dense = load_model(tmp_path / "dense")(ids).logits
        errors = {
            name: float((load_model(folder)(ids).logits - dense).square().mean())
            for name, folder in folders.items()
        }
    assert errors["gptq"] < 0.8 * errors["nearest"], errors
    assert errors["smooth gptq"] < 0.8 * errors["nearest"], errors


@pytest.mark.parametrize(
    ("preset", "methods", "weight", "rounding"),
    [
        ("rtn-w8a8", ["nearest"], "int8 row sym", DYNAMIC),
        ("rtn-w4a8", ["nearest"], "int4 g64", DYNAMIC),
        ("rtn-w4a8-g64", ["nearest"], "int4 g64", IntActivation(per="group")),
        ("smoothquant-w8a8", ["smoothquant", "nearest"], "int8 row sym", DYNAMIC),
        ("smoothquant-gptq-w8a8", ["smoothquant", "gptq"], "int8 row sym", DYNAMIC),
        ("smoothquant-gptq-w4a8", ["smoothquant", "gptq"], "int4 g64", DYNAMIC),
        ("awq-int4-g64", ["awq", "awq-clip"], "int4 g64", None),
        ("awq-int3-g64", ["awq", "awq-clip"], "int3 g64", None),
        ("awq-gptq-int4-g64", ["awq", "gptq"], "int4 g64", None),
    ],
)
def test_presets_do_what_their_names_say(
    preset: str, methods: list[str], weight: str, rounding: IntActivation | None, tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    out = rarefy.compress(source, preset, tmp_path / "out", calibration=data(tmp_path))
    assert [stage["name"] for stage in out.manifest["history"]] == methods
    assert {node["format"] for node in out.manifest["nodes"]} == {weight}
    assert len(out.manifest["nodes"]) == 3 * 7
    assert set(read_state(out.path).inputs.values()) == ({rounding} if rounding else set())
    error = (logits(out.path) - logits(source)).square().mean() / logits(source).square().mean()
    assert 0 < error < 0.5
    assert sorted(p.name for p in tmp_path.iterdir() if "stage" in p.name) == []


@pytest.mark.parametrize("stage", [W8A8, W8A8_STATIC])
def test_a_held_copy_gives_the_same_logits_without_decoding(
    stage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(compressed(tmp_path, stage))
    ids = rows(tmp_path)[:, :32]
    monkeypatch.setattr(packed, "runs_on", lambda *_: False)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        hold_dense(model)
        monkeypatch.setattr(PackedLinear, "dense", None)
        after = model(ids, use_cache=False).logits
    assert torch.equal(before, after)
