"""Records of two models side by side, and the answers that one of them no longer has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from rarefy.errors import RarefyError
from rarefy.evaluate.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

Pair: TypeAlias = tuple[Record, Record]


@dataclass(frozen=True)
class Lost:
    """A question that the dense model answered rightly and the other one does not."""

    task: str
    question: str
    answer: str
    dense: str
    this: str


def pair_up(dense: Sequence[Record], other: Sequence[Record]) -> list[Pair]:
    """Join by task and item, in the order of these.

    Raises:
        RarefyError: the two hold different items, or the same item with other options.
    """
    left, right = ({(r.task, r.item): r for r in records} for records in (dense, other))
    if left.keys() != right.keys() or len(left) != len(dense) or len(right) != len(other):
        different = sorted(left.keys() ^ right.keys())
        what = f"item {different[0][1]} of {different[0][0]}" if different else "an item"
        how = "is in one list only" if different else "is there twice"
        raise RarefyError(f"{what} {how}; score both models on the same items once")
    for key, record in left.items():
        if len(record.logprobs) != len(right[key].logprobs):
            raise RarefyError(
                f"item {key[1]} of {key[0]} has other options in the other list; "
                "score both models with the same version of the task"
            )
    return [(left[key], right[key]) for key in sorted(left)]


def lost(dense: Sequence[Record], other: Sequence[Record], limit: int) -> list[Lost]:
    """Return what the other model no longer knows, the dense model's surest answers first.

    Tasks take turns, so that a large one does not crowd out the others.

    Args:
        dense, other: records of the same items, of one task or several.
        limit: the most to return.

    Raises:
        RarefyError: the two hold different items.
    """
    gone = [(a, b) for a, b in pair_up(dense, other) if a.score == 1 and b.score == 0]
    turns = []
    for task, group in groupby(gone, key=lambda pair: pair[0].task):
        surest = sorted(group, key=lambda pair: (-_margin(pair[0]), pair[0].item))
        turns += [(turn, task, pair) for turn, pair in enumerate(surest)]
    turns.sort(key=lambda entry: entry[:2])
    return [
        Lost(task, a.question, a.answer, _said(a), _said(b)) for _, task, (a, b) in turns[:limit]
    ]


def _margin(record: Record) -> float:
    """How far the best option is ahead of the second, in nats; 0 without options."""
    best, *rest = sorted(record.logprobs, reverse=True) or [0.0]
    return best - rest[0] if rest else 0.0


def _said(record: Record) -> str:
    """What the model answered, for a reader."""
    if record.output is not None:
        return record.output
    if record.choice is None or record.choice == record.gold:
        return record.answer
    return f"option {record.choice + 1}"
