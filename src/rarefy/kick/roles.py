"""What kind of recipe a recipe is, and what people call its methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.allocate.base import ALLOCATORS
from rarefy.formats.base import FORMATS
from rarefy.recipe import iterate_formats
from rarefy.tuners.base import TUNERS

if TYPE_CHECKING:
    from rarefy.stages import Recipe

COMPOSITION = "composition"
_STORAGE = "storage"  # a format that only says how kept values are written
_FAMILIES = {"low-rank": "low rank"}
# One solver, which leaves every weight where its format puts it, has a name in every family.
_NEAREST = {"pruning": "magnitude", "quantization": "rtn", "low rank": "svd"}


def role(recipe: Recipe) -> str:
    """Return "quantization", "pruning", "low rank", "surgery", "recovery", or "composition"."""
    kinds = _kinds(recipe)
    return kinds.pop() if len(kinds) == 1 else COMPOSITION


def prunes(recipe: Recipe) -> bool:
    """Say whether the recipe sets weights to zero on purpose."""
    return "pruning" in _kinds(recipe)


def methods(recipe: Recipe) -> list[str]:
    """Return the names of its methods in order, allocators behind the solvers they serve."""
    names = []
    for stage in recipe.stages:
        nearest = _NEAREST.get(role(recipe)) if stage.name == "nearest" else None
        names.append(nearest or stage.name)
        if stage.allocator is not None:
            names.append(ALLOCATORS.name_of(stage.allocator))
    return names


def _kinds(recipe: Recipe) -> set[str]:
    families = {FORMATS.card(FORMATS.name_of(fmt)).family for fmt in iterate_formats(recipe)}
    kinds = {_FAMILIES.get(family, family) for family in families - {_STORAGE}}
    for stage in recipe.stages:
        if stage.role == "surgery":
            kinds.add("surgery")
        if stage.role == "tuner":
            kinds.add(TUNERS.card(stage.name).family)
        if any(scheme and scheme.input for _, scheme in stage.schemes):
            kinds.add("quantization")
    return kinds
