"""What the measurements share: the machine's facts, child processes, criteria, random models."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aside  # noqa: F401
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("out/bench")
CHILD = Path(__file__).with_name("compress_child.py")
_PACKAGES = ("rarefy", "torch", "transformers", "safetensors")
_LAYERS_PER_SHARD = 6


@dataclass(frozen=True)
class Criterion:
    """A condition that the run must meet; a goal is only reported."""

    name: str
    value: float | bool
    limit: str
    met: bool
    goal: bool = False


@dataclass(frozen=True)
class Shape:
    """Dimensions of a random Llama."""

    layers: int
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    intermediate: int = 5632
    vocab: int = 32000


def machine(seed: int) -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {package: metadata.version(package) for package in _PACKAGES},
        "seed": seed,
    }


def matmul_peak(size: int = 2048, rounds: int = 8) -> float:
    """Best fp32 rate of a square matrix product, in GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def run_child(command: Sequence[object], log: Path, env: Mapping[str, str] | None = None) -> float:
    """Run a process to its end, its output in a log; return the seconds it took."""
    start = time.perf_counter()
    with log.open("w") as stream:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            # The child's folder is not searched for modules; see aside.py.
            env={**os.environ, "PYTHONSAFEPATH": "1", **(env or {})},
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"{command[1]} ended with status {done.returncode}; the end of {log}:\n{tail}")
    return time.perf_counter() - start


def compress_in_child(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Compress in a fresh process; return seconds of the call and of the process, and peak memory.

    Args:
        job: see compress_child.py.
        work: folder for the exchange of files and the log.
    """
    name = Path(job["out"]).name
    order, answer = work / f"{name}.job.json", work / f"{name}.answer.json"
    order.write_text(json.dumps(job))
    process = run_child([sys.executable, CHILD, order, answer], work / f"{name}.log")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found | {"process_seconds": process}


def close(out: Path, report: dict[str, Any], criteria: Sequence[Criterion]) -> None:
    """Write the report, print the criteria, and end with status 1 when one is missed."""
    report = report | {"criteria": [asdict(one) for one in criteria]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    rows = [
        ("PASS" if one.met else "MISS", one.name + (" (goal)" if one.goal else ""), one.value,
         one.limit)
        for one in criteria
    ]  # fmt: skip
    show("criteria", ("", "criterion", "value", "limit"), rows)
    print(f"wrote {out}")
    if any(not one.met and not one.goal for one in criteria):
        sys.exit(1)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if type(cell) is float else str(cell) for cell in row))
    # A log has no width of its own; the usual guess of 80 cuts names off.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write_llama(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random bf16 Llama in several shards, holding a few layers at a time."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    parts = list(_parts(shape))
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, generator=generator).mul_(0.02).bfloat16()
            for name, size in part.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=False,
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, vocab_size=shape.vocab,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate, bos_token_id=256, eos_token_id=257,
    ).save_pretrained(folder)  # fmt: skip
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _parts(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of each shard."""
    wide, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    sizes = {
        "input_layernorm": (wide,),
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (narrow, wide),
        "self_attn.v_proj": (narrow, wide),
        "self_attn.o_proj": (wide, wide),
        "post_attention_layernorm": (wide,),
        "mlp.gate_proj": (shape.intermediate, wide),
        "mlp.up_proj": (shape.intermediate, wide),
        "mlp.down_proj": (wide, shape.intermediate),
    }
    for first in range(0, shape.layers, _LAYERS_PER_SHARD):
        yield {
            f"model.layers.{layer}.{name}.weight": size
            for layer in range(first, min(first + _LAYERS_PER_SHARD, shape.layers))
            for name, size in sizes.items()
        }
    yield {
        "model.embed_tokens.weight": (shape.vocab, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (shape.vocab, wide),
    }


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then BOS and EOS."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_words(file: Path, words: int, seed: int = 0) -> Path:
    """Write a text of random words, so that nothing has to be fetched."""
    dice = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = ("".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(words))
    file.write_text(" ".join(text))
    return file
