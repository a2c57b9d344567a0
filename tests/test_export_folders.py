"""GPTQ, AWQ and compressed-tensors folders: decoded from the layouts' own rules, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import rarefy
from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.export import gptq as module
from rarefy.export.awq import _words
from rarefy.export.compressed_tensors import fp8

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = (torch.arange(2 * 24) * 37 % 251).view(2, 24)
INT = {"format": "int", "bits": 4, "group": 32}
INPUT = {"format": "int", "bits": 8}
W8A8 = {"format": "int", "bits": 8, "symmetric": True, "input": INPUT}


def compressed(
    folder: Path, schemes: dict[str, Any], family: str = "llama", **options: Any
) -> Path:
    dense = save_tiny(family, folder / "dense", torch.float16, **options)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": schemes}]}, sort_keys=False)
    )
    text = folder / "text.txt"
    text.write_text("a stone that rolls gathers no moss, " * 100)
    data = rarefy.Calibration(str(text), 2, 32)
    return rarefy.compress(dense, recipe, folder / "packed", calibration=data).path


def ours(folder: Path) -> dict[str, torch.Tensor]:
    """Every compressed matrix as rarefy decodes it, by stored name, in the readers' float16."""
    skeleton = Skeleton(Checkpoint(folder), torch.device("cpu"), factored=False)
    return {
        skeleton.stored_name(name): fmt.decode(skeleton.packed(name)).half()
        for name, fmt in skeleton.earlier.items()
    }


def bits_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of a little-endian bit stream along the last axis."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    return stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))


def read_gptq(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """W [out, in] by the rules of the first GPTQ layout."""
    codes = bits_of(tensors[f"{name}.qweight"].numpy().T, bits).T  # [in, out]
    zeros = bits_of(tensors[f"{name}.qzeros"].numpy(), bits) + 1  # [G, out]
    index = tensors[f"{name}.g_idx"].numpy()
    scales = tensors[f"{name}.scales"].numpy()
    W = scales[index] * (codes - zeros[index]).astype(np.float16)
    return torch.from_numpy(np.ascontiguousarray(W.T))


def read_awq(tensors: dict[str, torch.Tensor], name: str, group: int) -> torch.Tensor:
    """W [out, in] by the rules of AWQ's gemm layout."""

    def unpack(words: np.ndarray) -> np.ndarray:
        found = np.zeros((*words.shape, 8), dtype=np.int64)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            found[..., column] = words.view(np.uint32) >> np.uint32(4 * place) & 15
        return found.reshape(words.shape[0], -1)

    codes, zeros = (unpack(tensors[f"{name}.{part}"].numpy()) for part in ("qweight", "qzeros"))
    scales = tensors[f"{name}.scales"].numpy()
    index = np.arange(len(codes)) // group
    W = scales[index] * (codes - zeros[index]).astype(np.float16)
    return torch.from_numpy(np.ascontiguousarray(W.T))


@pytest.mark.parametrize(
    "scheme",
    [
        *({**INT, "bits": bits} for bits in (2, 3, 4, 8)),
        {**INT, "symmetric": True},
        {"format": "int", "bits": 3, "symmetric": True},
    ],
    ids=str,
)
def test_gptq_decodes_to_our_values(scheme: dict[str, Any], tmp_path: Path) -> None:
    packed = compressed(tmp_path, {"*.0.*": "keep", "*": scheme})
    out = rarefy.export(packed, tmp_path / "gptq", format="gptq")
    tensors = load_file(out / "model.safetensors")
    expected = ours(packed)
    assert len(expected) == 14
    for name, W in expected.items():
        assert torch.equal(read_gptq(tensors, name, scheme["bits"]), W)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    assert (config["bits"], config["sym"]) == (scheme["bits"], scheme.get("symmetric", False))
    assert config["group_size"] == scheme.get("group", -1)
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in config["dynamic"]
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)


def test_gptq_of_symmetric_zeros_has_the_known_word(tmp_path: Path) -> None:
    packed = compressed(tmp_path, {"*": {**INT, "symmetric": True}})
    out = rarefy.export(packed, tmp_path / "gptq", format="gptq")
    zeros = load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.qzeros"]
    assert set(zeros.flatten().tolist()) == {0x77777777}


