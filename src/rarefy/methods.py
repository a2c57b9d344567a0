"""The verb ``methods``: what the registries hold, and which presets use it."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rarefy.allocate.base import ALLOCATORS
from rarefy.formats.activation import ACTIVATIONS
from rarefy.formats.base import FORMATS, Format
from rarefy.formats.kv import CACHES
from rarefy.losses.base import LOSSES
from rarefy.objectives.base import OBJECTIVES
from rarefy.recipe import describe, iterate_formats, iterate_objectives, load_recipe, presets
from rarefy.signals.base import SIGNALS
from rarefy.solvers.base import SOLVERS
from rarefy.surgery.base import SURGERIES
from rarefy.synthesis.base import SYNTHESIZERS
from rarefy.transforms.base import TRANSFORMS
from rarefy.tuners.base import TUNERS

if TYPE_CHECKING:
    from rarefy.registry import Registry


REGISTRIES: tuple[Registry[Any], ...] = (
    FORMATS,
    ACTIVATIONS,
    CACHES,
    SOLVERS,
    TRANSFORMS,
    SURGERIES,
    ALLOCATORS,
    TUNERS,
    OBJECTIVES,
    SIGNALS,
    LOSSES,
    SYNTHESIZERS,
)


def methods() -> list[dict[str, Any]]:
    """One row per registered method, formats first.

    Returns:
        Dicts of name, role, family, paper, arxiv, file, presets (names of the shipped recipes
        that use it) and options (field -> default; "required" where there is none).
    """
    used = _users()
    return [
        {
            "name": card.name,
            "role": card.role,
            "family": card.family,
            "paper": card.paper,
            "arxiv": card.arxiv,
            "file": card.file,
            "presets": sorted(used[card.role, card.name]),
            "options": {k: _plain(v) for k, v in card.options.items()},
        }
        for registry in REGISTRIES
        for card in registry
    ]


def methods_markdown() -> str:
    """The catalogue as docs/methods.md: one table a role."""
    lines = [
        "# Methods",
        "",
        "Written by `rarefy methods --markdown docs/methods.md`. Options are the keys of recipes;",
        "a preset is a recipe that comes with the package.",
    ]
    rows = methods()
    for role in dict.fromkeys(row["role"] for row in rows):
        lines += ["", f"## {role.capitalize()}s", ""]
        lines += [
            "| Name | Family | Paper | File | Options | Presets |",
            "|:--|:--|:--|:--|:--|:--|",
        ]
        lines += [_line(row) for row in rows if row["role"] == role]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    paper = row["paper"]
    if row["arxiv"]:
        paper = f"[{paper or row['arxiv']}](https://arxiv.org/abs/{row['arxiv']})"
    options = ", ".join(
        f"`{key}` = {json.dumps(value)}" if value != "required" else f"`{key}` (required)"
        for key, value in row["options"].items()
    )
    presets = ", ".join(f"`{name}`" for name in row["presets"])
    cells = (f"`{row['name']}`", row["family"], paper, f"`{row['file']}`", options, presets)
    return "| " + " | ".join(cells) + " |"


def _plain(default: object) -> object:
    """A default as JSON knows it."""
    if default is ...:
        return "required"
    if isinstance(default, Format):
        return describe(default)
    registry = next((r for r in REGISTRIES if r.holds(default)), None)
    return default if registry is None else registry.name_of(default)


def _users() -> dict[tuple[str, str], set[str]]:
    """(role, method) -> names of the presets that use it."""
    used: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in presets():
        recipe = load_recipe(name)
        for stage in recipe.stages:
            used[stage.role, stage.name].add(name)
            if stage.allocator is not None:
                used[ALLOCATORS.role, ALLOCATORS.name_of(stage.allocator)].add(name)
            for _, scheme in stage.schemes:
                if scheme is not None and scheme.input is not None:
                    used[ACTIVATIONS.role, ACTIVATIONS.name_of(scheme.input)].add(name)
        for registry, part in iterate_objectives(recipe):
            used[registry.role, registry.name_of(part)].add(name)
        for fmt in iterate_formats(recipe):
            used[FORMATS.role, FORMATS.name_of(fmt)].add(name)
    return used
