"""A journal of finished requests, so that an evaluation goes on where it was stopped.

One JSON line a request: the hash of everything the answer depends on, and the answer. Every line
goes to the file as soon as the answer is known.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rarefy.errors import RarefyError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Journal:
    """Answers by key; made by :func:`open_journal`."""

    def __init__(self, path: Path, identity: str, stream: Any) -> None:
        self._path = path
        self._identity = identity
        self._stream = stream
        self._answers = _read(path, stream)

    def key(self, kind: str, arguments: Sequence[Any]) -> str:
        """Hash what an answer depends on: the model, the kind of request and its arguments."""
        text = json.dumps([self._identity, kind, *arguments], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, in memory and in the file; it is plain JSON."""
        self._answers[key] = answer
        with disk_errors(self._path):
            # One write a line: a kill can tear no line but the last.
            self._stream.write(json.dumps({"key": key, "answer": answer}).encode() + b"\n")


@contextmanager
def open_journal(path: Path, identity: str) -> Iterator[Journal]:
    """Read the finished requests and append to them.

    Args:
        path: the file; made if missing, together with its folder.
        identity: names the model. Answers of another identity are neither used nor lost.

    Raises:
        RarefyError: the file cannot be read or written, or a line other than the last is damaged.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab+", buffering=0)
    with stream:
        yield Journal(path, identity, stream)


def _read(path: Path, stream: Any) -> dict[str, Any]:
    """Return the answers, and cut off a last line that a kill has torn."""
    stream.seek(0)
    lines: list[bytes] = stream.read().split(b"\n")
    answers: dict[str, Any] = {}
    good = 0
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            answers[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                break
            raise RarefyError(
                f"line {number} of {path} is no finished request; delete the file to start anew"
            ) from error
        good += len(line) + 1
    stream.truncate(good)
    return answers
