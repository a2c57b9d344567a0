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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from rarefy.errors import RarefyError
from rarefy.resources import peak_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from rarefy.runtime.decoder import Decoder

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
        engine: "transformers", or "native" where the compiled decoder ran; see ``measure``.
        obstacle: why the native engine was not used although it was asked for; else empty.
        token_bytes: read to make one token: weights as they are held, and keys and values in the
            middle of the answer.
        phases: share of the decoding time by phase; empty unless native.
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
    engine: str = "transformers"
    obstacle: str = ""
    token_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes per second that making tokens read."""
        return self.token_bytes * self.decode_tok_s


def measure(
    folder: Path,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    threads: int | None = None,
    runs: int = _RUNS,
    engine: str = "transformers",
    int8: bool = False,
) -> Speed:
    """Measure one model in a process of its own. Interleave calls (A B A B) so that drift cancels.

    Args:
        folder: a model folder.
        prompt_tokens: length of the prompt.
        new_tokens: tokens made, at least 2.
        threads: CPU threads; PyTorch's default when None.
        runs: timed, after one that is not.
        engine: "transformers", whose own forward makes the tokens with weights in float32, or
            "native", the compiled decoder with weights as they are stored; what that refuses
            falls back to the former.
        int8: round the inputs of integer matrices to 8 bits (the native engine only).

    Raises:
        RarefyError: the process failed; its last line of output is quoted.
    """
    command = [sys.executable, "-m", "rarefy.evaluate.speed", str(folder)]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--threads", str(threads or 0), "--runs", str(runs)]
    command += ["--engine", engine, *(["--int8"] if int8 else [])]
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


def _measure_here(given: argparse.Namespace) -> Speed:
    """Load, warm up and time the model in this process."""
    import torch

    from rarefy.checkpoint.load import load_model
    from rarefy.runtime.decoder import Decoder, open_loop

    if given.threads:
        torch.set_num_threads(given.threads)
    baseline, start = peak_memory(), time.perf_counter()
    obstacle, loop = "", None
    if given.engine == "native":
        capacity = given.prompt_tokens + given.new_tokens
        loop, obstacle = open_loop(given.folder, capacity, int8=given.int8)
    model = load_model(given.folder) if loop is None else loop.model
    load_s, device = time.perf_counter() - start, model.device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, given.prompt_tokens), generator=generator).to(device)
    native = isinstance(loop, Decoder)
    generate = _decode if native else _generate
    player: Any = loop if native else model
    generate(player, prompt, given.new_tokens)
    if native:
        player.native.profile()  # counts from here
    runs = [generate(player, prompt, given.new_tokens) for _ in range(given.runs)]
    cuda = device.type == "cuda"
    one = Speed(
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        threads=torch.get_num_threads(),
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.new_tokens,
        load_s=load_s,
        ttft_s=0.0,
        prefill_tok_s=0.0,
        decode_tok_s=0.0,
        ttft_runs=tuple(first for first, _ in runs),
        decode_runs=tuple((given.new_tokens - 1) / rest for _, rest in runs),
        peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else peak_memory(),
        baseline_bytes=0 if cuda else baseline,
        kernel=kernel_text(model),
        engine="native" if native else "transformers",
        obstacle=obstacle,
        token_bytes=token_bytes(model, given.prompt_tokens + given.new_tokens // 2),
        phases=player.native.profile() if native else {},
    )
    return merge([one])


def token_bytes(model: Any, context: int) -> int:
    """Bytes read to make one token of a dense-attention decoder at a context of some tokens."""
    from itertools import chain

    from rarefy.maps.model_map import dims_of

    def of(module: torch.nn.Module) -> dict[int, int]:
        tensors = chain(module.parameters(), module.buffers())
        return {tensor.data_ptr(): tensor.nbytes for tensor in tensors}

    embedding, head = of(model.get_input_embeddings()), of(model.get_output_embeddings())
    # A head without tensors of its own multiplies by the embedding's.
    shared = set(head) or set(embedding)
    looked_up = sum(size for place, size in embedding.items() if place not in shared)
    held = sum(of(model).values()) - looked_up
    layers = int(model.config.get_text_config().num_hidden_layers)
    return held + context * layers * 2 * dims_of(model.config).width("kv") * 4


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


def _decode(decoder: Decoder, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """The same with the native decoder."""
    from rarefy.runtime.sampling import Sampling

    decoder.reset()
    ids = prompt[0].tolist()
    tokens = decoder.stream(ids, Sampling(new_tokens))
    start = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - start, time.perf_counter() - first


def kernel_text(model: torch.nn.Module) -> str:
    """Name the modules that multiply by weights and how many there are of each.

    A packed module may carry an attribute ``kernel`` (text), which is shown beside its class.
    """
    import torch

    from rarefy.runtime.factored import Factored
    from rarefy.runtime.packed import PackedMatrix, TiedHead

    def name(module: torch.nn.Module) -> str:
        if type(module) is torch.nn.Linear:
            return f"Linear {str(module.weight.dtype).removeprefix('torch.')}"
        detail = getattr(module, "kernel", None)
        return f"{type(module).__name__} ({detail})" if detail else type(module).__name__

    def multiplies(module: torch.nn.Module) -> bool:
        return isinstance(module, (torch.nn.Linear, PackedMatrix, TiedHead, Factored))

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
    parser.add_argument("--engine", choices=("transformers", "native"), default="transformers")
    parser.add_argument("--int8", action="store_true")
    given = parser.parse_args()
    if given.int8 and given.engine != "native":
        parser.error("--int8 goes with --engine native")
    one = _measure_here(given)
    print(json.dumps(asdict(one)))


if __name__ == "__main__":
    main()
