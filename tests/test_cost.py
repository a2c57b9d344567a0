"""Counts against torch's own FLOP counter, closed forms, and folders decoded into dense ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from tiny import save_tiny, tiny
from torch.utils.flop_counter import FlopCounterMode

import rarefy
from rarefy.checkpoint.load import load_model
from rarefy.evaluate import hardware
from rarefy.evaluate.cost import Measured, cost
from rarefy.evaluate.energy import Energy
from rarefy.evaluate.flops import count
from rarefy.evaluate.footprint import footprint
from rarefy.evaluate.hardware import Peaks, peaks
from rarefy.evaluate.speed import Speed
from rarefy.maps.experts import split_experts
from rarefy.runtime.factored import Factored
from rarefy.runtime.packed import PackedLinear

if TYPE_CHECKING:
    from pathlib import Path

HALF = {"format": "sparse", "sparsity": 0.5, "scope": "matrix"}
INT4 = {"format": "int", "bits": 4, "group": 32}
THIN = {"format": "low-rank", "ratio": 0.5}
TOKENS = 24
PEAKS = Peaks(1e9, 1e8, "cpu", 1)


def _compressed(root: Path, family: str, *stages: dict[str, Any], **options: Any) -> Path:
    recipe = root / "recipe.yaml"
    table = [{"solver": "nearest", "schemes": schemes} for schemes in stages]
    recipe.write_text(yaml.safe_dump({"stages": table}, sort_keys=False))
    dense = save_tiny(family, root / "dense", **options)
    return rarefy.compress(dense, recipe, root / "out").path


def _executed(family: str) -> int:
    """FLOPs of one forward pass as torch sees them, without the products of rotary angles."""
    _, model = tiny(family)
    model.set_attn_implementation("eager")
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    total = counter.get_total_flops()
    for name, flops in counter.get_flop_counts().items():
        if name.endswith("rotary_emb"):
            total -= sum(flops.values())
    return total


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_flops_equal_those_that_torch_counts(family):
    _, model = tiny(family)
    assert TOKENS * count(model).flops(TOKENS) == _executed(family)


def test_counts_of_a_dense_model_by_hand():
    """Width 64, 2 of 4 key/value heads, MLP 96, 3 blocks, 320 words, head apart."""
    _, model = tiny("llama")
    found = count(model)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert found.linear == 3 * block
    assert found.head == 320 * 64
    assert found.multiplied == found.multiplied_nonzero == 3 * block + 320 * 64
    assert found.parameters == 3 * (block + 2 * 64) + 64 + 2 * 320 * 64
    assert found.nonzero == found.parameters == sum(p.numel() for p in model.parameters())
    assert found.attention == 4 * 3 * 64
    assert found.read_bytes == 4 * (found.parameters - 320 * 64)
    assert found.cache_bytes == 2 * 3 * 32 * 4
    assert found.flops(10) - found.flops(0) == 10 * found.attention
    assert found.flops_prefill(1) == found.flops(1)
    assert found.flops_prefill(8) == 8 * found.flops(8) - 7 * 2 * 320 * 64


def test_a_tied_head_is_one_tensor_and_one_product():
    _, model = tiny("qwen2")
    found = count(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.multiplied == found.linear + 320 * 64
    assert found.read_bytes == 4 * found.parameters


def test_zeros_are_seen_and_skipped_in_the_effective_count_only():
    _, model = tiny("llama")
    before = count(model)
    model.model.layers[1].mlp.up_proj.weight.data[:10] = 0
    model.model.embed_tokens.weight.data[0] = 0
    found = count(model)
    assert before.nonzero - found.nonzero == 10 * 64 + 64
    assert found.flops(7) == before.flops(7)
    assert before.flops_effective(7) - found.flops_effective(7) == 2 * 10 * 64


@pytest.mark.parametrize("split", [False, True])
def test_routed_experts_count_for_the_chosen_share(split):
    _, model = tiny("mixtral")
    if split:
        from rarefy.maps.catalogue import map_for

        experts = map_for(model.config).experts
        for block in model.model.layers:
            split_experts(block, experts)
    found = count(model)
    attention, expert, router = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96, 4 * 64
    assert found.linear == 2 * (attention + 4 * expert + router)
    assert found.multiplied == 2 * (attention + 2 * expert + router) + 320 * 64


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [{"*": HALF}]),
        ("llama", [{"*": {"format": "sparse", "kept": 2, "of": 4}}, {"*": INT4}]),
        ("gpt2", [{"*": HALF}]),
        ("qwen2", [{"*": {**INT4, "bits": 3}, "model.embed_tokens": {**INT4, "bits": 3}}]),
    ],
)
def test_packed_zeros_are_those_of_the_decoded_copy(tmp_path, family, stages):
    folder = _compressed(tmp_path, family, *stages)
    decoded = rarefy.export(folder, tmp_path / "decoded", dtype="float32")
    packed, dense = load_model(folder), load_model(decoded)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    found, expected = count(packed), count(dense)
    assert found.nonzero < found.parameters
    assert asdict(found) == asdict(expected) | {"read_bytes": found.read_bytes}
    assert found.read_bytes < expected.read_bytes / 1.5


def test_a_container_that_is_decoded_on_loading_counts_as_dense(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = _compressed(tmp_path, "llama", {"*": INT4})
    decoded = rarefy.export(folder, tmp_path / "decoded", dtype="float32")
    found = count(load_model(folder))
    assert found == count(load_model(decoded))
    assert found.parameters == count(tiny("llama")[1]).parameters > found.nonzero


def test_half_sparse_is_half_of_the_products(tmp_path):
    model = load_model(_compressed(tmp_path, "llama", {"*": HALF}))
    found = count(model)
    assert found.parameters - found.nonzero == found.linear / 2
    assert found.flops(0) - found.flops_effective(0) == found.linear


def test_low_rank_counts_its_factors(tmp_path):
    model = load_model(_compressed(tmp_path, "llama", {"*": THIN}))
    factored = [m for m in model.modules() if isinstance(m, Factored)]
    expected = sum(m.first.out_features * sum(m.weight.shape) for m in factored)
    found = count(model)
    assert len(factored) == 21
    assert found.linear == expected
    assert 0.47 < expected / count(tiny("llama")[1]).linear <= 0.5
    assert found.multiplied == expected + found.head


def test_blocks_with_fewer_heads_attend_for_less(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    stage = {"surgery": "l2", "heads": 0.5}
    recipe.write_text(yaml.safe_dump({"stages": [stage]}))
    folder = rarefy.compress(save_tiny("llama", tmp_path / "dense"), recipe, tmp_path / "out").path
    found, dense = count(load_model(folder)), count(tiny("llama")[1])
    blocks = load_model(folder).model.layers
    assert found.attention == 4 * sum(b.self_attn.q_proj.out_features for b in blocks)
    assert found.attention < dense.attention
    assert found.cache_bytes < dense.cache_bytes


def _speed() -> Speed:
    return Speed(
        device="cpu", threads=1, prompt_tokens=8, new_tokens=5, load_s=1.0, ttft_s=0.5,
        prefill_tok_s=16.0, decode_tok_s=4.0, ttft_runs=(0.5,), decode_runs=(4.0,),
        peak_bytes=7, baseline_bytes=1, kernel="",
    )  # fmt: skip


def test_cost_puts_the_parts_together(tmp_path):
    folder = save_tiny("llama", tmp_path / "m", dtype=torch.float16)
    model, size = load_model(folder).float(), footprint(folder)
    measured = Measured(_speed(), Energy(2.5, "modelled", ""), 30.0, 99, PEAKS)
    found, counts = cost(model, size, measured, tokens=10), count(model)
    assert found.parameters == size.parameters
    assert found.disk_bytes == size.disk_bytes
    assert found.bits_linear == found.bits_model == 16
    assert found.flops == found.flops_effective == counts.flops(10)
    assert found.latency_s == 0.5 + 4 / 4.0
    assert found.mfu == pytest.approx(counts.flops_prefill(8) / 0.5 / 1e9)
    per_token = counts.read_bytes + 10.5 * counts.cache_bytes
    assert found.mbu == pytest.approx(4.0 * per_token / 1e8)
    assert (found.compress_s, found.compress_peak_bytes, found.peak_bytes) == (30.0, 99, 7)
    assert (found.joules_per_token, found.energy_source) == (2.5, "modelled")


def test_what_was_not_measured_is_none(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    found = cost(load_model(folder), footprint(folder), Measured(peaks=PEAKS))
    absent = {key for key, value in asdict(found).items() if value is None}
    assert absent == {
        "ratio_stored", "ttft_s", "prefill_tok_s", "decode_tok_s", "latency_s", "peak_bytes", "mfu",
        "mbu", "compress_s", "compress_peak_bytes", "joules_per_token",
    }  # fmt: skip
    assert found.energy_source == "none"
    assert found.tokens == 512


def test_peaks_are_beyond_what_a_layer_reaches_and_measured_once(monkeypatch):
    device = torch.device("cpu")
    found = peaks(device)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e12
    assert found.threads == torch.get_num_threads()
    monkeypatch.setattr(hardware, "_best", lambda *_: pytest.fail("measured twice"))
    assert peaks(device) is found


def test_kernel_time_gives_the_peak(monkeypatch):
    monkeypatch.setattr(hardware, "_best", lambda *_: 0.5)
    monkeypatch.setattr(hardware, "_SIDE_CPU", 10)
    monkeypatch.setattr(hardware, "_READ", 1 << 16)
    found = hardware._measured.__wrapped__(torch.device("cpu"), 1)
    assert found.flops == 2 * 1000 / 0.5
    assert found.bandwidth == (1 << 16) / 0.5


@pytest.mark.slow
def test_the_default_model_by_arithmetic():
    """30 blocks of width 576, 9 and 3 heads of 64, MLP 1536, 49,152 words, tied."""
    from rarefy.checkpoint.resolve import resolve

    found = count(load_model(resolve("demo")))
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert found.linear == 30 * block == 106_168_320
    assert found.multiplied == found.linear + 49_152 * 576
    assert found.parameters == 134_515_008
    assert found.attention == 4 * 30 * 576
    assert found.cache_bytes == 2 * 23_040
