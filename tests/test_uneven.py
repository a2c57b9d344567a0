"""Blocks of different width: ranking over all blocks, our loader, and the stages that follow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from operating import NINE, close_to, logits, opened, operate, record, rows, silence
from tiny import save_tiny

import rarefy
from rarefy.checkpoint.reader import Checkpoint, parameters
from rarefy.engine.compress import Calibration
from rarefy.errors import RarefyError
from rarefy.export.dense import export_dense
from rarefy.surgery.llm_pruner import LLMPruner
from rarefy.surgery.shortgpt import ShortGPT

if TYPE_CHECKING:
    from pathlib import Path

BOTH = LLMPruner(0.34, 0.25, ranking="model", samples=4, length=16)
NEURONS = LLMPruner(0, 0.25, ranking="model", samples=4, length=16)


@pytest.mark.parametrize(
    ("family", "overrides", "method"),
    [
        ("llama", NINE, BOTH),
        ("qwen3", {"num_hidden_layers": 4, "num_attention_heads": 8}, BOTH.__class__(
            0.5, 0.25, ranking="model", samples=4, length=16)),
        ("gpt2", {"num_hidden_layers": 4}, NEURONS),
        ("phi3", {"num_hidden_layers": 4}, NEURONS),
    ],
)  # fmt: skip
def test_cutting_uneven_blocks_equals_silencing(
    family: str, overrides: dict[str, Any], method: Any, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / "dense", **overrides)
    out = operate(dense, method, tmp_path / "out")
    removed = record(out)["removed"]
    counts = {kind: [len(units) for units in blocks] for kind, blocks in removed.items()}
    assert any(len(set(lengths)) > 1 for lengths in counts.values()), "every block lost the same"
    assert close_to(logits(opened(out)), logits(silence(dense, removed)))


def test_as_much_goes_as_from_even_blocks_and_the_lowest_scores_of_all(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    uneven = operate(dense, BOTH, tmp_path / "uneven")
    even = operate(dense, LLMPruner(0.34, 0.25, samples=4, length=16), tmp_path / "even")
    assert parameters(Checkpoint(uneven).entries) == parameters(Checkpoint(even).entries)
    entry = record(uneven)
    scores = torch.tensor(entry["scores"]["heads"])
    gone = [{*units} for units in entry["removed"]["heads"]]
    assert all(len(units) < 3 for units in gone), "a block lost all of its heads"
    stays = [
        float(score)
        for row, units in zip(scores, gone, strict=True)
        for unit, score in enumerate(row)
        if unit not in units and score < row.max()
    ]
    highest = max(float(row[i]) for row, units in zip(scores, gone, strict=True) for i in units)
    assert highest <= min(stays)


def test_a_cache_changes_nothing_and_saving_keeps_the_widths(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    small = opened(operate(dense, BOTH, tmp_path / "out"))
    a, b = (
        small.generate(rows(2, 20), max_new_tokens=30, do_sample=False, use_cache=cache,
                       eos_token_id=None)
        for cache in (True, False)
    )  # fmt: skip
    assert torch.equal(a, b)
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(small))


def test_later_stages_keep_the_widths(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    narrow = operate(dense, BOTH, tmp_path / "narrow")
    recipe = tmp_path / "int8.yaml"
    recipe.write_text(
        "stages:\n  - solver: gptq\n    schemes:\n      '*': {format: int, bits: 8, group: 8}\n"
    )
    data = Calibration(str(_text(tmp_path)), sequences=4, length=32)
    out = rarefy.compress(narrow, recipe, tmp_path / "out", calibration=data).path
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rarefy"
    assert (
        config["widths"]
        == json.loads((narrow / "config.json").read_text())["quantization_config"]["widths"]
    )
    difference = (logits(opened(out)) - logits(opened(narrow))).norm()
    assert 0 < difference < 0.05 * logits(opened(narrow)).norm()
    export_dense(out, tmp_path / "plain")
    assert close_to(logits(opened(tmp_path / "plain")), logits(opened(out)), 1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    narrow = operate(dense, BOTH, tmp_path / "narrow")
    with pytest.raises(RarefyError, match="differ in width, and shortgpt handles"):
        operate(narrow, ShortGPT(1), tmp_path / "short")
    gpt2 = save_tiny("gpt2", tmp_path / "gpt2", num_hidden_layers=4)
    with pytest.raises(RarefyError, match="gpt2"):
        operate(gpt2, LLMPruner(0.25, 0.25, ranking="model", samples=2, length=16), tmp_path / "x")
    with pytest.raises(ValueError, match="ranking must be block or model"):
        LLMPruner(ranking="layer")


def _text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return file
