"""The same items by rarefy and by lm-eval's own command line on the dense model: equal, one by one.

    python bench/harness.py [--model demo] [--items 20] [--only GLOB] [--out FILE.json]

lm-eval reads the exported dense folder and the same task files; every item's metrics and, where
there are options, their log-probabilities are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common import OUT, Criterion, close, machine, show

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.harness import score
from rarefy.tasks.catalogue import catalogue, pack_dir

NATS = 1e-2


def main() -> None:
    """Score with both, compare item by item, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--items", type=int, default=20, help="of each task")
    parser.add_argument("--only", default="*", help="glob over task names")
    parser.add_argument("--out", type=Path, default=OUT / "harness.json")
    options = parser.parse_args()
    infos = catalogue()
    names = [n for n, info in infos.items() if info.kind == "choice" and fnmatch(n, options.only)]
    source = resolve(options.model)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ours = score(
            load_model(source), load_tokenizer(source), dict.fromkeys(names, options.items),
            Path(folder) / "journal.jsonl",
        )  # fmt: skip
        seconds = {"rarefy": time.perf_counter() - start}
        theirs = by_command_line(source, names, options.items, Path(folder))
        seconds["lm-eval"] = time.perf_counter() - start - seconds["rarefy"]
    rows, differing, farthest = [], 0, 0.0
    for name in names:
        mine = {record.item: record for record in ours if record.task == name}
        samples = {row["doc"]["id"]: row for row in theirs[name]}
        assert mine.keys() == samples.keys(), f"{name} was asked on different items"
        metric = infos[name].metric
        wrong = [i for i, record in mine.items() if record.score != samples[i][metric]]
        gaps = [
            abs(a - float(b[0]))
            for i, record in mine.items()
            for a, b in zip(record.logprobs, samples[i]["filtered_resps"], strict=False)
        ]
        differing, farthest = differing + len(wrong), max(farthest, *gaps)
        accuracy = sum(record.score for record in mine.values()) / len(mine)
        other = sum(row[metric] for row in samples.values()) / len(samples)
        rows.append((name, metric, len(mine), f"{accuracy:.4f}", f"{other:.4f}", len(wrong),
                     f"{max(gaps):.1e}"))  # fmt: skip
    head = ["task", "metric", "items", "rarefy", "lm-eval", "differ", "largest gap, nats"]
    show("The same items by both", head, rows)
    report = {"bench": "harness", "machine": machine(0), "seconds": seconds, "rows": rows}
    criteria = [
        Criterion("items with another score", float(differing), "0", differing == 0),
        Criterion("log-probabilities apart, nats", farthest, f"<= {NATS}", farthest <= NATS),
    ]
    close(options.out, report, criteria)


def by_command_line(
    source: Path, names: list[str], items: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Every task's logged samples, as lm-eval's command line leaves them."""
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={source},dtype=float32", "--device", "cpu",
        "--batch_size", "8", "--include_path", str(pack_dir()), "--tasks", ",".join(names),
        "--limit", str(items), "--log_samples", "--output_path", str(folder / "lm-eval"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=os.environ | offline)
    found = {}
    for name in names:
        [file] = (folder / "lm-eval").rglob(f"samples_{name}_2*.jsonl")
        found[name] = [json.loads(line) for line in file.read_text().split("\n") if line]
    return found


if __name__ == "__main__":
    main()
