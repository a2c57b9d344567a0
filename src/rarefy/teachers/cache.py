"""The ledger of calls: every answer that was paid for, on disk before it is used.

One JSON line a call. A line is written at once and flushed to the disk, so a kill can tear no line
but the last, and the next run forgets a torn line and makes that call again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout

from rarefy.errors import RarefyError, disk_errors
from rarefy.teachers.base import Answer, Ask, Teacher, sha256

Request: TypeAlias = dict[str, Any]
"""Everything that decides an outcome, as plain JSON."""
Make: TypeAlias = Callable[[list[int]], Iterator[tuple[int, dict[str, Any]]]]
"""Indices of the missing requests -> (index, outcome), each as soon as it is known."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""(what, done, total)."""


class Ledger:
    """Outcomes by request; use it as a context manager.

    Args:
        path: the file; made if missing, together with its folder.
        tell: called after every outcome.

    Attributes:
        calls: outcomes made by this process.
        cached: outcomes that were found instead.

    Raises:
        RarefyError: another process holds the ledger, it cannot be written, or a line other than
            the last is damaged.
    """

    def __init__(self, path: Path, tell: Progress | None = None) -> None:
        self.calls = self.cached = 0
        self._path = path
        self._tell = tell or (lambda what, done, total: None)
        self._lock = FileLock(f"{path}.lock", timeout=0)
        self._outcomes: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise RarefyError(
                    f"another process is writing {self._path}: wait for it, or choose another "
                    "output folder"
                ) from error
            try:
                self._stream = self._path.open("ab+", buffering=0)
                self._read()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        Path(f"{self._path}.lock").unlink(missing_ok=True)
        self._lock.release()

    def answers(self, teacher: Teacher, asks: Sequence[Ask], what: str = "calls") -> list[Answer]:
        """Answer asks in their order, calling the teacher only for what the ledger lacks.

        Raises:
            RarefyError: whatever the teacher raises; the answers before it are kept.
        """

        def make(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for place, answer in teacher.answers([asks[index] for index in missing]):
                yield missing[place], answer.to_json()

        outcomes = self.once([request_of(teacher, ask) for ask in asks], make, what)
        return [Answer.from_json(outcome) for outcome in outcomes]

    def once(self, requests: Sequence[Request], make: Make, what: str) -> list[dict[str, Any]]:
        """Return the outcome of every request, making each different one at most once, ever."""
        keys = [key_of(request) for request in requests]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in self._outcomes)
        done = len(first) - len(missing)
        self.cached += done
        self._tell(what, done, len(first))
        for index, outcome in make(missing) if missing else ():
            self._add(keys[index], requests[index], outcome)
            done += 1
            self._tell(what, done, len(first))
        return [self._outcomes[key] for key in keys]

    def _add(self, key: str, request: Request, outcome: dict[str, Any]) -> None:
        line = json.dumps({"key": key, "request": request, "outcome": outcome})
        with disk_errors(self._path):
            self._stream.write(line.encode() + b"\n")
            os.fsync(self._stream.fileno())
        self._outcomes[key] = outcome
        self.calls += 1

    def _read(self) -> None:
        """Read the finished calls, and cut off a last line that a kill has torn."""
        self._stream.seek(0)
        lines = self._stream.read().split(b"\n")
        good = 0
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                self._outcomes[entry["key"]] = entry["outcome"]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines) - 1:
                    break
                raise RarefyError(
                    f"line {number} of {self._path} is no finished call; "
                    "delete that line and run the same command again"
                ) from error
            good += len(line) + 1
        self._stream.truncate(good)


def request_of(teacher: Teacher, ask: Ask) -> Request:
    """Everything that an answer depends on.

    The sample index is part of it: without it all samples of one prompt would be equal.
    """
    return {
        "model": teacher.name,
        "prompt": teacher.render(ask.prompt),
        "sampling": asdict(ask.sampling),
        "sample": ask.sample,
    }


def key_of(request: Request) -> str:
    """Hash of a request, in hexadecimal; the order of its keys does not matter."""
    return sha256(json.dumps(request, sort_keys=True))
