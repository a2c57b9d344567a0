"""Questions with their right answers: what a teacher is asked about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rarefy.errors import RarefyError
from rarefy.teachers.base import sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: stands in the provenance of every row made from it.
        text: what is asked.
        answer: the right answer, as a student shall write it.
    """

    id: str
    text: str
    answer: str


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read JSON lines with ``question``, ``answer`` and, if wanted, ``id``.

    Without an id, the hash of question and answer is one.

    Raises:
        RarefyError: the file is missing, empty or malformed, or two questions have one id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RarefyError(f"the question file {path} cannot be read: {error}") from error
    return checked(
        _question(f"{path}, line {number}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )


def checked(questions: Iterable[Question]) -> tuple[Question, ...]:
    """Return the questions if there are some and no two share an id.

    Raises:
        RarefyError: otherwise.
    """
    made = tuple(questions)
    if not made:
        raise RarefyError("there is no question to ask: give a file with some")
    seen: set[str] = set()
    for question in made:
        if question.id in seen:
            raise RarefyError(f"two questions have the id {question.id}: give each its own")
        seen.add(question.id)
    return made


def fingerprint(questions: Sequence[Question]) -> str:
    """Hash of ids, texts and answers, in order."""
    return sha256(json.dumps([asdict(question) for question in questions]))


def _question(where: str, line: str) -> Question:
    try:
        record = json.loads(line)
        text, answer = record["question"], record["answer"]
        name = record.get("id", sha256(json.dumps([text, answer]))[:16])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RarefyError(f"{where} is no JSON object with 'question' and 'answer'") from error
    if not isinstance(text, str) or not isinstance(answer, str | int | float):
        raise RarefyError(f"{where}: 'question' must be a text and 'answer' a text or a number")
    if not text.strip() or not str(answer).strip():
        raise RarefyError(f"{where}: 'question' and 'answer' must not be empty")
    try:
        f"{name}{text}{answer}".encode()
    except UnicodeEncodeError as error:
        raise RarefyError(f"{where} holds text that is not Unicode: {error}") from error
    return Question(str(name), text, str(answer))