def one_sided(folder: Path, top: bool) -> None:
    """Make a group of a dense checkpoint non-negative, so that its zero point is 0."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    W = tensors["model.layers.0.mlp.up_proj.weight"]
    W[5, :32] = torch.linspace(0, 1, 32) if top else 0
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("top", [False, True])
def test_gptq_cannot_say_zero(top: bool, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "d", torch.float16)
    one_sided(dense, top)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": {"*": INT}}]}))
    packed = rarefy.compress(dense, recipe, tmp_path / "packed").path
    if top:
        with pytest.raises(RarefyError, match=r"up_proj has a group whose zero point is 0"):
            rarefy.export(packed, tmp_path / "gptq", format="gptq")
        assert not list(tmp_path.glob("gptq*"))
        return
    out = rarefy.export(packed, tmp_path / "gptq", format="gptq")
    tensors = load_file(out / "model.safetensors")
    for name, W in ours(packed).items():
        assert torch.equal(read_gptq(tensors, name, 4), W)


def test_awq_words_are_interleaved() -> None:
    assert _words(torch.arange(8).reshape(1, 8)).tolist() == [[0x75316420]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_decodes_to_our_values(symmetric: bool, tmp_path: Path) -> None:
    packed = compressed(tmp_path, {"*": {**INT, "symmetric": symmetric}})
    out = rarefy.export(packed, tmp_path / "awq", format="awq")
    tensors = load_file(out / "model.safetensors")
    for name, W in ours(packed).items():
        assert torch.equal(read_awq(tensors, name, 32), W)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = (torch.arange(2 * 24) * 37 % 251).view(2, 24)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2])
assert "rarefy" not in sys.modules
"""


def stock_logits(folder: Path, tmp_path: Path) -> torch.Tensor:
    """Logits in a process of stock transformers."""
    pytest.importorskip("compressed_tensors")
    script, answer = tmp_path / "stock.py", tmp_path / "logits.pt"
    script.write_text(STOCK)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, script, folder, answer], check=True, env=env)
    found: torch.Tensor = torch.load(answer, weights_only=True)
    return found


@pytest.mark.parametrize("static", [False, True])
def test_w8a8_opens_in_stock_transformers(static: bool, tmp_path: Path) -> None:
    rounding = {**INPUT, "per": "tensor", "dynamic": False} if static else INPUT
    packed = compressed(tmp_path, {"*": {**W8A8, "input": rounding}})
    out = rarefy.export(packed, tmp_path / "w8a8", format="compressed-tensors")
    tensors = load_file(out / "model.safetensors")
    for name, W in ours(packed).items():
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert weight.dtype == torch.int8
        assert torch.equal(weight.half() * scale, W)
        assert (f"{name}.input_scale" in tensors) is static
    scales = {name: tensors.get(f"{name}.input_scale") for name in ours(packed)}
    put_in(tmp_path / "dense", tensors, list(scales))

    def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
        # compressed-tensors divides by 127.5 where rarefy divides by 127, so codes may differ.
        scale = scales[name]
        scale = x.abs().amax(-1, keepdim=True) / 127.5 if scale is None else scale
        return (x / scale).round().clamp(-128, 127) * scale

    expected = simulated(tmp_path / "dense", list(scales), rounded)
    found = stock_logits(out, tmp_path)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    with torch.no_grad():
        mine = load_model(packed)(input_ids=IDS).logits
    assert float((found - mine).norm() / mine.norm()) < 0.05


