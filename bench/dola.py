"""DoLa on a model and on one compressed from it: scores against none, chosen layers, speed.

python bench/dola.py [--model demo] [--recipe wanda-50] [--tasks NAME ...] [--items 40]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import OUT, close, machine

import rarefy
from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.damage import compare
from rarefy.evaluate.dola import contrast
from rarefy.evaluate.harness import score
from rarefy.tasks.catalogue import catalogue

MODES = ("plain", "low", "high")
TASKS = ("rarefy_factoid_easy", "rarefy_factoid_rank", "rarefy_squad_open", "rarefy_sciq")


def main() -> None:
    """Score and time both models, print the figures, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="wanda-50")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--items", type=int, default=40, help="items per task")
    parser.add_argument("--out", type=Path, default=OUT / "dola.json")
    options = parser.parse_args()
    other = options.out.parent / f"dola-{options.recipe}"
    rarefy.compress(options.model, options.recipe, other)
    settings, models = vars(options) | {"out": None}, {}
    for name, folder in (("dense", resolve(options.model)), (options.recipe, other)):
        models[name] = measure(folder, options)
        for mode, one in models[name].items():
            print(f"{name} {mode}: speed x {one['speed_ratio']:.2f}, chosen {one['chosen']}")
            for task, hit in one["tasks"].items():
                print(f"  {task}: {hit['dense']} -> {hit['score']}, p = {hit['p_value']}")
    close(options.out, {"settings": settings, "machine": machine(0), "models": models}, [])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return per bucket the comparison with no DoLa, the chosen layers and the speed."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tasks = dict.fromkeys(options.tasks, options.items)
    context: dict[str, Any] = {mode: partial(contrast, model, mode) for mode in MODES[1:]}
    context["plain"] = nullcontext
    answers, chosen, speeds = {}, {}, {mode: [] for mode in MODES}
    for mode in MODES:
        # A fresh journal, because kept answers choose no layer.
        with tempfile.TemporaryDirectory() as work, context[mode]() as used:
            answers[mode] = score(model, tokenizer, tasks, Path(work, "journal"), identity=mode)
        chosen[mode] = dict(sorted(used.chosen.items())) if used else {}
    for mode in MODES * 3:  # in turns, so that drift of the machine cancels
        with context[mode]():
            speeds[mode].append(decode_rate(model))
    rates = {mode: statistics.median(speeds[mode]) for mode in MODES}
    facts = [catalogue()[task] for task in tasks]
    return {
        mode: {
            "tasks": {i.name: asdict(compare(answers["plain"], answers[mode], i)) for i in facts},
            "chosen": chosen[mode], "speed_ratio": rates[mode] / rates["plain"],
        }
        for mode in MODES[1:]
    }  # fmt: skip


def decode_rate(model: Any, prompt: int = 64, new: int = 32) -> float:
    """Greedy tokens per second after a prompt of any tokens, the prefill included."""
    ids = torch.arange(prompt, device=model.device)[None]
    start = time.perf_counter()
    model.generate(ids, min_new_tokens=new, max_new_tokens=new, do_sample=False)
    return new / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
