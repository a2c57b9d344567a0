"""QLoRA on a text of one's own, in one command, and its adapter in plain peft.

    python bench/finetune.py [--text FILE --held-out FILE] [--out FILE.json]

The command line does the work, as a user would call it. What it leaves is then opened by a process
that knows transformers and peft alone: the 4-bit base, exported to a dense folder, without the
adapter and with it, and the dense model with it. Without ``--text`` the text is this package's own
source, of which the solvers are held out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import OUT, ROOT, Criterion, close, machine, run_child, show

from rarefy.checkpoint.load import load_tokenizer
from rarefy.checkpoint.resolve import resolve

CHILD = Path(__file__).with_name("finetune_child.py")
SOURCE, APART = ROOT / "src" / "rarefy", "solvers"
BASE, TUNED, OVER_DENSE, DENSE = (
    "4-bit base", "4-bit base with adapter", "dense with adapter", "dense"
)  # fmt: skip


def main() -> None:
    """Fine-tune, open with peft, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="qlora-nf4")
    parser.add_argument("--text", type=Path, help="a .txt file to learn from")
    parser.add_argument("--held-out", type=Path, help="a .txt file that is not learnt from")
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 512), metavar=("N", "L"))
    parser.add_argument("--out", type=Path, default=OUT / "finetune.json")
    options = parser.parse_args()
    if (options.text is None) != (options.held_out is None):
        parser.error("give both --text and --held-out, or neither")
    report: dict[str, Any] = {"bench": "finetune", "machine": machine(0), "recipe": options.recipe}
    with tempfile.TemporaryDirectory(prefix="rarefy-finetune-") as folder:
        report |= measured(options, Path(folder))
    show("perplexity of held-out text", ("model", "perplexity"), [*report["perplexity"].items()])
    found = report["perplexity"]
    close(
        options.out,
        report,
        [
            lower(found, TUNED, BASE),
            lower(found, OVER_DENSE, DENSE),
            Criterion("peft found a place for every pair", report["placed"], "all of them",
                      report["placed"] == report["pairs"]),
        ],
    )  # fmt: skip


def measured(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the commands, then the reader."""
    text, held_out = options.text, options.held_out
    if text is None:
        text, held_out = work / "mine.txt", work / "held-out.txt"
        apart = sorted((SOURCE / APART).glob("*.py"))
        rest = sorted(file for file in SOURCE.rglob("*.py") if APART not in file.parts)
        held_out.write_text("\n\n".join(file.read_text() for file in apart))
        text.write_text("\n\n".join(file.read_text() for file in rest))
    rarefy = [sys.executable, "-m", "rarefy"]
    made, base = work / "mine", work / "base"
    command = ["compress", options.model, "--recipe", options.recipe, "--calibration"]
    seconds = run_child([*rarefy, *command, text, "--out", made], work / "compress.log")
    run_child([*rarefy, "export", made, "--format", "dense", "--out", base], work / "export.log")
    dense = resolve(options.model)
    rows, length = options.windows
    ids = load_tokenizer(dense)(held_out.read_text())["input_ids"]
    windows = [ids[start : start + length] for start in range(0, rows * length, length)]
    adapter = str(made / "adapter")
    job = {
        "windows": [window for window in windows if len(window) == length],
        "models": {
            BASE: [str(base), None],
            TUNED: [str(base), adapter],
            DENSE: [str(dense), None],
            OVER_DENSE: [str(dense), adapter],
        },
    }
    order, answer = work / "order.json", work / "answer.json"
    order.write_text(json.dumps(job))
    run_child([sys.executable, CHILD, order, answer], work / "peft.log")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found | {"seconds": seconds, "windows": len(job["windows"])}


def lower(found: dict[str, float], after: str, before: str) -> Criterion:
    """A criterion that a perplexity has fallen."""
    name = f"perplexity of {after} over {before}"
    ratio = found[after] / found[before]
    return Criterion(name, ratio, "< 1", ratio < 1)


if __name__ == "__main__":
    main()
