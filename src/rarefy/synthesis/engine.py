"""The verb ``synthesize``: run a synthesizer into a folder that is complete or not there.

While it runs, everything lies in ``OUT.partial``; the last step renames that folder. A half-done
folder may be continued with other options or questions: the ledger knows every call by all that it
depends on, so what was paid for is used again exactly where it fits. The result:

    rows.jsonl      the rows kept, each with its provenance
    rejects.jsonl   the rows not kept, each with the reason
    calls.jsonl     the ledger of calls
    summary.json    method, options, counts
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.writer import Writer, write_atomic, write_json
from rarefy.errors import RarefyError, disk_errors
from rarefy.synthesis.answers import VERSION
from rarefy.synthesis.base import SYNTHESIZERS, Desk, Row, Synthesizer
from rarefy.synthesis.questions import Question, checked, fingerprint
from rarefy.teachers.cache import Ledger, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.teachers.base import Teacher

ROWS, REJECTS, CALLS, SUMMARY = "rows.jsonl", "rejects.jsonl", "calls.jsonl", "summary.json"


@dataclass(frozen=True)
class Synthesis:
    """A finished run.

    Attributes:
        path: the folder.
        summary: content of its ``summary.json``.
        reused: whether the same run had been finished before.
        calls: outcomes that this process asked the teacher for.
        cached: outcomes that it found in the ledger.
    """

    path: Path
    summary: dict[str, Any]
    reused: bool
    calls: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Settings:
    """Of a run, not of a method.

    Attributes:
        seed: of every draw.
        fresh: make it anew, in the place of what is at the output folder; its ledger too.
        calls: a ledger outside the output folder, to be shared by several runs.
        tell: hears of the progress.
    """

    seed: int = 0
    fresh: bool = False
    calls: Path | None = None
    tell: Progress | None = None


def synthesize(
    method: Synthesizer,
    teacher: Teacher,
    questions: Sequence[Question],
    out: Path | str,
    settings: Settings | None = None,
) -> Synthesis:
    """Make training text; run again after a stop, it goes on and repeats no call.

    Args:
        method: a registered synthesizer.
        teacher: of the level that the method needs, or above.
        questions: empty for a method that asks none.
        out: the folder to be made.
        settings: seed, fresh, progress.

    Raises:
        TeacherCapabilityError: the teacher's level is too low; no call was made.
        RarefyError: bad questions, a folder that holds something else, or a failed call.
    """
    how, out = settings or Settings(), Path(out)
    name = SYNTHESIZERS.name_of(method)
    teacher.require(method.needs, f"the synthesizer {name}")
    if questions and not method.asks:
        raise RarefyError(f"the synthesizer {name} makes text without questions: give none")
    questions = checked(questions) if method.asks else ()
    method.check(questions, teacher)
    job = _job(name, method, teacher, questions, how.seed)
    if not how.fresh and (done := _finished(out, job)) is not None:
        return Synthesis(out, done, reused=True)
    partial = out.with_name(out.name + ".partial")
    if how.fresh:
        Writer.discard(partial)
    with disk_errors(out.parent):
        partial.mkdir(parents=True, exist_ok=True)
    with Ledger(how.calls or partial / CALLS, how.tell) as ledger:
        rows = list(method.rows(questions, Desk(teacher, ledger, how.seed)))
        summary = job | {"calls": ledger.calls + ledger.cached} | _figures(method, rows)
        _write(partial / ROWS, [row for row in rows if row.reason is None])
        _write(partial / REJECTS, [row for row in rows if row.reason is not None])
        write_json(partial / SUMMARY, summary)
    with disk_errors(out.parent):
        Writer.discard(out)
        partial.replace(out)
    return Synthesis(out, summary, False, ledger.calls, ledger.cached)


def _job(
    name: str, method: Synthesizer, teacher: Teacher, questions: Sequence[Question], seed: int
) -> dict[str, Any]:
    """Everything that decides the result, as plain JSON."""
    job = {
        "method": name,
        "options": asdict(method),  # type: ignore[call-overload]
        "teacher": teacher.name,
        "questions": {"count": len(questions), "sha256": fingerprint(questions)},
        "seed": seed,
        "extractor": VERSION,
    }
    plain: dict[str, Any] = json.loads(json.dumps(job))
    return plain


def _summary(out: Path) -> dict[str, Any]:
    """The summary in a folder; empty where there is none that can be read."""
    try:
        found = json.loads((out / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _finished(out: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The summary at ``out`` if the same job was finished there; refuse anything else."""
    if not out.exists():
        return None
    summary = _summary(out)
    if all(key in summary and summary[key] == value for key, value in job.items()):
        return summary
    if out.is_dir() and not any(out.iterdir()):
        return None
    raise RarefyError(
        f"{out} exists and holds something else; choose another --out or give --fresh"
    )


def _write(path: Path, rows: list[Row]) -> None:
    lines = (json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, "".join(lines).encode())


def _figures(method: Synthesizer, rows: list[Row]) -> dict[str, Any]:
    rejects = Counter(str(row.reason) for row in rows if row.reason is not None)
    return {
        "rows": len(rows) - rejects.total(),
        "rejects": rejects.total(),
        "reasons": dict(sorted(rejects.items())),
        **method.summary(rows),
    }
