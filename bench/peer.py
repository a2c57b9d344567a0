"""What the comparisons with peers share: their environments, their runs, ours, and the judge.

A peer lives in a virtual environment of its own, which is made when it is missing. Each run is a
fresh process with nothing beside it. Seconds are those of the call itself: for the peer
without loading the model and reading the text, for rarefy with both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import OUT, ROOT, compress_in_child, machine, matmul_peak, run_child, show
from safetensors.torch import save_file
from transformers import AutoTokenizer

import rarefy
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora
from rarefy.data.tokens import calibration

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A library that is run beside rarefy.

    Attributes:
        name: as it is called in the tables.
        package: what pip installs.
        folder: default name of its virtual environment.
        child: the script that runs in it.
    """

    name: str
    package: str
    folder: str
    child: str


LLM_COMPRESSOR = Peer("llm-compressor", "llmcompressor==0.14.0.1", ".peer-venv", "peer_child.py")
AUTO_ROUND = Peer("auto-round", "auto-round==0.16.1", ".autoround-venv", "autoround_child.py")


def parser(description: str, out: str, side: Peer = LLM_COMPRESSOR) -> argparse.ArgumentParser:
    """Options; the defaults are the published setting."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", default="demo")
    found.add_argument("--peer-venv", type=Path, default=ROOT / side.folder)
    found.add_argument("--calibration", default="web", help="corpus name or file")
    found.add_argument("--sequences", type=int, default=64)
    found.add_argument("--length", type=int, default=512)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--windows", type=int, nargs=2, default=(8, 1024), metavar=("N", "L"))
    found.add_argument("--work", type=Path, help="folder for the results (default: temporary)")
    found.add_argument("--out", type=Path, default=OUT / out)
    return found


def tokens_of(source: Path, options: argparse.Namespace) -> Any:
    """The calibration rows, as rarefy itself will cut them."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = corpora.load(options.calibration, tokenizer)
    return calibration(corpus, tokenizer, options.sequences, options.length, options.seed)


def peer_python(venv: Path, side: Peer) -> Path:
    """The interpreter of a peer's environment, which is made if it is missing."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making {venv} (a download of some hundred megabytes)")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        for package in (TORCH, side.package):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def peer_name(side: Peer, method: dict[str, Any]) -> str:
    """What a peer's row is called."""
    return f"{side.name} {method['name']}" + (f" int{method['bits']}" if "bits" in method else "")


def peer(
    side: Peer, python: Path, source: Path, method: dict[str, Any], work: Path
) -> dict[str, Any]:
    """Run a peer; the tokenizer's files are added so that the evaluator opens the result.

    Args:
        side: which. python: its interpreter. source: the dense model.
        method: {"name": ..., ...}, see the peer's child.
        work: holds tokens.safetensors; receives the result.
    """
    name = peer_name(side, method)
    label = name.replace(" ", "-")
    order, answer = work / f"{label}.job.json", work / f"{label}.answer.json"
    job = {"model": str(source), "tokens": str(work / "tokens.safetensors"), "method": method}
    order.write_text(json.dumps(job | {"out": str(work / name)}))
    child = Path(__file__).with_name(side.child)
    process = run_child(
        [python, child, order, answer], work / f"{label}.log", {"HF_HUB_OFFLINE": "1"}
    )
    for pattern in ("tokenizer*", "chat_template*"):
        for file in source.glob(pattern):
            shutil.copyfile(file, work / name / file.name)
    found: dict[str, Any] = json.loads(answer.read_text())
    process -= found["export_seconds"]
    return {"name": name, "process_seconds": process} | found


def ours(
    source: Path, recipe: str, work: Path, options: argparse.Namespace, text: str | None = None
) -> dict[str, Any]:
    """Run rarefy, calibrated on the peer's tokens or on another corpus."""
    job = {
        "model": str(source), "recipe": recipe, "out": str(work / recipe),
        "text": text or options.calibration, "sequences": options.sequences,
        "length": options.length, "seed": options.seed,
    }  # fmt: skip
    return {"name": recipe} | compress_in_child(job, work)


