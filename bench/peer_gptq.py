"""GPTQ beside llm-compressor's: same model, same tokens, same evaluator, one run.

    python bench/peer_gptq.py [--peer-venv DIR] [--calibration NAME|FILE] [--out FILE.json]

llm-compressor lives in a virtual environment of its own, which is made when it is missing. The two
take turns (peer 4 bits, rarefy 4 bits, peer 3 bits, rarefy 3 bits), each in a fresh process with
nothing beside it. Seconds are those of the call itself: for the peer without loading the model and
reading the text, for rarefy with both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    OUT,
    ROOT,
    Criterion,
    close,
    compress_in_child,
    machine,
    matmul_peak,
    run_child,
    show,
)
from safetensors.torch import save_file
from transformers import AutoTokenizer

import rarefy
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora
from rarefy.data.tokens import calibration

PEER = "llmcompressor==0.14.0.1"
TORCH = "torch==2.13.0"
LIMIT, GOAL = 0.55, 0.45


def main() -> None:
    """Compress in turns, evaluate all, judge."""
    options = parse()
    source = resolve(options.model)
    tokens = tokens_of(source, options)
    report: dict[str, Any] = {"bench": "peer_gptq", "machine": machine(options.seed)}
    report["calibration"] = {
        "corpus": tokens.corpus, "shape": list(tokens.ids.shape), "sha256": tokens.sha256,
        "sample": tokens.sample,
    }  # fmt: skip
    python = peer_python(options.peer_venv)
    with tempfile.TemporaryDirectory(prefix="rarefy-peer-", dir=options.work) as folder:
        work = Path(folder)
        save_file({"ids": tokens.ids}, work / "tokens.safetensors")
        peak = matmul_peak()
        runs = []
        for bits in (4, 3):
            runs.append(peer(python, source, bits, work))
            runs.append(ours(source, f"gptq-int{bits}-g64", work, options))
            if runs[-1]["tokens_sha256"] != tokens.sha256:
                sys.exit("the two sides were given different tokens")
        runs.append(ours(source, "rtn-int4-g64", work, options))
        peak = max(peak, matmul_peak())
        for run in runs:
            run |= quality(work / run["name"], source, options.windows)
    report |= {"matmul_gflops": peak, "work": floor(source, tokens.ids.shape), "runs": runs}
    total = report["work"]["flop"]
    for run in runs:
        run["share_of_peak"] = total / run["seconds"] / (peak * 1e9) if run["bits"] else None
    table(report)
    close(options.out, report, judge({run["name"]: run for run in runs}))


def parse() -> argparse.Namespace:
    """Options; the defaults are the published setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".peer-venv")
    parser.add_argument("--calibration", default="web", help="corpus name or file")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 1024), metavar=("N", "L"))
    parser.add_argument("--work", type=Path, help="folder for the results (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "peer_gptq.json")
    return parser.parse_args()


def tokens_of(source: Path, options: argparse.Namespace) -> Any:
    """The calibration rows, as rarefy itself will cut them."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = corpora.load(options.calibration, tokenizer)
    return calibration(corpus, tokenizer, options.sequences, options.length, options.seed)


def peer_python(venv: Path) -> Path:
    """The interpreter of the peer's environment, which is made if it is missing."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making {venv} (a download of some hundred megabytes)")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        for package in (TORCH, PEER):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def peer(python: Path, source: Path, bits: int, work: Path) -> dict[str, Any]:
    """Run llm-compressor; its tokenizer files are added so that the evaluator opens the result."""
    name = f"llm-compressor int{bits}"
    order, answer = work / f"peer{bits}.job.json", work / f"peer{bits}.answer.json"
    job = {"model": str(source), "tokens": str(work / "tokens.safetensors"), "bits": bits}
    order.write_text(json.dumps(job | {"out": str(work / name)}))
    child = Path(__file__).with_name("peer_child.py")
    process = run_child(
        [python, child, order, answer], work / f"peer{bits}.log", {"HF_HUB_OFFLINE": "1"}
    )
    for pattern in ("tokenizer*", "chat_template*"):
        for file in source.glob(pattern):
            shutil.copyfile(file, work / name / file.name)
    found: dict[str, Any] = json.loads(answer.read_text())
    process -= found["export_seconds"]
    return {"name": name, "bits": bits, "process_seconds": process} | found


def ours(source: Path, recipe: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run rarefy."""
    job = {
        "model": str(source), "recipe": recipe, "out": str(work / recipe),
        "text": options.calibration, "sequences": options.sequences, "length": options.length,
        "seed": options.seed,
    }  # fmt: skip
    bits = int(recipe[8]) if recipe.startswith("gptq") else 0
    return {"name": recipe, "bits": bits} | compress_in_child(job, work)


def quality(folder: Path, source: Path, windows: tuple[int, int]) -> dict[str, Any]:
    """Distances to the dense model on held-out text."""
    done = rarefy.evaluate(
        folder, source, text="wiki", sequences=windows[0], length=windows[1], speed=False
    ).report()["quality"]
    names = ("kl_mean", "perplexity", "perplexity_dense", "agreement")
    return {name: done[name] for name in names}


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


def table(report: dict[str, Any]) -> None:
    """Print the result."""
    work, peak = report["work"], report["matmul_gflops"]
    print(
        f"floor {work['forward'] / 1e12:.2f} + {work['grams'] / 1e12:.2f} TFLOP; "
        f"fp32 matrix product {peak:.0f} GFLOP/s"
    )
    head = ("", "KL to dense", "95 %", "ppl", "top-1", "s", "process s", "peak GB", "% of peak")
    rows = []
    for run in sorted(report["runs"], key=lambda one: one["kl_mean"]["value"]):
        kl, share = run["kl_mean"], run["share_of_peak"]
        rows.append(
            (run["name"], kl["value"], f"{kl['low'] or 0:.4f} to {kl['high'] or 0:.4f}",
             run["perplexity"]["value"], run["agreement"]["value"], run["seconds"],
             run["process_seconds"], run["peak_bytes"] / 1e9,
             f"{100 * share:.1f}" if share else "")
        )  # fmt: skip
    show(f"dense perplexity {report['runs'][0]['perplexity_dense']['value']:.3f}", head, rows)


def judge(runs: dict[str, dict[str, Any]]) -> list[Criterion]:
    """Quality and speed at both widths; the goal is reported beside the limit."""
    criteria = []
    for bits in (4, 3):
        theirs, own = runs[f"llm-compressor int{bits}"], runs[f"gptq-int{bits}-g64"]
        mine, limit = own["kl_mean"]["value"], theirs["kl_mean"]["value"]
        name = f"int{bits}: KL to dense"
        criteria.append(Criterion(name, mine, f"<= {limit:.4f} (peer)", mine <= limit))
        share = own["seconds"] / theirs["seconds"]
        name = f"int{bits}: time over the peer's"
        criteria.append(Criterion(name, share, f"<= {LIMIT}", share <= LIMIT))
        criteria.append(Criterion(name, share, f"<= {GOAL}", share <= GOAL, goal=True))
    return criteria


if __name__ == "__main__":
    main()
