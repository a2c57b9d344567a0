"""The two sentences on top of the leaderboard: what still matches, and what perplexity hides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.report import words
from rarefy.report.leaderboard_rows import holds_facts, surely_worse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.report.leaderboard_rows import Board, Row

_SMALL = 1.25
"""Perplexity may rise to this multiple for a loss of facts to count as hidden."""


def headline(rows: Sequence[Row], dense: Row) -> str:
    """Say in a sentence which recipe is the smallest that still matches the dense model."""
    judged = [row for row in rows if row.tasks]
    if not rows:
        return "No recipe was finished"
    if not judged:
        scored = any(row.entry.get("tasks") for row in rows)
        return "No task could show damage" if scored else "No task was scored"
    matching = [row for row in judged if row.matched == row.tasks]
    if not matching:
        best = max(judged, key=lambda row: (row.matched / row.tasks, row.kept or 0.0))
        return (
            f"No recipe stays within 5 % of the dense model on every task; {best.name} comes "
            f"closest, on {best.matched} of {best.tasks}"
        )
    best = min(matching, key=lambda row: row.cost("disk_bytes") or math.inf)
    return (
        f"{best.name} is the smallest that still matches: {words.size(best.cost('disk_bytes'))} "
        f"instead of {words.size(dense.cost('disk_bytes'))}, and within 5 % of the dense score "
        f"on {'all ' if best.tasks > 1 else ''}{best.tasks} task{'s' if best.tasks > 1 else ''}"
    )


@dataclass(frozen=True)
class Hidden:
    """A recipe whose perplexity hides a loss; gap: by how much more of the score is lost."""

    row: Row
    gap: float
    sentence: str


def hidden_loss(rows: Sequence[Row], board: Board) -> Hidden | str:
    """Find the largest certain loss of facts that perplexity hardly shows.

    Returns:
        The loss; or a sentence that there is none, empty where no recipe could have shown one.
    """
    facts = {task["name"]: task["title"] for task in board["tasks"] if holds_facts(task)}
    quiet = [row for row in rows if 0 < _rise(row) <= _SMALL]
    asked = [
        (row, facts[name], damage)
        for row in quiet
        for name, damage in (row.entry.get("tasks") or {}).items()
        if name in facts and damage["sensitive"] and damage["relative"] is not None
    ]
    found = [
        Hidden(row, 1 / _rise(row) - damage["relative"], _tell(row, title, damage))
        for row, title, damage in asked
        if not damage["matches"] and surely_worse(damage)
    ]
    if found:
        return max(found, key=lambda hidden: hidden.gap)
    if not asked:
        return ""
    return (
        f"Of the recipes that raise perplexity by at most {words.percent(_SMALL - 1)}, none lost "
        "more than 5 % on a task of facts beyond chance."
    )


def _rise(row: Row) -> float:
    """Return perplexity over the dense model's; 0 where either is unknown."""
    before, after = row.quality("perplexity_dense"), row.quality("perplexity")
    return after / before if before and after else 0.0


def _tell(row: Row, title: str, damage: Mapping[str, Any]) -> str:
    rise, flips = _rise(row), damage["flips"]
    return (
        f"{row.name} {'raises' if rise > 1 else 'lowers'} perplexity by "
        f"{words.percent(abs(rise - 1))}, from {words.number(row.quality('perplexity_dense'))} to "
        f"{words.number(row.quality('perplexity'))}, yet keeps only "
        f"{words.percent(damage['relative'])} of the dense score on {title}: {flips['lost']} right "
        f"answers turned wrong, {flips['won']} wrong ones right."
    )
