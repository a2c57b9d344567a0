"""The demo: the default model compressed three ways, measured, and set side by side.

    python bench/demo.py            everything goes below out/
    python bench/demo.py --readme   also puts the table into README.md

It runs nothing but the commands that it prints, so each step can be repeated by hand. Models that
are compressed already are not compressed again.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

RECIPES = ("gptq-int4-g64", "rtn-int4-g64", "gptq-int3-g64")
ROOT = Path(__file__).resolve().parents[1]
MARKS = ("<!-- demo table -->", "<!-- end of demo table -->")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="what to compress (default: demo)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--calibration", nargs=2, default=("64", "512"), metavar=("N", "L"))
    parser.add_argument("--windows", nargs=2, default=("8", "1024"), metavar=("N", "L"))
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rarefy("doctor")
    rarefy("plan", options.model, "--recipe", RECIPES[0])
    folders = [options.out / recipe for recipe in RECIPES]
    for recipe, folder in zip(RECIPES, folders, strict=True):
        sample = ("--sequences", options.calibration[0], "--length", options.calibration[1])
        rarefy("compress", options.model, "--recipe", recipe, "--out", folder, *sample)
    for folder in folders:
        windows = ("--sequences", options.windows[0], "--length", options.windows[1])
        rarefy("evaluate", folder, "--against", options.model, *windows)
    page, table = options.out / "report.html", options.out / "table.md"
    rarefy("compare", *folders, "--html", page, "--markdown", table)
    print(f"\n{page} shows the same with plots. Took {time.perf_counter() - start:.0f} s.")
    if options.readme:
        update_readme(table.read_text())


def rarefy(*arguments: object) -> None:
    """Print a command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ rarefy {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rarefy", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def update_readme(table: str) -> None:
    """Replace what stands between the marks of README.md."""
    file = ROOT / "README.md"
    pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    block = f"{MARKS[0]}\n{table.strip()}\n{MARKS[1]}"
    file.write_text(pattern.sub(lambda _: block, file.read_text()))


if __name__ == "__main__":
    main()
