"""What ``plan`` promises is what ``compress`` writes; what ``export`` writes is what was stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.state import read_state
from rarefy.errors import RarefyError
from rarefy.plan import plan

if TYPE_CHECKING:
    from pathlib import Path

INT4 = {"format": "int", "bits": 4, "group": 32}
INT3 = {"format": "int", "bits": 3, "group": 32}
ROW8 = {"format": "int", "bits": 8}
RAGGED = {"format": "int", "bits": 4, "group": 40}
TABLES = {
    "int4": {"*": INT4},
    "int3": {"*": INT3},
    "ragged": {"*": RAGGED},
    "mixed": {"*.layers.0.*": "keep", "*.h.0.*": "keep", "*down_proj": ROW8, "*": INT4},
    "head": {"lm_head": ROW8, "*": INT4},
    "embedding": {"*embed_tokens": ROW8, "*wte": ROW8, "lm_head": ROW8, "*": INT3},
}


def recipe(folder: Path, *tables: dict) -> Path:
    stages = [{"solver": "nearest", "schemes": table} for table in tables]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return file


def payload(folder: Path) -> int:
    return sum(entry.size for entry in Checkpoint(folder).entries.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("table", TABLES)
def test_predicted_bytes_are_the_written_bytes(family: str, table: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "dense", torch.bfloat16)
    file = recipe(tmp_path, TABLES[table])
    planned = plan(model, file)
    rarefy.compress(model, file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert planned.bytes == payload(tmp_path / "out")
    assert planned.container == config["quantization_config"]["quant_method"]
    assert (planned.reason == "") == (planned.container == "compressed-tensors")


def test_two_stages_are_planned_as_they_run(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    first = {"*self_attn*": INT4, "*": "keep"}
    second = {"*self_attn*": "keep", "*": INT3}
    file = recipe(tmp_path, first, second)
    rarefy.compress(model, file, tmp_path / "out")
    assert plan(model, file).bytes == payload(tmp_path / "out")


def test_memory_grows_with_calibration_tokens_only_for_recipes_that_read_them(
    tmp_path: Path,
) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    few, many = rarefy.Calibration(sequences=8), rarefy.Calibration(sequences=1007)
    with_data = [plan(model, "gptq-int4-g64", calibration=c).memory for c in (few, many)]
    without = [plan(model, "rtn-int4-g64", calibration=c).memory for c in (few, many)]
    # Three hidden streams of 64 channels and 96 inner ones, in fp32, for 999 rows of 512 tokens.
    assert with_data[1].blocks - with_data[0].blocks == 999 * 512 * 4 * (3 * 64 + 96)
    assert without[0].blocks == without[1].blocks


def test_memory_of_training_follows_the_numbers_that_move(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")  # 3 blocks: 64 wide, kv 32, 96 inner
    quantize = {"solver": "nearest", "schemes": {"*": INT4}}
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    weights = 3 * sum(m * n for m, n in shapes)
    moving = {
        "full": ([{"tuner": "full", "norms": False}], weights),
        "lora": ([{"tuner": "lora", "rank": 4}], 3 * sum(4 * (m + n) for m, n in shapes)),
        "scales": ([quantize, {"tuner": "scales"}], weights // 32),
        "norms": (
            [quantize, {"tuner": "codes", "norms": True}],
            weights + 7 * 64,
        ),
    }
    found = {}
    for name, (stages, _) in moving.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        found[name] = plan(model, file).memory.training
    for name, (_, numbers) in moving.items():
        assert found[name] - found["full"] == 12 * (numbers - weights), name


@pytest.mark.parametrize("table", ["int4", "embedding", "head"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_dense_export_computes_what_the_decoded_weights_compute(
    family: str, table: str, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "dense")
    packed = tmp_path / "packed"
    rarefy.compress(source, recipe(tmp_path, TABLES[table]), packed)
    rarefy.export(packed, tmp_path / "again", dtype="float32")

    expected = AutoModelForCausalLM.from_pretrained(source)
    if not json.loads((packed / "config.json").read_text())["tie_word_embeddings"]:
        head = expected.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    stored = Checkpoint(packed)
    for module, fmt in read_state(packed).formats.items():
        rows, columns = stored.read(f"{module}.weight_shape").tolist()
        layout = fmt.layout(rows, columns)
        matrix = fmt.decode({suffix: stored.read(f"{module}.{suffix}") for suffix in layout})
        weight = expected.get_submodule(module).weight
        transposed = family == "gpt2" and module.startswith("transformer.h.")
        weight.data.copy_(matrix.T if transposed else matrix)
    exported, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, expected(ids).logits)


def test_export_keeps_the_type_of_the_source_and_the_tokenizer(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    rarefy.compress(source, recipe(tmp_path, TABLES["int3"]), tmp_path / "packed")
    rarefy.export(tmp_path / "packed", tmp_path / "again")
    dense, again = Checkpoint(source), Checkpoint(tmp_path / "again")
    assert {name: (e.dtype, e.shape) for name, e in again.entries.items()} == {
        name: (e.dtype, e.shape) for name, e in dense.entries.items()
    }
    assert "quantization_config" not in again.config
    assert (tmp_path / "again" / "tokenizer.json").is_file()


def test_export_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    rarefy.compress(source, recipe(tmp_path, TABLES["int4"]), tmp_path / "packed")
    for folder, options, words in (
        (source, {}, "dense already"),
        (tmp_path / "packed", {"format": "denze"}, "did you mean 'dense'"),
        (tmp_path / "packed", {"dtype": "float8"}, "float"),
        (tmp_path / "nowhere", {}, "no folder"),
    ):
        with pytest.raises(RarefyError, match=words):
            rarefy.export(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
