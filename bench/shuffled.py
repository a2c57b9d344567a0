"""A model with shuffled weights knows nothing: is it at chance on every multiple-choice task?

    python bench/shuffled.py [--model demo] [--items 100] [--out FILE.json]

Every matrix keeps its values and loses their order. What such a model still scores above chance, a
task gives away by its format (long answers that are right more often, a fixed letter). Each task is
tested against chance by the exact binomial test, and Holm corrects over the tasks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import OUT, Criterion, close, machine, show
from scipy.stats import binomtest

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.damage import holm
from rarefy.evaluate.harness import score
from rarefy.tasks.catalogue import catalogue

LEVEL = 0.05


def main() -> None:
    """Shuffle, ask, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--items", type=int, default=100, help="of each task, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "shuffled.json")
    options = parser.parse_args()
    source = resolve(options.model)
    model = shuffled(load_model(source), options.seed)
    names = [name for name, info in catalogue().items() if info.kind == "choice"]
    with tempfile.TemporaryDirectory() as folder:
        records = score(
            model, load_tokenizer(source), dict.fromkeys(names, options.items),
            Path(folder) / "journal.jsonl",
        )  # fmt: skip
    tests: list[dict[str, Any]] = []
    for name in names:
        own = [record for record in records if record.task == name]
        right, chance = round(sum(r.score for r in own)), fmean(1 / len(r.logprobs) for r in own)
        exact = binomtest(right, len(own), chance)
        low, high = exact.proportion_ci(method="wilson")
        above = binomtest(right, len(own), chance, alternative="greater").pvalue
        tests.append({"task": name, "items": len(own), "chance": chance, "score": right / len(own),
                      "low": low, "high": high, "above": above})  # fmt: skip
    for test, p in zip(tests, holm([test["above"] for test in tests]), strict=True):
        test["above_holm"] = p
    rows = [
        (t["task"], t["items"], f"{t['chance']:.3f}", f"{t['score']:.3f}",
         f"{t['low']:.3f} to {t['high']:.3f}", f"{t['above']:.3f}", f"{t['above_holm']:.3f}")
        for t in tests
    ]  # fmt: skip
    head = ["task", "items", "chance", "score", "95 %", "p above", "Holm"]
    show("Shuffled weights", head, rows)
    above = sum(test["above_holm"] < LEVEL for test in tests)
    outside = sum(not test["low"] <= test["chance"] <= test["high"] for test in tests)
    criteria = [
        Criterion("tasks above chance (Holm)", float(above), "0", not above),
        Criterion("tasks whose 95 % interval leaves chance out", float(outside),
                  f"<= {len(tests) // 10} of {len(tests)} (1 in 20 does by accident)",
                  bool(outside <= len(tests) // 10)),
    ]  # fmt: skip
    close(options.out, {"bench": "shuffled", "machine": machine(options.seed), "tests": tests},
          criteria)  # fmt: skip


@torch.no_grad()
def shuffled(model: Any, seed: int) -> Any:
    """The model with the entries of every matrix in random order."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return model


if __name__ == "__main__":
    main()