def quality(folder: Path, source: Path, windows: tuple[int, int]) -> dict[str, Any]:
    """Distances to the dense model on held-out text, and bits as stored (16 where dense)."""
    done = rarefy.evaluate(
        folder, source, text="wiki", sequences=windows[0], length=windows[1], speed=False
    ).report()
    names = ("kl_mean", "perplexity", "perplexity_dense", "agreement")
    bits = {"bits_linear": done["footprint"]["bits_linear"]}
    return {name: done["quality"][name] for name in names} | bits


def floor(source: Path, shape: tuple[int, int]) -> dict[str, float]:
    """Arithmetic that no implementation can avoid: one forward pass and the symmetric Grams.

    The forward pass multiplies every weight of the blocks once per token, and attends causally;
    a Gram of n channels is half of a full product, T n^2.
    """
    config = json.loads((source / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, config["num_key_value_heads"] * width
    rows, length = shape
    tokens = rows * length
    weights = hidden * (2 * queries + 2 * keys + 3 * inner)
    forward = layers * tokens * (2 * weights + 2 * length * queries)
    grams = layers * tokens * (2 * hidden**2 + queries**2 + inner**2)
    return {"forward": forward, "grams": grams, "flop": forward + grams}


def in_turns(
    bench: str,
    options: argparse.Namespace,
    pairs: list[tuple[dict[str, Any], str]],
    alone: str,
) -> dict[str, Any]:
    """Run llm-compressor and rarefy in turns on the same tokens, and evaluate all results.

    Args:
        bench: name of the report.
        options: see :func:`parse`.
        pairs: (the peer's method, our recipe).
        alone: a recipe without a peer, for the table.
    """
    source = resolve(options.model)
    tokens = tokens_of(source, options)
    python = peer_python(options.peer_venv, LLM_COMPRESSOR)
    with tempfile.TemporaryDirectory(prefix="rarefy-peer-", dir=options.work) as folder:
        work = Path(folder)
        save_file({"ids": tokens.ids}, work / "tokens.safetensors")
        peak = matmul_peak()
        runs = []
        for method, recipe in pairs:
            runs.append(peer(LLM_COMPRESSOR, python, source, method, work))
            runs.append(ours(source, recipe, work, options))
            if runs[-1]["tokens_sha256"] != tokens.sha256:
                sys.exit("the two sides were given different tokens")
        runs.append(ours(source, alone, work, options))
        peak = max(peak, matmul_peak())
        for run in runs:
            run |= quality(work / run["name"], source, options.windows)
    effort = floor(source, tokens.ids.shape)
    for run in runs:
        paired = run["name"] != alone
        run["share_of_peak"] = effort["flop"] / run["seconds"] / (peak * 1e9) if paired else None
    return {
        "bench": bench,
        "machine": machine(options.seed),
        "calibration": described(tokens),
        "matmul_gflops": peak,
        "work": effort,
        "runs": runs,
    }


def described(tokens: Any) -> dict[str, Any]:
    """Calibration rows, for a report."""
    return {
        "corpus": tokens.corpus,
        "shape": list(tokens.ids.shape),
        "sha256": tokens.sha256,
        "sample": tokens.sample,
    }


def table(report: dict[str, Any]) -> None:
    """Print the result, with the arithmetic that cannot be avoided."""
    work, peak = report["work"], report["matmul_gflops"]
    print(
        f"floor {work['forward'] / 1e12:.2f} + {work['grams'] / 1e12:.2f} TFLOP; "
        f"fp32 matrix product {peak:.0f} GFLOP/s"
    )
    ranking(report["runs"])


def ranking(runs: list[dict[str, Any]]) -> None:
    """Print the runs, the closest to the dense model first."""
    head = ("", "KL to dense", "95 %", "ppl", "top-1", "s", "process s", "peak GB", "% of peak")
    rows = []
    for run in sorted(runs, key=lambda one: one["kl_mean"]["value"]):
        kl, share = run["kl_mean"], run.get("share_of_peak")
        rows.append(
            (run["name"], kl["value"], f"{kl['low'] or 0:.4f} to {kl['high'] or 0:.4f}",
             run["perplexity"]["value"], run["agreement"]["value"], run["seconds"],
             run["process_seconds"], run["peak_bytes"] / 1e9,
             f"{100 * share:.1f}" if share else "")
        )  # fmt: skip
    show(f"dense perplexity {runs[0]['perplexity_dense']['value']:.3f}", head, rows)
