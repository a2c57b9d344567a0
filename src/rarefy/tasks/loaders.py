"""Loaders: functions that read a set of items and shape each into one plain row.

A row has "id", "cluster" and whatever the templates of the task's YAML use. Several tasks may ask
the same items: closed and open book, letters and answer texts.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import rarefy.tasks
from rarefy.errors import RarefyError
from rarefy.registry import suggest
from rarefy.tasks.frozen import Row, ident, select

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Loader = Callable[[], list[Row]]


@dataclass(frozen=True)
class Source:
    """A registered loader.

    Attributes:
        load: returns all candidates, in any order; duplicates are dropped later.
        items: how many are frozen; all of them where there are fewer.
        spread: freeze the same number from every cluster, in turn, so that any first part of the
            frozen order is as even as it can be.
    """

    load: Loader
    items: int
    spread: bool = False


LOADERS: dict[str, Source] = {}


def loader(name: str, items: int, spread: bool = False) -> Callable[[Loader], Loader]:
    """Register a function as the loader of a set of items; see :class:`Source`."""

    def register(load: Loader) -> Loader:
        assert name not in LOADERS, f"two loaders are called {name!r}"
        LOADERS[name] = Source(load, items, spread)
        return load

    return register


def row(content: Mapping[str, Any], cluster: str | None = None, **derived: object) -> Row:
    """Build a row.

    Args:
        content: what makes the item this item; it is hashed into the id.
        cluster: what it has in common with others; its id if None.
        derived: further fields for the templates, which may change without a change of items.
    """
    name = ident(content)
    return {"id": name, "cluster": cluster or name, **content, **derived}


def sources() -> dict[str, Source]:
    """Return every loader by name: they register when the modules of this package are imported."""
    for module in pkgutil.iter_modules(rarefy.tasks.__path__):
        importlib.import_module(f"rarefy.tasks.{module.name}")
    return LOADERS


def source(name: str) -> Source:
    """Look up a loader.

    Raises:
        RarefyError: there is none of that name.
    """
    known = sources()
    if name not in known:
        raise RarefyError(f"there is no set of items called {name!r}{suggest(name, [*known])}")
    return known[name]


@cache
def _rows(name: str) -> tuple[Row, ...]:
    return tuple(select(name, source(name).load()))


def rows(name: str) -> list[Row]:
    """Return the frozen items of a set, in order, read once per process.

    Raises:
        RarefyError: the set is unknown or not frozen, or its source cannot be read or has changed.
    """
    return [dict(row) for row in _rows(name)]
