"""SmoothQuant and planted outliers: the function stays, the difficulty moves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from planted import (
    IDS,
    logits,
    moved,
    planted,
    tensors,
    transformed,
    watching,
    write_recipe,
    write_text,
)
from safetensors.torch import save_file
from tiny import FAMILIES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

import rarefy
from rarefy import Calibration
from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.stage import Watcher
from rarefy.errors import RarefyError
from rarefy.evaluate.planted import plant
from rarefy.recipe import parse_recipe
from rarefy.statistics import MomentSums
from rarefy.transforms.base import EdgeView
from rarefy.transforms.smoothquant import SmoothQuant

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-4
EVERYWHERE = SmoothQuant(inner=True, value=True)
STATIC8 = {"format": "int", "bits": 8, "per": "tensor", "dynamic": False}
ROW8 = {"format": "int", "bits": 8, "symmetric": True}


def edges(folder: Path) -> list[dict[str, object]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    found: list[dict[str, object]] = manifest["history"][-1]["edges"]
    return found


def view(X: torch.Tensor, *readers: torch.Tensor, repeat: int = 1) -> EdgeView:
    """A hand-made edge; with ``repeat`` every channel feeds that many neighbouring columns."""
    n = X.shape[1]
    moments = MomentSums(n, torch.device("cpu"))
    moments.add(X)
    channels = torch.arange(n) // repeat
    return EdgeView(
        name="edge",
        after_norm=True,
        of_heads=False,
        repeated=repeat > 1,
        readers=readers,
        formats=(None,) * len(readers),
        channels=channels,
        width=n // repeat,
        moments=moments.moments(),
    )


# The formula


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("repeat", [1, 3])
def test_factors_are_those_of_the_formula(alpha: float, repeat: int) -> None:
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 12, generator=g) * torch.logspace(-2, 2, 12)
    W, V = torch.randn(7, 12, generator=g), 3 * torch.randn(5, 12, generator=g)
    answer = SmoothQuant(alpha).fit(view(X, W, V, repeat=repeat))
    assert answer is not None
    for channel in range(12 // repeat):
        columns = range(channel * repeat, (channel + 1) * repeat)
        loudest = max(abs(float(x)) for j in columns for x in X[:, j])
        largest = max(abs(float(w)) for j in columns for M in (W, V) for w in M[:, j])
        expected = loudest**alpha / largest ** (1 - alpha)
        assert float(answer.factors[channel]) == pytest.approx(expected, rel=1e-5)


def test_a_channel_that_is_silent_in_calibration_is_left_alone() -> None:
    g = torch.Generator().manual_seed(1)
    X, W = torch.randn(30, 6, generator=g), torch.randn(4, 6, generator=g)
    X[:, 2] = 0
    X[:, 4] = 1e-9
    answer = SmoothQuant().fit(view(X, W))
    assert answer is not None
    assert answer.factors[[2, 4]].tolist() == [1.0, 1.0]
    assert answer.notes["silent"] == 2
    assert not (answer.factors[[0, 1, 3, 5]] == 1).any()
    nothing = SmoothQuant().fit(view(torch.zeros(3, 6), W))
    assert nothing is not None
    assert nothing.factors.tolist() == [1.0] * 6


def test_a_channel_that_nobody_reads_has_a_finite_factor() -> None:
    g = torch.Generator().manual_seed(2)
    X, W = torch.randn(30, 6, generator=g), torch.randn(4, 6, generator=g)
    W[:, 3] = 0
    answer = SmoothQuant(alpha=0.0).fit(view(X, W))
    assert answer is not None
    assert float(answer.factors[3]) == pytest.approx(1e5)


@pytest.mark.parametrize("alpha", [-0.1, 1.01])
def test_alpha_is_a_share(alpha: float) -> None:
    stage = {"transform": "smoothquant", "alpha": alpha}
    with pytest.raises(RarefyError, match=r"alpha must lie in 0\.\.1"):
        parse_recipe({"stages": [stage]}, "trial")


# In models


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_and_the_architecture_stay(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    out = transformed(source, tmp_path / "out", EVERYWHERE)
    assert moved(source, out) <= TOLERANCE
    before, after = load_model(source), load_model(out)
    assert [(n, type(m)) for n, m in before.named_modules()] == [
        (n, type(m)) for n, m in after.named_modules()
    ]
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    # Every block has changed by far more than rounding, and nothing outside the blocks has.
    touched = {n for n in old if not torch.allclose(old[n], new[n], rtol=0.01)}
    folded = edges(out)
    assert len(folded) >= 2 * before.config.num_hidden_layers
    assert len(touched) > len(folded)
    assert all(".layers." in n or ".h." in n for n in touched)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_at_one_half_both_sides_have_the_same_maxima(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    once = transformed(source, tmp_path / "once", EVERYWHERE)
    with watching(SmoothQuant) as seen:
        transformed(once, tmp_path / "twice", SmoothQuant())
    kinds = {view.name.rsplit(".", 1)[-1] for view, _ in seen}
    assert {"attn_in", "mlp_in", "value"} <= kinds
    for edge, _ in seen:
        largest = torch.stack([W.abs().amax(0) for W in edge.readers]).amax(0)
        X, W = edge.per_channel(edge.moments.peak), edge.per_channel(largest)
        loud = X > 0  # a few of OPT's ReLUs never fire
        assert loud.float().mean() > 0.9
        torch.testing.assert_close(X[loud], W[loud], rtol=1e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_planted_outliers_leave_no_trace(family: str, alpha: float, tmp_path: Path) -> None:
    folded = {}
    for kappa in (1, 50):
        source = planted(family, tmp_path, kappa)
        out = transformed(source, tmp_path / f"out{kappa}", SmoothQuant(alpha, inner=True))
        folded[kappa] = tensors(out)
    assert folded[1].keys() == folded[50].keys()
    for name, tensor in folded[1].items():
        atol = 1e-6 * float(tensor.abs().max())
        torch.testing.assert_close(folded[50][name], tensor, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (SmoothQuant(), {"attn_in", "mlp_in"}),
        (SmoothQuant(inner=True), {"attn_in", "mlp_in", "mlp_inner"}),
        (SmoothQuant(value=True), {"attn_in", "mlp_in", "value"}),
    ],
)
@pytest.mark.parametrize("kv", [2, 4])
def test_sites_are_chosen_by_the_options(
    transform: SmoothQuant, expected: set[str], kv: int, tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "dense", num_key_value_heads=kv)
    out = transformed(source, tmp_path / "out", transform)
    assert {str(e["edge"]).rsplit(".", 1)[-1] for e in edges(out)} == expected
    before, after = tensors(source), tensors(out)
    for part, site in (("mlp.down_proj", "mlp_inner"), ("self_attn.o_proj", "value")):
        name = f"model.layers.1.{part}.weight"
        assert torch.equal(before[name], after[name]) == (site not in expected)


def test_a_silent_channel_of_a_model_keeps_its_weights(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    weights = tensors(source)
    norm = "model.layers.0.input_layernorm.weight"
    weights[norm][11] = 0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out = transformed(source, tmp_path / "out", SmoothQuant())
    after = tensors(out)
    for name in ("q_proj", "k_proj", "v_proj"):
        full = f"model.layers.0.self_attn.{name}.weight"
        same = (weights[full] == after[full]).all(0)
        assert same.nonzero().flatten().tolist() == [11]
    assert after[norm][11] == 0
    assert moved(source, out) <= TOLERANCE


def test_a_folder_keeps_its_type(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    out = transformed(source, tmp_path / "out", SmoothQuant())
    assert {e.dtype for e in Checkpoint(out).entries.values()} == {"BF16"}
    assert TOLERANCE < moved(source, out) < 0.05


def test_an_interrupted_fold_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    straight = transformed(source, tmp_path / "straight", EVERYWHERE)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transformed(source, tmp_path / "out", EVERYWHERE, watcher=Watcher(step=stop))
    out = transformed(source, tmp_path / "out", EVERYWHERE)
    a, b = tensors(straight), tensors(out)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert edges(straight) == edges(out)


def test_only_dense_models_with_known_edges_are_folded(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    solve = {"solver": "nearest", "schemes": {"*": ROW8}}
    small = rarefy.compress(source, write_recipe(tmp_path, solve), tmp_path / "small")
    with pytest.raises(RarefyError, match=r"stored as int8 row sym already.*start from the dense"):
        transformed(small.path, tmp_path / "out", SmoothQuant())
    config = AutoConfig.for_model(
        "olmo", vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=258, eos_token_id=257,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "olmo")
    with pytest.raises(RarefyError, match="'olmo' has no proved map"):
        transformed(tmp_path / "olmo", tmp_path / "out", SmoothQuant())
    with pytest.raises(RarefyError, match="only in a dense model with a proved map"):
        plant(tmp_path / "olmo", tmp_path / "loud", 50)


def test_smoothing_saves_static_activations_from_outliers(tmp_path: Path) -> None:
    source = planted("llama", tmp_path, 50)
    solve = {"solver": "nearest", "schemes": {"*": {**ROW8, "input": STATIC8}}}
    smooth = {"transform": "smoothquant", "alpha": 0.5}
    dense, errors = logits(source), {}
    for name, stages in {"naive": (solve,), "smoothed": (smooth, solve)}.items():
        recipe = write_recipe(tmp_path, *stages, name=name)
        data = Calibration(str(write_text(tmp_path)), sequences=8, length=32)
        out = rarefy.compress(source, recipe, tmp_path / name, calibration=data)
        errors[name] = float((logits(out.path) - dense).square().mean())
    assert errors["naive"] >= 10 * errors["smoothed"]


# The fixture itself


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_planting_changes_activations_and_not_the_function(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    channels = plant(source, tmp_path / "loud", 50, share=0.05)
    assert len(channels) == 3
    assert moved(source, tmp_path / "loud") <= TOLERANCE
    shown = {}
    for folder in (source, tmp_path / "loud"):
        with watching(SmoothQuant) as seen:
            transformed(folder, tmp_path / f"{folder.name}-out", SmoothQuant())
        shown[folder] = {v.name: v.moments.peak for v, _ in seen if v.after_norm}
    for name, quiet in shown[source].items():
        loud = quiet.clone()
        loud[channels] *= 50
        torch.testing.assert_close(shown[tmp_path / "loud"][name], loud, rtol=1e-3, atol=1e-4)


def test_planting_writes_float32_and_one_is_nothing(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    plant(source, tmp_path / "out", 1)
    after = tensors(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {torch.float32}
    for name, tensor in tensors(source).items():
        assert torch.equal(after[name], tensor.float()), name
    assert load_model(tmp_path / "out")(IDS).logits.isfinite().all()
    plant(source, tmp_path / "again", 7, seed=3)
    plant(source, tmp_path / "other", 7, seed=3)
    a, b = tensors(tmp_path / "again"), tensors(tmp_path / "other")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_compressed_model_cannot_be_planted(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    recipe = write_recipe(tmp_path, {"solver": "nearest", "schemes": {"*": ROW8}})
    out = rarefy.compress(source, recipe, tmp_path / "small")
    with pytest.raises(RarefyError, match="only in a dense model"):
        plant(out.path, tmp_path / "loud", 50)
