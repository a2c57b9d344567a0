"""Choose the items of a set once and for all: ``python -m rarefy.tasks.freeze [SET...]``.

Items are ordered by a hash of seed and id, which is a random order that does not depend on the
order of the source, and the first ones are kept.
"""

from __future__ import annotations

import hashlib
import sys
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.checkpoint.writer import write_atomic
from rarefy.tasks.loaders import source, sources

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rarefy.tasks.frozen import Row

SEED = 20260101


def chosen(candidates: Iterable[Row], items: int, spread: bool) -> list[str]:
    """Return the ids to freeze, in order.

    Args:
        candidates: rows with "id" and "cluster". items: how many to keep.
        spread: take from the clusters in turn.
    """
    clusters = {row["id"]: row["cluster"] for row in candidates}
    ids = sorted(clusters, key=_lot)
    if spread:
        groups: dict[str, list[str]] = {}
        for item in ids:
            groups.setdefault(clusters[item], []).append(item)
        rounds = zip_longest(*groups.values())
        ids = [item for item in chain.from_iterable(rounds) if item is not None]
    return ids[:items]


def _lot(item: str) -> str:
    return hashlib.sha256(f"{SEED} {item}".encode()).hexdigest()


def freeze(name: str) -> int:
    """Write the ids of a set beside this module; return their number."""
    known = source(name)
    ids = chosen(known.load(), known.items, known.spread)
    file = Path(__file__).parent / "frozen" / f"{name}.txt"
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, "".join(f"{item}\n" for item in ids).encode())
    return len(ids)


def main(names: list[str]) -> None:
    """Freeze the named sets, or all."""
    for name in names or sorted(sources()):
        print(f"{name}: {freeze(name)} items")


if __name__ == "__main__":
    main(sys.argv[1:])
