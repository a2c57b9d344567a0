"""SmolLM2-135M pruned, then rounded, then cut: masks survive, sizes fall, stock tools open it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from test_real_model import expected, read
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.state import read_state

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.network]

FEW = rarefy.Calibration(sequences=8, length=128)
TEN = rarefy.Calibration(sequences=10, length=64)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "wanda"
    return rarefy.compress("demo", "wanda-2of4", out, calibration=FEW).path


@pytest.fixture(scope="module")
def rounded(pruned: Path) -> Path:
    scheme = {"format": "int", "bits": 4, "group": 64}
    recipe = pruned.parent / "int4.yaml"
    stage = {"solver": "gptq", "schemes": {"*": scheme}}
    recipe.write_text(yaml.safe_dump({"stages": [stage]}))
    return rarefy.compress(pruned, recipe, pruned.parent / "int4", calibration=FEW).path


def test_wanda_2of4_mask_survives_int4_gptq_bit_for_bit(pruned: Path, rounded: Path) -> None:
    before, after = Checkpoint(pruned), Checkpoint(rounded)
    formats = read_state(rounded).formats
    assert len(formats) == 30 * 7
    stored = weights = 0
    for name, fmt in formats.items():
        index = after.read(f"{name}.weight_index")
        assert torch.equal(index, before.read(f"{name}.weight_index"))
        shape = after.read(f"{name}.weight_shape").tolist()
        packed = {s: after.read(f"{name}.{s}") for s in fmt.layout(*shape)}
        matrix = fmt.decode(packed)
        assert int((matrix != 0).reshape(-1, 4).sum(1).max()) <= 2
        stored += sum(tensor.nbytes for tensor in packed.values())
        weights += matrix.numel()
    assert stored <= 0.30 * 2 * weights


def test_wanda_2of4_int4_opens_in_a_fresh_process(rounded: Path, tmp_path: Path) -> None:
    found = read(rounded, tmp_path, plugin=True)
    assert (found.logits - expected(resolve("demo"), rounded)).abs().max() <= 1e-3


def test_llm_pruner_leaves_an_ordinary_smaller_model(tmp_path: Path) -> None:
    source = resolve("demo")
    out = rarefy.compress("demo", "llm-pruner-20", tmp_path / "cut", calibration=TEN).path
    [done] = json.loads((out / "manifest.json").read_text())["history"]
    gone = done["parameters_before"] - done["parameters_after"]
    # 30 blocks lose 384 neurons (three vectors of 576) and one group of three heads of 64.
    assert gone == 30 * (3 * 384 * 576 + (2 * 3 + 2) * 64 * 576)
    sizes = [
        sum(entry.size for entry in Checkpoint(folder).entries.values()) for folder in (source, out)
    ]
    assert sizes[0] - sizes[1] == 2 * gone
    assert read(out, tmp_path, plugin=False).logits.isfinite().all()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.arange(1, 9).unsqueeze(0) * 1000
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
