"""The verb ``methods``: what the registries hold, and which presets use it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rarefy.formats.base import FORMATS
from rarefy.recipe import iterate_formats, load_recipe, presets
from rarefy.solvers.base import SOLVERS

if TYPE_CHECKING:
    from rarefy.registry import Registry


def methods() -> list[dict[str, Any]]:
    """One row per registered method, formats first.

    Returns:
        Dicts of name, role, family, paper, arxiv, file, presets (names of the shipped recipes
        that use it) and options (field -> default; "required" where there is none).
    """
    used = _users()
    registries: tuple[Registry[Any], ...] = (FORMATS, SOLVERS)
    return [
        {
            "name": card.name,
            "role": card.role,
            "family": card.family,
            "paper": card.paper,
            "arxiv": card.arxiv,
            "file": card.file,
            "presets": sorted(used[card.role, card.name]),
            "options": {k: "required" if v is ... else v for k, v in card.options.items()},
        }
        for registry in registries
        for card in registry
    ]


def _users() -> dict[tuple[str, str], set[str]]:
    """(role, method) -> names of the presets that use it."""
    used: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in presets():
        recipe = load_recipe(name)
        for stage in recipe.stages:
            used[SOLVERS.role, SOLVERS.name_of(stage.solver)].add(name)
        for fmt in iterate_formats(recipe):
            used[FORMATS.role, FORMATS.name_of(fmt)].add(name)
    return used
