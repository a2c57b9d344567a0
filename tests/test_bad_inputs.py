"""Bad input: a non-zero exit, one sentence that names the thing and the mend, nothing half-made.

Each case breaks one thing in a sound set-up (a tiny model, a text, a recipe) and says which words
the sentence must hold.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from typer.testing import CliRunner

from rarefy.checkpoint import writer
from rarefy.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE = """\
stages:
  - solver: gptq
    schemes:
      "*": {format: int, bits: 4, group: 32}
"""
TEXT = " ".join(f"word{i} and number {i * i}." for i in range(600))


@dataclass
class Setup:
    """A sound run, for a case to break.

    Attributes:
        folder: holds everything. model, recipe, text, out: the four arguments.
        options: further command line words.
    """

    folder: Path
    model: Path
    recipe: Path
    text: Path
    out: Path
    options: list[str] = field(default_factory=list)

    def command(self) -> list[str]:
        """The command line."""
        paths = ["--recipe", self.recipe, "--out", self.out, "--calibration", self.text]
        sizes = ["--sequences", "4", "--length", "32"]
        return ["compress", *map(str, [self.model, *paths]), *sizes, *self.options]


@pytest.fixture
def sound(tmp_path: Path) -> Setup:
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(RECIPE)
    text.write_text(TEXT)
    return Setup(tmp_path, save_tiny("llama", tmp_path / "model"), recipe, text, tmp_path / "out")


def _weights(setup: Setup) -> Path:
    return setup.model / "model.safetensors"


def _spoil(setup: Setup, name: str, value: float) -> None:
    tensors = load_file(_weights(setup))
    tensors[name].view(-1)[3] = value
    save_file(tensors, _weights(setup), metadata={"format": "pt"})


def truncated_shard(setup: Setup) -> None:
    file = _weights(setup)
    os.truncate(file, file.stat().st_size - 1000)


def not_safetensors(setup: Setup) -> None:
    _weights(setup).write_bytes(b"this is no weight file")


def damaged_header(setup: Setup) -> None:
    raw = bytearray(_weights(setup).read_bytes())
    raw[8:12] = b"!!!!"
    _weights(setup).write_bytes(raw)


def missing_tensor(setup: Setup) -> None:
    tensors = load_file(_weights(setup))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, _weights(setup), metadata={"format": "pt"})


def missing_shard(setup: Setup) -> None:
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"},
    }
    (setup.model / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_only(setup: Setup) -> None:
    _weights(setup).rename(setup.model / "pytorch_model.bin")


def nan_weight(setup: Setup) -> None:
    _spoil(setup, "model.layers.1.mlp.up_proj.weight", float("nan"))


def infinite_weight(setup: Setup) -> None:
    _spoil(setup, "model.layers.0.self_attn.q_proj.weight", float("inf"))


def nan_in_final_norm(setup: Setup) -> None:
    _spoil(setup, "model.norm.weight", float("nan"))


def nan_activation(setup: Setup) -> None:
    # Finite weights whose products overflow: the text is what brings the model to infinity.
    tensors = load_file(_weights(setup))
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, _weights(setup), metadata={"format": "pt"})


def config_of_another_model(setup: Setup) -> None:
    file = setup.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 112}))


def no_config(setup: Setup) -> None:
    (setup.model / "config.json").unlink()


def config_not_json(setup: Setup) -> None:
    (setup.model / "config.json").write_text("{")


def unsupported_architecture(setup: Setup) -> None:
    file = setup.model / "config.json"
    file.write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))


def unknown_architecture(setup: Setup) -> None:
    file = setup.model / "config.json"
    file.write_text(json.dumps({"model_type": "perceptron9000"}))


def no_such_model(setup: Setup) -> None:
    setup.model = setup.folder / "nowhere"


def no_tokenizer(setup: Setup) -> None:
    for file in setup.model.glob("tokenizer*"):
        file.unlink()


def wrong_tokenizer(setup: Setup) -> None:
    file = setup.model / "config.json"
    config = json.loads(file.read_text())
    tensors = load_file(_weights(setup))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:40].clone()
    save_file(tensors, _weights(setup), metadata={"format": "pt"})
    file.write_text(json.dumps(config | {"vocab_size": 40}))


def unknown_preset(setup: Setup) -> None:
    setup.recipe = Path("gptq-int4-g46")


def recipe_not_yaml(setup: Setup) -> None:
    setup.recipe.write_text("stages: [")


def recipe_unknown_key(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("stages:", "stage:"))


def recipe_unknown_solver(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("gptq", "gtpq"))


def recipe_unknown_option(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("solver: gptq", "solver: gptq\n    dampin: 0.1"))


def recipe_bad_type(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("bits: 4", "bits: four"))


def recipe_bad_bits(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("bits: 4", "bits: 9"))


def recipe_unknown_format(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("format: int", "format: itn"))


def recipe_matches_nothing(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace('"*"', '"*.qproj"'))


def recipe_without_schemes(setup: Setup) -> None:
    setup.recipe.write_text("stages: [{solver: nearest}]")


def group_larger_than_row(setup: Setup) -> None:
    setup.recipe.write_text(RECIPE.replace("group: 32", "group: 1000"))


def recompress(setup: Setup) -> None:
    assert CliRunner().invoke(app, setup.command()).exit_code == 0
    setup.model = setup.out.rename(setup.folder / "small")


def empty_text(setup: Setup) -> None:
    setup.text.write_text(" \n")


def text_too_short(setup: Setup) -> None:
    setup.text.write_text("Three short words.")


def text_missing(setup: Setup) -> None:
    setup.text = setup.folder / "nothing.txt"


def text_bad_json(setup: Setup) -> None:
    setup.text = setup.folder / "text.jsonl"
    setup.text.write_text('{"text": "fine"}\n{"text": \n')


def text_without_text(setup: Setup) -> None:
    setup.text = setup.folder / "text.jsonl"
    setup.text.write_text('{"body": "fine"}\n')


def zero_sequences(setup: Setup) -> None:
    setup.options = ["--sequences", "0"]


def output_exists(setup: Setup) -> None:
    setup.out.mkdir()
    (setup.out / "thesis.txt").write_text("ten years of work")


def output_of_another_recipe(setup: Setup) -> None:
    assert CliRunner().invoke(app, setup.command()).exit_code == 0
    setup.recipe.write_text(RECIPE.replace("bits: 4", "bits: 8"))


def half_done_run_of_another_recipe(setup: Setup) -> None:
    partial = setup.out.with_name("out.partial")
    partial.mkdir()
    (partial / writer.JOURNAL).write_text(json.dumps({"key": "other", "parts": {}}))


def output_below_a_file(setup: Setup) -> None:
    setup.out = setup.text / "out"


CASES: dict[str, tuple[Callable[[Setup], None], tuple[str, ...]]] = {
    case.__name__: (case, words)
    for case, words in [
        (truncated_shard, ("model.safetensors", "truncated", "fetch it again")),
        (not_safetensors, ("model.safetensors", "truncated or not a safetensors file")),
        (damaged_header, ("model.safetensors", "damaged header")),
        (missing_tensor, ("model.layers.1.mlp.up_proj.weight", "incomplete")),
        (missing_shard, ("model-00002-of-00002.safetensors",)),
        (pickle_only, ("safetensors", "convert")),
        (nan_weight, ("model.layers.1.mlp.up_proj.weight", "NaN")),
        (infinite_weight, ("model.layers.0.self_attn.q_proj.weight", "infinite")),
        (nan_in_final_norm, ("model.norm.weight", "NaN")),
        (nan_activation, ("model.layers.0", "NaN or infinite", "calibration text")),
        (config_of_another_model, ("shape", "do not belong together")),
        (no_config, ("config.json",)),
        (config_not_json, ("config.json", "JSON")),
        (unsupported_architecture, ("'vit'", "decoder language model")),
        (unknown_architecture, ("'perceptron9000'", "decoder language model")),
        (no_such_model, ("nowhere", "no model folder")),
        (no_tokenizer, ("tokenizer",)),
        (wrong_tokenizer, ("tokenizer", "40")),
        (unknown_preset, ("gptq-int4-g46", "did you mean 'gptq-int4-g64'?")),
        (recipe_not_yaml, ("recipe.yaml", "YAML")),
        (recipe_unknown_key, ("'stage'", "did you mean 'stages'?")),
        (recipe_unknown_solver, ("'gtpq'", "did you mean 'gptq'?")),
        (recipe_unknown_option, ("'dampin'", "did you mean 'damping'?")),
        (recipe_bad_type, ("bits", "'four'", "int")),
        (recipe_bad_bits, ("bits", "2..8", "9")),
        (recipe_unknown_format, ("'itn'", "did you mean 'int'?")),
        (recipe_matches_nothing, ("no matrix", "schemes")),
        (recipe_without_schemes, ("schemes",)),
        (group_larger_than_row, ("group of 1000", "q_proj", "at most 64")),
        (recompress, ("already", "dense model")),
        (empty_text, ("text.txt", "holds no text")),
        (text_too_short, ("18 tokens", "need 128", "--length")),
        (text_missing, ("nothing.txt",)),
        (text_bad_json, ("text.jsonl", "line 2")),
        (text_without_text, ("text.jsonl", "text")),
        (zero_sequences, ("sequences",)),
        (output_exists, ("out", "--fresh")),
        (output_of_another_recipe, ("out", "--fresh")),
        (half_done_run_of_another_recipe, ("out.partial", "--fresh")),
        (output_below_a_file, ("text.txt", "a part of this path is a file")),
    ]
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_half_made(name: str, sound: Setup) -> None:
    spoil, words = CASES[name]
    spoil(sound)
    before = _listing(sound.out)
    result = CliRunner().invoke(app, sound.command())
    assert result.exit_code == 2, (result.exception, result.stderr)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]
    assert _listing(sound.out) == before


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Names and times of what is called a result."""
    if not folder.is_dir():
        return []
    return sorted((file.name, file.stat().st_mtime_ns) for file in folder.rglob("*"))


