"""The leaderboard's rows and what is counted for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Board = dict[str, Any]
"""The content of a leaderboard.json."""

FAMILIES = {
    "factoid": "facts",
    "choice": "multiple choice",
    "retrieval": "reading",
    "summary": "summaries",
    "instruction": "instructions",
    "language": "language",
    "code": "code",
}
_MATCH = 0.95
_SURE = 0.05


@dataclass(frozen=True)
class Cell:
    """One family of one recipe.

    Attributes:
        value: mean of the scores relative to the dense model; None without tasks.
        matched, tasks: of the tasks that can show damage, how many lose at most 5 %.
        sure: a task of the family is worse after Holm's correction.
    """

    value: float | None
    matched: int
    tasks: int
    sure: bool

    @property
    def state(self) -> str:
        """Return "match", "part" (some tasks match), "lost", or "none"."""
        if self.value is None:
            return "none"
        if not self.tasks:
            return "match" if self.value >= _MATCH else "lost"
        return "lost" if not self.matched else "match" if self.matched == self.tasks else "part"


@dataclass(frozen=True)
class Row:
    """One entry with what is counted from it.

    Attributes:
        anchor: the fragment by which the page's parts point to one another.
        families: cells by family. matched, tasks: sums over families.
        kept: mean of the families; None where none has a value.
        lost, won, answers: right answers that turned wrong, the reverse, and all answers
            compared.
    """

    anchor: str
    entry: dict[str, Any]
    families: dict[str, Cell]
    matched: int
    tasks: int
    kept: float | None
    lost: int
    won: int
    answers: int

    @property
    def name(self) -> str:
        """Return the recipe's name."""
        return str(self.entry["recipe"])

    @property
    def flips(self) -> float | None:
        """Return the share of answers that flipped, 0 to 1; None where none were compared."""
        return (self.lost + self.won) / self.answers if self.answers else None

    def quality(self, key: str) -> float | None:
        """Return a number of the entry's quality without its interval."""
        found = (self.entry.get("quality") or {}).get(key)
        value = found.get("value") if isinstance(found, dict) else found
        return None if value is None or math.isnan(value) else float(value)

    def level(self, key: str) -> float | None:
        """Return how far the entry compresses: "sparsity" (a share) or "bits"."""
        value: float | None = (self.entry.get("level") or {}).get(key)
        return value

    def cost(self, key: str) -> float | None:
        """Return a number of the entry's cost."""
        value: float | None = (self.entry.get("cost") or {}).get(key)
        return value


def families_of(board: Board) -> list[str]:
    """Return the families that the board has, in their fixed order, unknown ones last."""
    known = {family for entry in board["entries"] for family in entry.get("families") or {}}
    known |= {task["family"] for task in board["tasks"]}
    return [f for f in FAMILIES if f in known] + sorted(known - FAMILIES.keys())


def rows_of(board: Board) -> list[Row]:
    """Return the entries, most matching tasks first, then the lowest KL."""
    rows = [row_of(f"recipe-{at}", entry, board) for at, entry in enumerate(board["entries"])]

    def place(row: Row) -> tuple[float, float]:
        kl = row.quality("kl_mean")
        return -row.matched / max(row.tasks, 1), math.inf if kl is None else kl

    return sorted(rows, key=place)


def row_of(anchor: str, entry: dict[str, Any], board: Board) -> Row:
    """Return an entry's row.

    Args:
        anchor: the fragment of its row on the page.
        entry: one of the board's, or its dense one.
        board: for the families of the tasks.
    """
    family_of = {task["name"]: task["family"] for task in board["tasks"]}
    damages = entry.get("tasks") or {}
    cells = {}
    for family in families_of(board):
        mine = [d for name, d in damages.items() if d["sensitive"] and family_of[name] == family]
        value = (entry.get("families") or {}).get(family)
        matched = sum(damage["matches"] for damage in mine)
        cells[family] = Cell(value, matched, len(mine), any(map(surely_worse, mine)))
    values = [cell.value for cell in cells.values() if cell.value is not None]
    flips = [damage["flips"] for damage in damages.values() if damage.get("flips")]
    kinds = ("both", "lost", "won", "wrong_same", "wrong_other")
    return Row(
        anchor=anchor,
        entry=entry,
        families=cells,
        matched=sum(cell.matched for cell in cells.values()),
        tasks=sum(cell.tasks for cell in cells.values()),
        kept=fmean(values) if values else None,
        lost=sum(flip["lost"] for flip in flips),
        won=sum(flip["won"] for flip in flips),
        answers=sum(flip[kind] for flip in flips for kind in kinds),
    )


def holds_facts(task: Mapping[str, Any]) -> bool:
    """Say whether a task asks for what the model knows."""
    return task["family"] == "factoid" or task.get("ability") == "knowledge"


def surely_worse(damage: dict[str, Any]) -> bool:
    """Say whether more answers were lost than won, beyond chance, after Holm's correction."""
    p, flips = damage.get("p_holm"), damage.get("flips")
    return bool(p is not None and p < _SURE and flips and flips["lost"] > flips["won"])
