"""The tree that is built from config.json alone is the one that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import save_tiny
from transformers import AutoTokenizer

import rarefy
from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.reader import Checkpoint
from rarefy.errors import RarefyError
from rarefy.kernels import library
from rarefy.runtime.anatomy import Anatomy, Share, dissect
from rarefy.runtime.outline import FAMILIES, outline
from rarefy.runtime.stored import stored_outline

if TYPE_CHECKING:
    from pathlib import Path

native = pytest.mark.skipif(not library.available(), reason=library.reason() or "no kernels")

THETA = {"rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rms_norm_eps": 1e-3, "max_position_embeddings": 99}),
    ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_parameters": {**THETA, **LLAMA3}}),
    ("mistral", {"sliding_window": None, "head_dim": 32}),
    ("qwen3", {"attention_bias": True, "head_dim": 24}),
]


def alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Compare two anatomies down to their tensors."""
    if isinstance(theirs, Share):
        assert (ours.row, ours.rows) == (theirs.row, theirs.rows), where
        assert torch.equal(ours.linear.weight, theirs.linear.weight), where
        assert (ours.bias is None) == (theirs.bias is None), where
        assert theirs.bias is None or torch.equal(ours.bias, theirs.bias), where
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            alike(*pair, f"{where}.{number}")
    elif isinstance(theirs, torch.nn.Embedding):
        assert torch.equal(ours.weight, theirs.weight), where
    elif hasattr(theirs, "__dataclass_fields__"):
        for field in fields(theirs):
            if field.name != "rotary":
                place = f"{where}.{field.name}"
                alike(getattr(ours, field.name), getattr(theirs, field.name), place)
    else:
        assert ours == theirs, where


def anatomies(folder: Path) -> tuple[Anatomy, Anatomy]:
    """Built from the config alone, and through transformers."""
    return dissect(stored_outline(folder)), dissect(load_model(folder, torch.device("cpu")))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_everything_is_what_transformers_makes_of_the_config(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = anatomies(save_tiny(family, tmp_path / "m", **overrides))
    alike(ours, theirs)
    for mine, wanted in zip(ours.rope(theirs.limit), theirs.rope(theirs.limit), strict=True):
        assert torch.equal(mine, wanted)


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with other fields in its config; None takes a field out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_the_older_spelling_of_rotary_positions(tmp_path: Path) -> None:
    folder = edited(
        save_tiny("llama", tmp_path / "m"),
        rope_parameters=None,
        rope_theta=5_000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    ours, theirs = anatomies(folder)
    for mine, wanted in zip(ours.rope(100), theirs.rope(100), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("phi3", {}, "model type 'phi3'"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": None}, "tie_word_embeddings"),
        ("llama", {"rope_parameters": None}, "rope_theta"),
        ("llama", {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": {**THETA, "rope_type": "linear"}}, "factor"),
        ("llama", {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial"),
        ("mistral", {"sliding_window": None}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "window"),
        ("qwen3", {"head_dim": None}, "head_dim"),
    ],
)
def test_what_the_config_leaves_open_is_refused(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = edited(save_tiny(family, tmp_path / "m"), **changes)
    with pytest.raises(RarefyError, match=why):
        outline(Checkpoint(folder))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = edited(save_tiny("llama", tmp_path / "m"), intermediate_size=80)
    with pytest.raises(RarefyError, match=r"config\.json and weights do not belong together"):
        stored_outline(folder)


def python(code: str, *arguments: object) -> str:
    """Run code in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@native
def test_decoding_imports_neither_model_classes_nor_torchs_compiler(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "stages: [{solver: nearest, schemes: {'model.embed_tokens': {format: int, bits: 8},"
        " '*': {format: int, bits: 4, group: 32}}}]"
    )
    folder = rarefy.compress(save_tiny("llama", tmp_path / "m"), recipe, tmp_path / "out").path
    code = (
        "import sys, pathlib; from rarefy.runtime.decoder import open_loop, stream;"
        "from rarefy.runtime.sampling import Sampling;"
        "loop, obstacle = open_loop(pathlib.Path(sys.argv[1]), 64); assert not obstacle, obstacle;"
        "assert len(list(stream(loop, range(20), Sampling(8)))) == 8;"
        "heavy = ['torch._dynamo', 'sympy', 'transformers.modeling_utils', 'scipy', 'accelerate'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert python(code, folder) == "[]"


@pytest.mark.parametrize("first", ["rarefy", "transformers.quantizers.auto"])
def test_transformers_knows_the_container_whichever_is_imported_first(
    first: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages: [{solver: nearest, schemes: {'*': {format: bcq, bits: 3}}}]")
    folder = rarefy.compress(save_tiny("llama", tmp_path / "m"), recipe, tmp_path / "out").path
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    code = (
        f"import sys, {first}; import rarefy, transformers;"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert python(code, folder) == "PackedLinear"


def test_importing_the_package_imports_no_torch_and_verbs_keep_their_names() -> None:
    code = (
        "import sys, rarefy; light = 'torch' not in sys.modules;"
        "import rarefy.plan, rarefy.evaluate.run, rarefy.kick.run, rarefy.export.export;"
        "verbs = [v for v in rarefy.__all__ if not v.startswith('_')];"
        "print(light, all(callable(getattr(rarefy, v)) for v in verbs), {*verbs} <= {*dir(rarefy)})"
    )
    assert python(code) == "True True True"
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        rarefy.compres  # type: ignore[attr-defined]  # noqa: B018


def test_a_tokenizer_of_the_general_class_is_opened_without_the_models_config(
    tmp_path: Path,
) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text())["tokenizer_class"]
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert named == "TokenizersBackend"
    assert type(ours) is type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("Some text.") == theirs("Some text.")
    assert ours.special_tokens_map == theirs.special_tokens_map
    code = (
        "import sys, pathlib; from rarefy.checkpoint.load import load_tokenizer;"
        "load_tokenizer(pathlib.Path(sys.argv[1]));"
        "print('torch._dynamo' in sys.modules)"
    )
    assert python(code, folder) == "False"
