"""A killed run, started again, ends with the same bytes as one that was never disturbed.

    python bench/resume.py [--model MODEL] [--out FILE.json]

Two undisturbed runs must agree byte by byte. Then runs are killed with SIGKILL after one block,
half of the blocks and all but one, and while the finished folder is put together; each is started
again and compared. timings.json alone may differ: it holds the time that was taken.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import OUT, Criterion, Shape, close, machine, show, write_llama, write_words

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_SECONDS = 0.0002
# What is there at the start of the join, in its middle and at its end.
JOIN_SIGNS = ("timings.json", "model.safetensors.tmp", "model.safetensors")


@dataclass
class Run:
    """The command under test and where its result goes."""

    command: list[str]
    out: Path
    log: Path
    incomplete: set[str] = field(default_factory=set)

    @property
    def partial(self) -> Path:
        """Where unfinished work lies."""
        return self.out.with_name(self.out.name + ".partial")

    def parts(self) -> dict[str, Any]:
        """The journal's finished parts."""
        with suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self.partial / "journal.json").read_text())["parts"]
            return found
        return {}

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command."""
        with self.log.open("ab") as stream:
            command = [*self.command, "--out", str(self.out)]
            return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def watch(self, stop: Callable[[], bool], whole: Path | None) -> bool:
        """Run until ``stop`` and kill, or to the end; return whether it was killed.

        All the time, what is called OUT must be complete (as ``whole`` is).
        """
        process = self.start()
        while process.poll() is None:
            self._look(whole)
            if stop():
                process.kill()
                process.wait()
                self._look(whole)
                return True
            time.sleep(LOOK_SECONDS)
        if process.returncode:
            sys.exit(f"the command failed:\n{self.log.read_text()[-2000:]}")
        self._look(whole)
        return False

    def _look(self, whole: Path | None) -> None:
        if whole is None or not self.out.exists():
            return
        for name, size in sizes(whole).items():
            file = self.out / name
            if not file.is_file() or (name != "timings.json" and file.stat().st_size != size):
                self.incomplete.add(name)


def sizes(folder: Path) -> dict[str, int]:
    """Size of every file, by path inside the folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def differences(a: Path, b: Path) -> list[str]:
    """Files that are not in both folders with the same bytes."""
    names = (sizes(a).keys() | sizes(b).keys()) - {"timings.json"}
    _, differ, missing = filecmp.cmpfiles(a, b, sorted(names), shallow=False)
    return [*differ, *missing]


def stamps(run: Run, parts: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the files of finished parts, as long as they are there."""
    found = {}
    for part in parts:
        with suppress(FileNotFoundError):
            state = (run.partial / f"part-{part}.safetensors").stat()
            found[part] = (state.st_ino, state.st_mtime_ns)
    return found


def kill_and_resume(run: Run, whole: Path, count: int) -> dict[str, Any]:
    """Kill after ``count`` parts are journalled, start again, compare."""
    run.watch(lambda: len(run.parts()) >= count, whole)
    parts = run.parts()
    before = stamps(run, parts)
    touched: set[str] = set()

    def look() -> bool:
        # Files vanish when the run is done; until then, none may be written anew.
        now = stamps(run, parts)
        touched.update(part for part, stamp in now.items() if stamp != before[part])
        return False

    unfinished = not run.out.exists()
    run.watch(look, whole)
    earlier = json.loads((run.out / "timings.json").read_text())["timings"]["earlier"]
    # The seconds that the first run journalled: a block computed anew would bring its own.
    kept = abs(earlier - sum(parts[name]["seconds"] for name in parts)) < 1e-9
    return {
        "where": f"after {count} parts",
        "journalled": len(parts),
        "killed_unfinished": unfinished,
        "recomputed": sorted(touched) if kept else sorted(parts),
        "differences": differences(whole, run.out),
        "incomplete": sorted(run.incomplete),
    }


def kill_in_join(run: Run, whole: Path, sign: str) -> dict[str, Any]:
    """Kill when a file shows that the weights are being joined; start again, compare."""
    killed = run.watch((run.partial / "out" / sign).exists, whole)
    if not killed:
        state = "missed it, the run was done"
    elif run.out.exists():
        state = "after the last rename"
    else:
        state = ", ".join(sorted(file.name for file in (run.partial / "out").glob("model*")))
        state = f"{state or 'no weights'} there"
    run.watch(lambda: False, whole)
    return {
        "where": f"join, at {sign}: {state}",
        "killed_unfinished": killed,
        "left_over": run.partial.exists(),
        "recomputed": [],
        "differences": differences(whole, run.out),
        "incomplete": sorted(run.incomplete),
    }


def main() -> None:
    """Run, disturb, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: a small random Llama of 6 layers, made here")
    parser.add_argument("--recipe", default="gptq-int4-g64")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "resume.json")
    options = parser.parse_args()
    report: dict[str, Any] = {"bench": "resume", "machine": machine(options.seed)}
    with tempfile.TemporaryDirectory(prefix="rarefy-resume-") as folder:
        cases = measure(Path(folder), options)
    rows = [
        (case["where"], "no" if case["differences"] else "yes", len(case["recomputed"]))
        for case in cases
    ]
    show("against an undisturbed run", ("killed", "same bytes", "recomputed"), rows)
    close(options.out, report | {"cases": cases}, judge(cases))


def measure(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, each in a folder of its own."""
    model = options.model
    if model is None:
        shape = Shape(6, hidden=256, heads=8, kv_heads=4, intermediate=768, vocab=512)
        model = write_llama(work / "model", shape, options.seed)
    tokens = options.sequences * options.length
    text = write_words(work / "words.txt", 2 * tokens, options.seed)
    command = [
        sys.executable, "-m", "rarefy", "compress", str(model), "--recipe", options.recipe,
        "--calibration", str(text), "--sequences", str(options.sequences),
        "--length", str(options.length), "--seed", str(options.seed),
    ]  # fmt: skip

    def run(name: str) -> Run:
        return Run(command, work / name, work / f"{name}.log")

    first, second = run("first"), run("second")
    first.watch(lambda: False, None)
    second.watch(lambda: False, first.out)
    cases = [
        {"where": "never", "killed_unfinished": False, "recomputed": [],
         "differences": differences(first.out, second.out), "incomplete": sorted(second.incomplete)}
    ]  # fmt: skip
    blocks = int(json.loads((first.out / "config.json").read_text())["num_hidden_layers"])
    for number in (1, blocks // 2, blocks - 1):
        cases.append(kill_and_resume(run(f"killed-{number}"), first.out, number))
    for number, sign in enumerate(JOIN_SIGNS):
        cases.append(kill_in_join(run(f"joined-{number}"), first.out, sign))
    return cases


def judge(cases: list[dict[str, Any]]) -> list[Criterion]:
    """What must hold in all cases."""
    points = [case for case in cases if case["where"].startswith("after")]

    def holds(name: str, met: bool) -> Criterion:
        return Criterion(name, met, "true", met)

    return [
        holds("two runs with one seed are byte-identical", not cases[0]["differences"]),
        holds("every kill met unfinished work", all(c["killed_unfinished"] for c in points)),
        holds("killed runs end byte-identical", not any(c["differences"] for c in cases[1:])),
        holds("no finished block was computed again", not any(c["recomputed"] for c in cases)),
        holds("OUT was never seen incomplete", not any(c["incomplete"] for c in cases)),
    ]


if __name__ == "__main__":
    main()
