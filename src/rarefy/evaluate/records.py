"""One record per question and model: the ground on which every figure of a leaderboard stands.

Records are kept, not only their averages, so that two models can be compared item by item and a
reader can see which facts were lost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from rarefy.checkpoint.writer import write_atomic
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Record:
    """What one model did with one item.

    Attributes:
        task: name of the task. item: id of the item, a hash of its content.
        cluster: what items of one context have in common (a passage, an article, a subject);
            resampled together. The item's id where it stands alone.
        score: the task's main metric on this item.
        metrics: every metric on this item, the main one among them.
        choice, gold: indices of the chosen and of the right option; None without options.
        logprobs: summed log-probability of every option, in nats; empty without options.
        output: what was generated; None if nothing was.
        question, answer: for a reader: what was asked, in a line or two, and what is right.
    """

    task: str
    item: str
    cluster: str
    score: float
    metrics: dict[str, float] = field(default_factory=dict)
    choice: int | None = None
    gold: int | None = None
    logprobs: tuple[float, ...] = ()
    output: str | None = None
    question: str = ""
    answer: str = ""


_ONE = TypeAdapter(Record)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, all or nothing."""
    lines = (json.dumps(asdict(record), ensure_ascii=False) for record in records)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def read_records(path: Path) -> list[Record]:
    """Read what :func:`write_records` wrote.

    Raises:
        RarefyError: the file is missing, or a line is no record.
    """
    try:
        # Not splitlines(): JSON strings may hold line separators other than the newline.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RarefyError(f"{path} cannot be read ({error.strerror}); score the model again") from (
            error
        )
    try:
        return [_ONE.validate_json(line) for line in lines if line]
    except ValidationError as error:
        raise RarefyError(
            f"{path} holds a line that is no record; delete it and score the model again"
        ) from error
