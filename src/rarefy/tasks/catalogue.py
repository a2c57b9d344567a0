"""The catalogue of tasks: what there is, how much of it a profile asks, and tasks of the user's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rarefy.errors import RarefyError
from rarefy.registry import suggest
from rarefy.tasks.base import TaskInfo
from rarefy.tasks.local import local_task

__all__ = ["PROFILES", "catalogue", "local_task", "pack_dir", "profile"]

PROFILES = ("smoke", "full")


class _Loader(yaml.SafeLoader):
    """YAML in which a reference to a function stays its name: nothing is imported."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def pack_dir() -> Path:
    """Return the folder of the task files, for the harness's ``include_path``."""
    return Path(__file__).parent / "pack"


@cache
def _catalogue() -> tuple[TaskInfo, ...]:
    found = [_info(path) for path in sorted(pack_dir().glob("*.yaml"))]
    names = {info.name for info in found}
    for info in found:
        assert info.partner is None or info.partner in names, f"{info.name} has no {info.partner}"
    return tuple(found)


def catalogue() -> dict[str, TaskInfo]:
    """Return every task of the pack by its name, such as ``rarefy_sciq``.

    Raises:
        RarefyError: the facts of a task file are incomplete or unknown.
    """
    return {info.name: info for info in _catalogue()}


def _info(path: Path) -> TaskInfo:
    with path.open(encoding="utf-8") as stream:
        config: dict[str, Any] = yaml.load(stream, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    try:
        return TaskInfo(name=config["task"], **config["metadata"])
    except (KeyError, TypeError, ValidationError) as error:
        raise RarefyError(f"the task file {path} lacks or mistakes a fact: {error}") from error


def profile(name: str) -> dict[str, int | None]:
    """Return the tasks of a profile and the number of their items; None stands for all.

    Args:
        name: ``smoke`` (minutes on two cores, only the tasks that ask for a place) or ``full``.

    Raises:
        RarefyError: there is no such profile.
    """
    if name not in PROFILES:
        raise RarefyError(f"there is no profile called {name!r}{suggest(name, [*PROFILES])}")
    if name == "full":
        return dict.fromkeys(catalogue())
    return {info.name: info.smoke for info in _catalogue() if info.smoke}
