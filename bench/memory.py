"""Peak memory of GPTQ does not grow with the number of layers.

    python bench/memory.py [--layers 24,48] [--out FILE.json]

Writes random Llama-shaped checkpoints (hidden 2048, bf16; 24 layers are 2.4 GB) into a temporary
folder, compresses each with gptq-int4-g64 in a fresh process, and reads the peak resident size.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    OUT,
    Criterion,
    Shape,
    close,
    compress_in_child,
    machine,
    show,
    write_llama,
    write_words,
)

LIMIT = 1.6e9
CHANGE = 0.05


def main() -> None:
    """Measure every depth and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="24,48", help="depths to compare")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=float, help="also say where the memory goes (seconds)")
    parser.add_argument("--work", type=Path, help="folder for the models (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "memory.json")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.layers.split(",")]
    report: dict[str, Any] = {"bench": "memory", "machine": machine(options.seed), "runs": []}
    for depth in depths:
        with tempfile.TemporaryDirectory(prefix="rarefy-memory-", dir=options.work) as folder:
            report["runs"].append(measure(Path(folder), depth, options))
    head = ("layers", "model GB", "peak GB", "after import GB", "seconds")
    rows = [
        (run["layers"], run["model_bytes"] / 1e9, run["peak_bytes"] / 1e9,
         run["after_import_bytes"] / 1e9, run["seconds"])
        for run in report["runs"]
    ]  # fmt: skip
    show("peak resident memory, gptq-int4-g64", head, rows)
    for run in report["runs"]:
        for place in run["largest_at"]:
            print(f"{run['layers']} layers: {place['bytes'] / 1e9:.3f} GB at {place['at']}")
    close(options.out, report, judge(report["runs"]))


def measure(work: Path, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write one model, compress it, and return what was seen."""
    shape = Shape(layers=depth)
    need = 4e8 + depth * 1.4e8  # the model, the result, and the parts the result is joined from
    if shutil.disk_usage(work).free < need:
        sys.exit(f"{work} needs {need / 1e9:.1f} GB of free disk; choose another with --work")
    model = write_llama(work / "model", shape, options.seed)
    tokens = options.sequences * options.length
    job = {
        "model": str(model),
        "recipe": "gptq-int4-g64",
        "out": str(work / f"out-{depth}"),
        "text": str(write_words(work / "words.txt", tokens)),
        "sequences": options.sequences,
        "length": options.length,
        "seed": options.seed,
    }
    if options.sample:
        job["sample"] = options.sample
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"layers": depth, "model_bytes": size} | compress_in_child(job, work)


def judge(runs: list[dict[str, Any]]) -> list[Criterion]:
    """The peak of every depth, and how much it changes from the first depth to the last."""
    peaks = [run["peak_bytes"] for run in runs]
    criteria = [
        Criterion(f"peak at {run['layers']} layers, GB", peak / 1e9, "< 1.6", peak < LIMIT)
        for run, peak in zip(runs, peaks, strict=True)
    ]
    change = abs(peaks[-1] / peaks[0] - 1)
    name = f"change of the peak, {runs[0]['layers']} to {runs[-1]['layers']} layers"
    return [*criteria, Criterion(name, change, "< 0.05", change < CHANGE)]


if __name__ == "__main__":
    main()
