"""Frozen items: which questions a task asks, in which order, kept as hashes of their content.

Only hashes are kept here, never a question: the text is read from its package at run time, and an
item that has changed there is noticed, because its hash is no longer found.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Row = dict[str, Any]


def ident(content: Mapping[str, Any]) -> str:
    """Return the id of an item: 16 hexadecimal digits of the sha256 of its canonical JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def frozen_ids(items: str) -> list[str]:
    """Return the frozen ids of a set of items, in the order in which they are asked.

    Raises:
        RarefyError: nothing is frozen under that name.
    """
    file = files("rarefy.tasks") / "frozen" / f"{items}.txt"
    if not file.is_file():
        raise RarefyError(
            f"no items are frozen for {items!r}: run python -m rarefy.tasks.freeze {items}"
        )
    return file.read_text(encoding="utf-8").split()


def select(items: str, rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose ids are frozen, in frozen order.

    Args:
        items: name of the set. rows: its candidates, each with an "id".

    Raises:
        RarefyError: nothing is frozen, or a frozen item is not among the candidates.
    """
    found = {row["id"]: row for row in rows}
    ids = frozen_ids(items)
    missing = [item for item in ids if item not in found]
    if missing:
        raise RarefyError(
            f"{len(missing)} of the {len(ids)} frozen items of {items!r} are not in their source "
            f"(first: {missing[0]}): it has changed, or its loader has; "
            f"freeze it anew and raise the task's version"
        )
    return [found[item] for item in ids]
