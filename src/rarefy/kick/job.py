"""One job, in a process of its own: ``python -m rarefy.kick.job FOLDER``.

Every step ends in a file that appears at once or not at all, so a job that was killed goes on
where it stopped: ``compress`` and the scoring keep journals of their own, and a finished step is
read from its file. Progress goes to stdout, a line of JSON each; everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from transformers.utils.logging import disable_progress_bar

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.writer import Writer, write_json
from rarefy.engine.compress import compress
from rarefy.engine.stage import Watcher
from rarefy.errors import RarefyError
from rarefy.evaluate.cost import Measured, cost
from rarefy.evaluate.energy import energy
from rarefy.evaluate.footprint import footprint
from rarefy.evaluate.records import read_records, write_records
from rarefy.evaluate.run import evaluate
from rarefy.evaluate.speed import measure, merge
from rarefy.kick.machine import machine
from rarefy.kick.spec import (
    COST,
    JOURNAL,
    LOCK,
    MODEL,
    QUALITY,
    RECIPE,
    RECORDS,
    RESULT,
    read_spec,
)
from rarefy.runtime.packed import hold_dense

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.evaluate.energy import Energy
    from rarefy.evaluate.records import Record
    from rarefy.evaluate.run import Progress
    from rarefy.kick.spec import Spec

_PAUSE = 2.0  # seconds between two lines of progress of one step
_PROMPT, _NEW = 16, 32  # tokens of the workload whose energy is measured
# Of the speed measurement, where one round is enough.
_QUICK: dict[str, Any] = {"new_tokens": 8, "runs": 1}


def run(folder: Path, *, keep: bool = False, progress: Progress = lambda *_: None) -> None:
    """Do what ``spec.json`` in the folder says, as far as it is not done; write ``result.json``.

    Args:
        folder: of the job; see :mod:`rarefy.kick.spec`.
        keep: leave the compressed model in ``model/`` instead of removing it at the end.
        progress: called with (step, done, total).

    Raises:
        RarefyError: anything that a user can mend; see the message.
    """
    # A process whose parent was killed may still be at it: wait for it instead of writing along.
    with FileLock(folder / LOCK):
        spec = read_spec(folder)
        if not (folder / RESULT).is_file():
            torch.set_num_threads(spec.threads)
            write_json(folder / RESULT, _steps(folder, spec, progress))
        if not keep and spec.source is not None:
            Writer.discard(folder / MODEL)


def _steps(folder: Path, spec: Spec, progress: Progress) -> dict[str, Any]:
    source = _reference(spec)

    @cache  # compressed only if a step that needs it is not done yet
    def model() -> Path:
        return source if spec.source is None else _compress(folder, spec, source, progress)

    quality = _once(folder / QUALITY, lambda: _quality(model(), source, spec, progress))
    records = folder / RECORDS
    if not records.is_file():
        write_records(records, _score(model(), folder, spec, progress))
    cost = _once(folder / COST, lambda: _cost(model(), source, spec, progress))
    return {
        "key": spec.key,
        "recipe": spec.recipe,
        "quality": quality["quality"],
        "protocol": quality["protocol"],
        "versions": quality["versions"] | {"lm_eval": version("lm_eval")},
        "cost": cost["cost"],
        "machine": cost["machine"],
        "records": len(read_records(records)),
    }


def _reference(spec: Spec) -> Path:
    """Find the dense model, and make sure that it is the one that the head of the run saw."""
    source = resolve(spec.model)
    if Checkpoint(source).fingerprint() != spec.fingerprint:
        raise RarefyError(
            f"{spec.model} has other weights than when the run was planned; "
            "put the same model on every machine, or give --fresh"
        )
    return source


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON file, made first if it is missing."""
    if not file.is_file():
        write_json(file, make())
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _compress(folder: Path, spec: Spec, source: Path, progress: Progress) -> Path:
    watcher = Watcher(
        say=lambda sentence: print(sentence, file=sys.stderr),
        step=lambda done, total: progress("compress", done, total),
    )
    progress("compress", 0, 1)
    return compress(
        source, folder / RECIPE, folder / MODEL, calibration=spec.calibration, watcher=watcher
    ).path


def _quality(model: Path, source: Path, spec: Spec, progress: Progress) -> dict[str, Any]:
    return evaluate(
        model,
        source,
        text=spec.text,
        sequences=spec.windows,
        length=spec.length,
        speed=False,  # each model's is measured once, with its cost
        progress=progress,
    ).report()


def _score(model: Path, folder: Path, spec: Spec, progress: Progress) -> list[Record]:
    from rarefy.evaluate.dola import contrast
    from rarefy.evaluate.harness import fingerprint, score
    from rarefy.tasks.local import local_task

    judged, tokenizer = load_model(model), load_tokenizer(model)
    hold_dense(judged)
    # DoLa changes what a model answers and not its weights, by which the journal knows it.
    identity = f"{fingerprint(judged, tokenizer)} DoLa {spec.dola}" if spec.dola else None
    with contrast(judged, spec.dola) if spec.dola else nullcontext():  # type: ignore[arg-type]
        return score(
            judged,
            tokenizer,
            spec.tasks,
            folder / JOURNAL,
            progress=progress,
            extra=[local_task(folder / name) for name in spec.local],
            identity=identity,
        )


def _cost(model: Path, source: Path, spec: Spec, progress: Progress) -> dict[str, Any]:
    progress("cost", 0, 1)
    how: dict[str, Any] = _QUICK if spec.speed == 1 else {}
    speeds = [measure(model, threads=spec.threads, **how) for _ in range(spec.speed)]
    made = read_manifest(model) if spec.source is not None else {}
    loaded = load_model(model)
    measured = Measured(
        speed=merge(speeds) if speeds else None,
        energy=_energy(loaded) if spec.energy else None,
        compress_s=made.get("seconds"),
        compress_peak_bytes=made.get("peak_memory_bytes"),
    )
    found = cost(loaded, footprint(model, footprint(source)), measured)
    progress("cost", 1, 1)
    return {"cost": asdict(found), "machine": machine(loaded.device)}


def _energy(model: Any) -> Energy:
    """Energy of one token made after a short prompt, at batch 1."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, _PROMPT), generator=generator).to(model.device)

    def work() -> None:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=_NEW,
            max_new_tokens=_NEW,
        )

    return energy(work, _NEW, device=model.device)


class _Reporter:
    """Prints progress as lines of JSON, at most one every few seconds for a step."""

    def __init__(self) -> None:
        self._what, self._last = "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done == total or now - self._last > _PAUSE:
            self._what, self._last = what, now
            print(json.dumps([what, done, total]), flush=True)


def main() -> None:
    """Entry of the process: status 0, or 2 with one sentence as the last line of stderr."""
    parser = argparse.ArgumentParser(prog="rarefy.kick.job")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    disable_progress_bar()  # transformers' bars would fill the log
    try:
        run(given.folder, keep=given.keep, progress=_Reporter())
    except RarefyError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # whoever started this is gone; the next start goes on from here


if __name__ == "__main__":
    main()