def _full_disk(after: int) -> Callable[..., None]:
    """A stand-in for fsync that finds the disk full after some calls."""
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_full_disk_loses_nothing(
    after: int, sound: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", _full_disk(after))
        result = CliRunner().invoke(app, sound.command())
    assert result.exit_code == 2
    assert "No space left" in result.stderr and "run the same command again" in result.stderr
    assert not sound.out.exists()
    assert CliRunner().invoke(app, sound.command()).exit_code == 0
    assert (sound.out / "model.safetensors").is_file()


def test_an_unwritable_folder_is_named(sound: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        result = CliRunner().invoke(app, sound.command())
    assert result.exit_code == 2
    assert "Permission denied" in result.stderr and "may write to" in result.stderr


def test_a_hessian_that_is_not_positive_definite_is_reported(
    sound: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rarefy.statistics import Gram

    honest = Gram.mean
    monkeypatch.setattr(Gram, "mean", lambda self: honest(self) - 0.9 * torch.diag(honest(self)))
    result = CliRunner().invoke(app, sound.command())
    assert result.exit_code == 0
    fallbacks = json.loads((sound.out / "manifest.json").read_text())["fallbacks"]
    assert any("not positive definite" in entry["what"] for entry in fallbacks)


def test_a_crash_while_writing_leaves_no_result(
    sound: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", crash)
        result = CliRunner().invoke(app, sound.command())
    assert result.exit_code != 0
    assert not sound.out.exists()
    assert CliRunner().invoke(app, sound.command()).exit_code == 0


def test_evaluating_what_is_no_model_is_refused(sound: Setup) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(sound.text), "--against", str(sound.model)])
    assert result.exit_code == 2 and "text.txt" in result.stderr


def test_comparing_what_is_no_report_is_refused(sound: Setup) -> None:
    result = CliRunner().invoke(app, ["compare", str(sound.recipe)])
    assert result.exit_code == 2 and "recipe.yaml" in result.stderr


def test_an_unknown_export_format_is_refused(sound: Setup) -> None:
    words = ["export", str(sound.model), "--format", "onx", "--out", str(sound.out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "onx" in result.stderr
