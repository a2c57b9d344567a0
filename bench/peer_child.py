"""llm-compressor in its own environment, started by peer_gptq.py and peer_pruning.py.

    .peer-venv/bin/python bench/peer_child.py JOB.json ANSWER.json

The compressed weights are written as a plain fp32 checkpoint that stock transformers opens, so that
both sides are judged by the same evaluator. Nothing of rarefy is imported.
"""

from __future__ import annotations

import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Compress, time, write."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    ids = load_file(job["tokens"])["ids"]
    rows = ids.tolist()
    mask = [[1] * len(row) for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": mask})
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    method = job["method"]
    recipe = modifier(method)
    probe = next(name for name, _ in model.named_parameters() if name.endswith("q_proj.weight"))
    before = model.get_parameter(probe).detach().clone()
    after_load = peak()
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=ids.shape[0],
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    seconds = time.perf_counter() - start
    answer = {
        "seconds": seconds,
        "peak_bytes": peak(),
        "after_load_bytes": after_load,
        "threads": torch.get_num_threads(),
        "settings": {
            key: str(getattr(recipe, key))
            for key in ("block_size", "dampening_frac", "actorder", "sparsity", "mask_structure")
            if hasattr(recipe, key)
        },
        "versions": {
            name: metadata.version(name)
            for name in ("llmcompressor", "compressed-tensors", "transformers", "torch", "datasets")
        },
    }
    found = dict(model.named_parameters())
    if torch.equal(before, found[probe]):
        sys.exit(f"{probe} was not changed")
    start = time.perf_counter()
    answer |= write_dense(job, found)
    # Work for the evaluator alone, which the process would not do otherwise.
    answer["export_seconds"] = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps(answer))


def modifier(method: dict[str, Any]) -> Any:
    """The peer's recipe: {"name": "gptq", "bits"}, {"name": "wanda" or "sparsegpt", "sparsity"}."""
    if method["name"] == "gptq":
        weights = QuantizationArgs(
            num_bits=method["bits"], type="int", symmetric=False, strategy="group", group_size=64
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method["name"]]
    return kind(sparsity=method["sparsity"], targets=["Linear"], ignore=["re:.*lm_head"])


def write_dense(job: dict[str, Any], found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Put the weights into a fresh dense model and save it; return what they are found to be."""
    plain = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    levels, zeros, count = 0, 0, 0
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            value = found[name]
            if name.endswith("down_proj.weight"):
                levels = max(levels, *(len(row[:64].unique()) for row in value[:16]))
            if name.endswith("_proj.weight"):
                zeros, count = zeros + int((value == 0).sum()), count + value.numel()
            parameter.copy_(value)
    bits = job["method"].get("bits")
    if bits and levels > 2**bits:
        sys.exit(f"the weights are not on a {bits}-bit grid: {levels} levels in a group")
    plain.save_pretrained(job["out"])
    return {"levels": levels, "zeros": zeros / count}


if __name__ == "__main__":
    main()
