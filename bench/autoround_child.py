"""auto-round in its own environment, started by peer_signround.py.

    .autoround-venv/bin/python bench/autoround_child.py JOB.json ANSWER.json

The job holds model, tokens, out and method, {"name": "signround", "bits", "steps"}. The rounded
weights are written as a plain fp32 checkpoint that stock transformers opens, so that both sides are
judged by the same evaluator. Nothing of rarefy is imported.
"""

from __future__ import annotations

import json
import re
import sys
import time
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP, BATCH = 64, 8


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Compress, time, write."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    ids = load_file(job["tokens"])["ids"].long()
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)
    ]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dense = hashes(model)
    after_load = peak()
    settings = {
        "bits": job["method"]["bits"], "group_size": GROUP, "sym": False,
        "iters": job["method"]["steps"], "nsamples": ids.shape[0], "seqlen": ids.shape[1],
        "batch_size": BATCH, "device_map": "cpu",
        # Left to itself it turns the model into bf16 wherever the processor knows that type, the
        # embeddings and norms, too; rarefy computes in fp32.
        "amp": False,
    }  # fmt: skip
    start = time.perf_counter()
    run = AutoRound(model, tokenizer, dataset=batches, **settings)
    model, layers = run.quantize()
    seconds = time.perf_counter() - start
    answer = {
        "seconds": seconds,
        "peak_bytes": peak(),
        "after_load_bytes": after_load,
        "threads": torch.get_num_threads(),
        "settings": settings | defaults(run, layers),
        "versions": {
            name: metadata.version(name) for name in ("auto-round", "torch", "transformers")
        },
    }
    answer |= check(dense, model, job["method"]["bits"])
    start = time.perf_counter()
    write_dense(job, dict(model.named_parameters()))
    # Work for the evaluator alone, which the process would not do otherwise.
    answer["export_seconds"] = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps(answer))


def defaults(run: Any, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the peer chose for itself."""
    quantized = [layer for layer in layers.values() if layer["bits"] < 16]
    tuner = run.quantize_config
    return {
        "lr": tuner.lr,
        "minmax_lr": tuner.minmax_lr,
        "gradient_accumulate_steps": tuner.gradient_accumulate_steps,
        "enable_minmax_tuning": tuner.enable_minmax_tuning,
        "enable_quanted_input": tuner.enable_quanted_input,
        "keeps_best_step": not tuner.not_use_best_mse,
        "torch_compile": run.enable_torch_compile,
        "dtype": str(run.model.dtype),
        "scale_dtype": str(quantized[0]["scale_dtype"]),
        "matrices": len(quantized),
    }


def hashes(model: torch.nn.Module) -> dict[str, str]:
    """A hash of every parameter: a second copy would count towards the peak memory."""
    return {
        name: blake2b(value.detach().contiguous().numpy()).hexdigest()
        for name, value in model.named_parameters()
    }


def check(dense: dict[str, str], model: torch.nn.Module, bits: int) -> dict[str, int]:
    """Every linear of the blocks is on its grid, and nothing else was changed."""
    levels, after = 0, hashes(model)
    for name, value in model.named_parameters():
        changed = after[name] != dense[name]
        if changed != name.endswith("_proj.weight"):
            sys.exit(f"{name} was {'changed' if changed else 'not changed'}")
        if changed:
            levels = max(levels, *(len(row[:GROUP].unique()) for row in value.detach()[:16]))
    if levels > 2**bits:
        sys.exit(f"the weights are not on a {bits}-bit grid: {levels} levels in a group")
    return {"levels": levels}


def write_dense(job: dict[str, Any], found: dict[str, torch.Tensor]) -> None:
    """Put the weights into a fresh dense model and save it."""
    plain = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(found[name])
    plain.save_pretrained(job["out"])


if __name__ == "__main__":
    main()