def put_in(dense: Path, tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    """Replace matrices of a dense folder by ``weight * weight_scale`` in float32.

    Rounded inputs are chaotic: products rounded to float16 would lead to other codes already.
    """
    file = dense / "model.safetensors"
    source = {key: tensor.float() for key, tensor in load_file(file).items()}
    for name in names:
        scale = tensors[f"{name}.weight_scale"].float()
        source[f"{name}.weight"] = tensors[f"{name}.weight"].float() * scale
    save_file(source, file, metadata={"format": "pt"})


def simulated(
    folder: Path, names: list[str], rounded: Callable[[str, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits of a dense folder with the inputs of some linears rounded."""
    model = load_model(folder)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: (rounded(name, args[0]),)
        )
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_fp8_opens_in_stock_transformers(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", torch.float16)
    out = rarefy.export(dense, tmp_path / "fp8", format="compressed-tensors", type="FP8")
    tensors, source = (load_file(f / "model.safetensors") for f in (out, dense))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert tensors[name].dtype == torch.float8_e4m3fn
    error = (tensors[name].float() * tensors[f"{name}_scale"].float() - source[name].float()).abs()
    # Four significant bits, and the smallest number beside them.
    smallest = tensors[f"{name}_scale"].float() * 2**-10
    assert bool((error <= source[name].float().abs() * 2**-4 + smallest).all())
    assert torch.equal(tensors["lm_head.weight"], source["lm_head.weight"])
    names = [key.removesuffix(".weight_scale") for key in tensors if key.endswith("_scale")]
    assert len(names) == 21
    put_in(dense, tensors, names)

    def rounded(_: str, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    expected = simulated(dense, names, rounded)
    found = stock_logits(out, tmp_path)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_fp8_reaches_the_largest_number() -> None:
    codes, scale = fp8(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]))
    assert codes.float().tolist() == [[224.0, -448.0, 0.0], [0.0, 0.0, 0.0]]
    assert scale.flatten().tolist() == [pytest.approx(2 / 448), 1.0]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq", {"*": {**INT, "bits": 5}}, "int5 g32, and GPTQ holds integers of 2, 3, 4 or 8 bits"),
    ("gptq", {"*": {"format": "nf4"}}, "nf4, and GPTQ holds"),
    ("gptq", {"*": {**INT, "group": 40}}, "groups of 40 do not divide the 64 columns"),
    ("gptq", {"*": W8A8}, r"rounded \(a8 token\), which GPTQ cannot say"),
    ("gptq", {"*down_proj": {**INT, "bits": 8}, "*": INT}, "with one format only"),
    ("gptq", {"*": INT, "model.embed_tokens": INT}, "not the weight of a plain linear layer"),
    ("awq", {"*": {**INT, "bits": 3}}, "AWQ holds integers of 4 bits"),
    ("awq", {"*": W8A8}, "which AWQ cannot say"),
    ("compressed-tensors", {"*": INT}, "is a compressed-tensors checkpoint already"),
    ("compressed-tensors", {"*": {**INT, "bits": 3}}, "int3 g32, which compressed-tensors cannot"),
    ("compressed-tensors", {"*": {**W8A8, "symmetric": False}}, "8-bit symmetric integers by row"),
    ("compressed-tensors", {"*": {**W8A8, "input": {**INPUT, "bits": 4}}}, "takes 8 bits by token"),
]


@pytest.mark.parametrize(("form", "schemes", "why"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_a_layout_cannot_say_is_refused(
    form: str, schemes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    packed = compressed(tmp_path, schemes)
    with pytest.raises(RarefyError, match=why):
        rarefy.export(packed, tmp_path / "out", format=form)
    assert not list(tmp_path.glob("out*"))


def test_sources_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    packed = compressed(tmp_path, {"*": INT})
    for folder, options, why in (
        (tmp_path / "dense", {"format": "gptq"}, "holds no matrix that rarefy compressed"),
        (tmp_path / "none", {"format": "awq"}, "there is no folder"),
        (packed, {"format": "compressed-tensors", "type": "FP8"}, "compressed already"),
        (packed, {"format": "compressed-tensors", "type": "Q4_0"}, "--type Q4_0 is not one of"),
        (packed, {"format": "gptq", "imatrix": "web"}, "--imatrix belongs to gguf, not to gptq"),
    ):
        with pytest.raises(RarefyError, match=why):
            rarefy.export(folder, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_a_killed_export_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = compressed(tmp_path, {"*": INT})
    rarefy.export(packed, tmp_path / "whole", format="gptq")
    real, calls = module._layout, []

    def stopping(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_layout", stopping)
    with pytest.raises(KeyboardInterrupt):
        rarefy.export(packed, tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "_layout", real)
    rarefy.export(packed, tmp_path / "out", format="gptq")
    whole, again = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == again.read_bytes()
