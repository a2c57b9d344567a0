"""Speed and memory, each model in a fresh process so that neither sees the other's memory.

TTFT runs from the request to the first new token and includes the prefill. Every run takes the
same random prompt and makes a fixed number of tokens greedily; no token ends it. Unstructured
zeros and unpacked weights give no speed-up, so the kernel that ran is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from rarefy.errors import RarefyError
from rarefy.resources import peak_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

_RUNS = 3


@dataclass(frozen=True)
class Speed:
    """One model's speed at batch 1; medians, with the single runs beside them.

    Attributes:
        load_s: reading the folder into memory, in seconds.
        ttft_s: time to first token. prefill_tok_s, decode_tok_s: tokens per second.
        peak_bytes: highest resident memory, loading included (on CUDA: highest allocated).
        baseline_bytes: resident before loading: Python and its libraries (on CUDA: 0).
        kernel: the modules that multiply by weights, for example "210 x QuantLinear".
    """

    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    load_s: float
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    ttft_runs: tuple[float, ...]
    decode_runs: tuple[float, ...]
    peak_bytes: int
    baseline_bytes: int
    kernel: str


def measure(
    folder: Path,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    threads: int | None = None,
    runs: int = _RUNS,
) -> Speed:
    """Measure one model in a process of its own. Interleave calls (A B A B) so that drift cancels.

    Args:
        folder: a model folder.
        prompt_tokens: length of the prompt.
        new_tokens: tokens made, at least 2.
        threads: CPU threads; PyTorch's default when None.
        runs: timed, after one that is not.

    Raises:
        RarefyError: the process failed; its last line of output is quoted.
    """
    command = [sys.executable, "-m", "rarefy.evaluate.speed", str(folder)]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--threads", str(threads or 0), "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RarefyError(f"measuring the speed of {folder} failed: {last}")
    return TypeAdapter(Speed).validate_json(done.stdout.strip().splitlines()[-1])


def merge(rounds: Sequence[Speed]) -> Speed:
    """Join several measurements of one model: medians over all runs, the highest peak."""
    ttft = tuple(run for one in rounds for run in one.ttft_runs)
    decode = tuple(run for one in rounds for run in one.decode_runs)
    return replace(
        rounds[0],
        load_s=statistics.median(one.load_s for one in rounds),
        ttft_s=statistics.median(ttft),
        prefill_tok_s=rounds[0].prompt_tokens / statistics.median(ttft),
        decode_tok_s=statistics.median(decode),
        ttft_runs=ttft,
        decode_runs=decode,
        peak_bytes=max(one.peak_bytes for one in rounds),
        baseline_bytes=min(one.baseline_bytes for one in rounds),
    )


def _measure_here(
    folder: Path, prompt_tokens: int, new_tokens: int, threads: int, count: int
) -> Speed:
    """Load, warm up and time the model in this process, ``count`` times."""
    import torch

    from rarefy.checkpoint.load import load_model

    if threads:
        torch.set_num_threads(threads)
    baseline, start = peak_memory(), time.perf_counter()
    model = load_model(folder)
    load_s, device = time.perf_counter() - start, model.device
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(device)
    _generate(model, prompt, new_tokens)
    runs = [_generate(model, prompt, new_tokens) for _ in range(count)]
    cuda = device.type == "cuda"
    one = Speed(
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        threads=torch.get_num_threads(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        load_s=load_s,
        ttft_s=0.0,
        prefill_tok_s=0.0,
        decode_tok_s=0.0,
        ttft_runs=tuple(first for first, _ in runs),
        decode_runs=tuple((new_tokens - 1) / rest for _, rest in runs),
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else peak_memory(),
        baseline_bytes=0 if cuda else baseline,
        kernel=kernel_text(model),
    )
    return merge([one])


def _generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Make tokens greedily; return seconds to the first token and from there to the last."""
    import torch

    def now() -> float:
        if prompt.device.type == "cuda":
            torch.cuda.synchronize(prompt.device)
        return time.perf_counter()

    with torch.inference_mode():
        start = now()
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = now()
        for _ in range(new_tokens - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return first - start, now() - first


def kernel_text(model: torch.nn.Module) -> str:
    """Name the modules that multiply by weights and how many there are of each.

    A packed module may carry an attribute ``kernel`` (text), which is shown beside its class.
    """
    import torch

    def name(module: torch.nn.Module) -> str:
        if type(module) is torch.nn.Linear:
            return f"Linear {str(module.weight.dtype).removeprefix('torch.')}"
        detail = getattr(module, "kernel", None)
        return f"{type(module).__name__} ({detail})" if detail else type(module).__name__

    def multiplies(module: torch.nn.Module) -> bool:
        ours = type(module).__module__.startswith("rarefy.runtime")
        return ours or isinstance(module, torch.nn.Linear)

    counts = Counter(name(module) for module in model.modules() if multiplies(module))
    return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())


def main() -> None:
    """Entry of the fresh process: print a ``Speed`` as one line of JSON."""
    parser = argparse.ArgumentParser(prog="rarefy.evaluate.speed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--runs", type=int, default=_RUNS)
    given = parser.parse_args()
    one = _measure_here(
        given.folder, given.prompt_tokens, given.new_tokens, given.threads, given.runs
    )
    print(json.dumps(asdict(one)))


if __name__ == "__main__":
    main()
