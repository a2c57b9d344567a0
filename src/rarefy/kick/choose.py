"""From what a user writes after --recipes and --tasks to recipes, tasks and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.errors import RarefyError
from rarefy.recipe import load_recipe, presets
from rarefy.registry import suggest
from rarefy.tasks.catalogue import catalogue
from rarefy.tasks.catalogue import profile as item_counts
from rarefy.tasks.local import local_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rarefy.stages import Recipe
    from rarefy.tasks.base import TaskInfo

_PREFIX = "rarefy_"
_FEW = 20  # items of a task that the smoke profile leaves out


@dataclass
class Tasks:
    """What is asked.

    Attributes:
        counts: task -> number of items, None for all.
        files: the user's own tasks. infos: facts about both, in the order asked.
    """

    counts: dict[str, int | None] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    infos: dict[str, TaskInfo] = field(default_factory=dict)


def choose_recipes(text: str | None, default: Sequence[str]) -> list[Recipe]:
    """Load the recipes that a comma-separated list of globs names, each once, in order.

    An entry is a glob over preset names, or over recipe files; ``@key=value,key=value`` after it
    goes to every recipe that it names: ``wanda-*@sparsity=0.3``.

    Raises:
        RarefyError: an entry names nothing, or two recipes of different content share a name.
    """
    refs = list(default) if text is None else split_entries(text)
    chosen: dict[str, Recipe] = {}
    for recipe in (load_recipe(ref) for entry in refs for ref in _expand(entry)):
        known = chosen.setdefault(recipe.name, recipe)
        if known.source != recipe.source:
            raise RarefyError(
                f"two different recipes are called {recipe.name}; give one another name"
            )
    return list(chosen.values())


def split_entries(text: str) -> list[str]:
    """Split at commas, but keep the overrides of an entry together: ``a@x=1,y=2,b`` are two."""
    entries: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if entries and "@" in entries[-1] and "=" in piece and "@" not in piece:
            entries[-1] += f",{piece}"
        elif piece:
            entries.append(piece)
    if not entries:
        raise RarefyError("the list of recipes is empty; name at least one, or leave it out")
    return entries


def _expand(entry: str) -> list[str]:
    """Return the references that an entry stands for; only what is before @ is a pattern."""
    pattern, at, edits = entry.partition("@")
    known = list(presets())
    found = [name for name in known if fnmatchcase(name, pattern)]
    found = found or sorted(glob(str(Path(pattern).expanduser())))
    if not found:
        raise RarefyError(f"no preset and no file matches {pattern!r}{suggest(pattern, known)}")
    return [f"{name}{at}{edits}" for name in found]


def choose_tasks(text: str | None, profile: str) -> Tasks:
    """Choose tasks by globs over their names and by files of the user's own.

    Args:
        text: comma-separated; None takes what the profile has.
        profile: "smoke" or "full", for the numbers of items.

    Raises:
        RarefyError: an entry names neither a task nor a file, or a file is no task.
    """
    counts, tasks = item_counts(profile), Tasks()
    known = catalogue()
    for entry in _pieces(text) if text is not None else counts:
        if Path(entry).suffix == ".jsonl":
            _add_file(tasks, Path(entry).expanduser(), profile)
            continue
        # The profile's own first: a glob picks among them; what it leaves out must be meant.
        names = _matching(entry, counts) or _matching(entry, known)
        if not names:
            hint = suggest(entry, list(known))
            raise RarefyError(f"no task matches {entry!r}{hint}; your own is a .jsonl file")
        for name in names:
            few = known[name].smoke or _FEW if profile == "smoke" else None
            tasks.counts[name] = counts.get(name, few)
            tasks.infos[name] = known[name]
    return tasks


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that match, with or without the pack's prefix."""
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, _PREFIX + pattern)]


def _add_file(tasks: Tasks, file: Path, profile: str) -> None:
    info, _ = local_task(file)
    if info.name in tasks.infos:
        raise RarefyError(f"{file} is a second task called {info.name}; rename the file")
    tasks.files.append(file)
    tasks.counts[info.name] = info.smoke if profile == "smoke" else None
    tasks.infos[info.name] = info


def _pieces(text: str) -> list[str]:
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise RarefyError("the list of tasks is empty; name at least one, or leave it out")
    return pieces
