"""Oracles for what is measured: brute force, closed forms, and folders written by hand."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny, tiny_tokenizer
from transformers import LlamaForCausalLM

from rarefy.errors import RarefyError
from rarefy.evaluate.bootstrap import cluster_bootstrap, cluster_sums
from rarefy.evaluate.distances import compare_logits, summarise
from rarefy.evaluate.footprint import footprint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _logits(seed: int, positions: int = 600, vocabulary: int = 37) -> torch.Tensor:
    return 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def _target(positions: int = 600, vocabulary: int = 37) -> torch.Tensor:
    return torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(9))


def test_distances_equal_torch_distributions():
    dense, other, target = _logits(1), _logits(2), _target()
    found = compare_logits(dense, other, target)
    p = torch.distributions.Categorical(logits=dense.double())
    q = torch.distributions.Categorical(logits=other.double())
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(p, q), **close)
    torch.testing.assert_close(found.nll_dense, -p.log_prob(target), **close)
    torch.testing.assert_close(found.nll_other, -q.log_prob(target), **close)
    change = q.log_prob(target).exp() - p.log_prob(target).exp()
    torch.testing.assert_close(found.delta_p, change, **close)
    same = [int(a.argmax() == b.argmax()) for a, b in zip(dense, other, strict=True)]
    assert found.agree.tolist() == same
    assert 0 < sum(same) < 600


def test_kl_is_from_dense_to_other():
    dense, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    found = compare_logits(dense, other, torch.tensor([0]))
    assert found.kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_equal_logits_are_at_distance_exactly_zero():
    logits, target = 30 * _logits(1), _target()
    quality = summarise([compare_logits(logits, logits.clone(), target)] * 2, [0, 1])
    assert quality.kl_mean.value == quality.kl_max == 0
    assert quality.kl_mean.high == 0
    assert quality.agreement.value == 1
    assert quality.delta_p_rms.value == 0
    assert quality.perplexity == quality.perplexity_dense
    assert quality.kl_histogram.below == quality.predictions == 1200


def test_inputs_are_left_as_they_were():
    dense, other = _logits(1), _logits(2)
    compare_logits(dense, other, _target())
    assert torch.equal(dense, _logits(1)) and torch.equal(other, _logits(2))


def test_shifted_logits_never_give_a_negative_kl():
    logits = _logits(1)
    found = compare_logits(logits, logits + 1000.1, _target())
    assert (found.kl >= 0).all()
    assert found.kl.max() < 1e-3


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        compare_logits(_logits(1), _logits(1, vocabulary=36), _target())


def test_summary_equals_brute_force():
    windows = [compare_logits(_logits(i), _logits(i + 50), _target()) for i in range(4)]
    quality = summarise(windows, [3, 3, 8, 9])
    kl = torch.cat([window.kl for window in windows])
    nll = torch.cat([window.nll_other for window in windows])
    dense = torch.cat([window.nll_dense for window in windows])
    delta = torch.cat([window.delta_p for window in windows])
    assert quality.documents == 3
    assert quality.kl_mean.value == pytest.approx(kl.mean().item())
    assert quality.kl_p99 == pytest.approx(torch.quantile(kl, 0.99).item())
    assert quality.perplexity.value == pytest.approx(nll.mean().exp().item())
    assert quality.log_perplexity_gap.value == pytest.approx((nll - dense).mean().item())
    assert quality.perplexity_ratio.value == pytest.approx((nll - dense).mean().exp().item())
    assert quality.delta_p_rms.value == pytest.approx(delta.square().mean().sqrt().item())
    histogram = quality.kl_histogram
    assert sum(histogram.counts) + histogram.below + histogram.above == len(kl)
    at = int(np.searchsorted(histogram.edges, 1.0)) - 1
    low, high = histogram.edges[at], histogram.edges[at + 1]
    assert histogram.counts[at] == int(((kl >= low) & (kl < high)).sum())


def test_one_document_has_no_interval():
    windows = [compare_logits(_logits(i), _logits(i + 50), _target()) for i in range(2)]
    quality = summarise(windows, [4, 4])
    assert quality.kl_mean.low is None
    assert "one document" in quality.interval


def test_cluster_sums_add_up_rows_by_cluster():
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert cluster_sums(rows, [7, 2, 7]).tolist() == [[3.0, 4.0], [6.0, 8.0]]


def test_bootstrap_interval_covers_as_often_as_it_says():
    """Clusters share a random mean; the interval must see it, and one over tokens would not."""
    rng = np.random.default_rng(0)
    hits = naive = 0
    for trial in range(200):
        means = rng.normal(5.0, 1.0, size=40)
        tokens = means[:, None] + rng.normal(size=(40, 25))
        sums = np.stack([np.full(40, 25.0), tokens.sum(1)], axis=1)
        found = cluster_bootstrap(sums, lambda s: s[:, 1] / s[:, 0], resamples=500, seed=trial)
        hits += found.low <= 5.0 <= found.high
        error = 1.96 * tokens.std() / math.sqrt(tokens.size)
        naive += abs(tokens.mean() - 5.0) <= error
    assert 0.90 <= hits / 200 <= 0.98
    assert naive / 200 < 0.75


def test_bootstrap_is_seeded():
    sums = np.random.default_rng(1).random((9, 2))
    ratio = lambda s: s[:, 1] / s[:, 0]  # noqa: E731
    assert cluster_bootstrap(sums, ratio, seed=3) == cluster_bootstrap(sums, ratio, seed=3)
    assert cluster_bootstrap(sums, ratio, seed=3) != cluster_bootstrap(sums, ratio, seed=4)


def _dense_folder(folder: Path, tie: bool = False) -> Path:
    """Embedding 10 x 8, head, one 16 x 8 linear, one norm, in fp16."""
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.float16),
        "lm_head.weight": torch.zeros(10, 8, dtype=torch.float16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8, dtype=torch.float16),
        "model.norm.weight": torch.zeros(8, dtype=torch.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tie}))
    return folder


def _packed_folder(folder: Path) -> Path:
    """The same model with its linear in int4 (group 8), over two shards, and a stray copy."""
    folder.mkdir()
    linear = "model.layers.0.mlp.up_proj"
    shards = {
        "a.safetensors": {
            "model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.float16),
            "lm_head.weight": torch.zeros(10, 8, dtype=torch.float16),
            f"{linear}.weight_packed": torch.zeros(16, 1, dtype=torch.int32),
            f"{linear}.weight_scale": torch.zeros(16, 1, dtype=torch.float16),
        },
        "b.safetensors": {
            f"{linear}.weight_zero_point": torch.zeros(2, 1, dtype=torch.int32),
            f"{linear}.weight_shape": torch.tensor([16, 8]),
            "model.norm.weight": torch.zeros(8, dtype=torch.float16),
        },
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    index = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({"x": torch.zeros(999)}, folder / "consolidated.safetensors")
    return folder


def test_footprint_of_a_packed_folder_to_the_byte(tmp_path):
    dense = footprint(_dense_folder(tmp_path / "dense"))
    found = footprint(_packed_folder(tmp_path / "packed"), dense)
    linear = 16 * 4 + 16 * 2 + 2 * 4 + 2 * 8
    assert found.files == 2
    assert found.breakdown == {
        "embedding": 160, "head": 160, "linear, compressed": linear, "other": 16,
    }  # fmt: skip
    assert found.payload_bytes == 336 + linear
    folder = tmp_path / "packed"
    on_disk = sum((folder / name).stat().st_size for name in ("a.safetensors", "b.safetensors"))
    assert found.disk_bytes == on_disk
    assert found.parameters == dense.parameters == 80 + 80 + 128 + 8
    assert found.bits_compressed == found.bits_linear == 8 * linear / 128
    assert found.bits_model == 8 * (336 + linear) / 296
    assert found.ratio_16bit == 2 * 296 / on_disk
    assert found.ratio_stored == dense.disk_bytes / on_disk
    assert found.coverage_linear == 1
    assert found.coverage_model == 128 / 296


def test_footprint_of_a_dense_folder(tmp_path):
    found = footprint(_dense_folder(tmp_path / "dense"))
    assert found.bits_model == found.bits_linear == 16
    assert found.bits_compressed is None
    assert found.coverage_linear == 0
    assert found.breakdown["linear, kept"] == 256


def test_footprint_counts_a_tied_head_once(tmp_path):
    found = footprint(_dense_folder(tmp_path / "dense", tie=True))
    assert found.parameters == 80 + 128 + 8
    assert found.payload_bytes == 2 * (80 + 80 + 128 + 8)


def test_footprint_refuses_a_folder_without_weights(tmp_path):
    with pytest.raises(RarefyError, match="no safetensors file"):
        footprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header at all")
    with pytest.raises(RarefyError, match="not a readable safetensors"):
        footprint(tmp_path)


def _other_folder(folder: Path) -> Path:
    """The tiny Llama with its MLPs scaled: another model with the same vocabulary."""
    _, model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 3
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    rng = np.random.default_rng(0)
    rows = ["".join(chr(i) for i in rng.integers(97, 123, size=60)) for _ in range(5)]
    file = tmp_path_factory.mktemp("text") / "random.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return str(file)


def test_dense_against_itself_is_the_floor(tmp_path, text):
    from rarefy.evaluate.run import evaluate

    folder = save_tiny("llama", tmp_path / "dense")
    found = evaluate(folder, folder, text=text, sequences=4, length=16, speed=False)
    assert found.quality.kl_max == 0
    assert found.quality.agreement.value == 1
    assert found.quality.perplexity_ratio.value == 1
    assert found.footprint.ratio_stored == 1
    assert found.protocol.predictions == found.quality.predictions == 4 * 15


def test_evaluation_equals_the_models_own_loss(tmp_path, text):
    from rarefy.data import corpora, tokens
    from rarefy.evaluate.run import evaluate

    dense, other = save_tiny("llama", tmp_path / "dense"), _other_folder(tmp_path / "other")
    seen: list[tuple[str, int, int]] = []
    found = evaluate(
        other, dense, text=text, sequences=5, length=20, speed=False,
        progress=lambda *what: seen.append(what),
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    ids = tokens.held_out(corpora.load(text, tokenizer), tokenizer, 5, 20).ids
    with torch.inference_mode():
        loss = LlamaForCausalLM.from_pretrained(other)(input_ids=ids, labels=ids).loss
    assert found.quality.perplexity.value == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found.quality.kl_mean.low < found.quality.kl_mean.value < found.quality.kl_mean.high
    assert found.quality.documents == 5
    assert seen[-1] == ("windows", 5, 5)
    assert json.loads(json.dumps(found.report()))["quality"]["kl_mean"]["value"] > 0.1


def test_another_vocabulary_is_refused(tmp_path, text):
    from rarefy.evaluate.run import evaluate

    dense, other = (save_tiny("llama", tmp_path / name) for name in ("dense", "other"))
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(RarefyError, match="different vocabularies"):
        evaluate(other, dense, text=text, sequences=2, length=8, speed=False)


def test_a_ruined_model_is_named(tmp_path, text):
    from rarefy.evaluate.run import evaluate

    dense, other = (save_tiny("llama", tmp_path / name) for name in ("dense", "ruined"))
    model = LlamaForCausalLM.from_pretrained(other)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(other)
    with pytest.raises(RarefyError, match=r"ruined.* not finite"):
        evaluate(other, dense, text=text, sequences=2, length=8, speed=False)


def test_speed_comes_from_a_fresh_process(tmp_path):
    from rarefy.evaluate.speed import measure, merge

    ballast = torch.ones(300_000_000)  # 1.2 GB here must not be seen there
    found = measure(save_tiny("llama", tmp_path / "m"), prompt_tokens=8, new_tokens=4, threads=1)
    assert found.peak_bytes < ballast.nbytes
    assert found.peak_bytes >= found.baseline_bytes > 0
    assert found.threads == 1
    assert found.kernel == "22 x Linear float32"
    assert found.prefill_tok_s == pytest.approx(8 / found.ttft_s)
    assert len(found.decode_runs) == 3
    assert found.decode_tok_s == sorted(found.decode_runs)[1]
    assert len(merge([found, found]).ttft_runs) == 6


def test_speed_quotes_what_went_wrong(tmp_path):
    from rarefy.evaluate.speed import measure

    with pytest.raises(RarefyError, match=r"measuring the speed of .*nowhere"):
        measure(tmp_path / "nowhere")
