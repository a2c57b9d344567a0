"""From the folders of finished jobs to one leaderboard."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from rarefy.checkpoint.writer import write_atomic, write_json
from rarefy.errors import RarefyError
from rarefy.evaluate.damage import compare, holm, lost
from rarefy.evaluate.records import read_records
from rarefy.evaluate.tracks import Run, least, tracks
from rarefy.kick import roles
from rarefy.kick.spec import DENSE, RECORDS, RESULT
from rarefy.report.leaderboard import leaderboard_html, leaderboard_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rarefy.evaluate.damage import TaskDamage
    from rarefy.evaluate.records import Record
    from rarefy.stages import Recipe
    from rarefy.tasks.base import TaskInfo

LOST = 20


@dataclass(frozen=True)
class Finished:
    """A finished job: the recipe (None for the dense model), its result and its records."""

    recipe: Recipe | None
    result: dict[str, Any]
    records: list[Record]


def read_finished(folder: Path, recipe: Recipe | None) -> Finished:
    """Read what a job left in its folder."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Finished(recipe, result, read_records(folder / RECORDS))


def leaderboard(
    title: Mapping[str, Any],
    dense: Finished,
    others: Sequence[Finished],
    infos: Sequence[TaskInfo],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Compare every finished job with the dense model, task by task.

    Args:
        title: model, reference and profile.
        dense: the reference. others: in the order of the board.
        infos: the tasks.
        failed: recipe -> why it has no result.

    Returns:
        The content of leaderboard.json: plain dicts, lists, numbers and strings.
    """
    failed = dict(failed)
    damages: dict[str, dict[str, TaskDamage]] = {}
    for other in others:
        try:
            damages[_name(other)] = _damages(dense, other, infos)
        except RarefyError as error:  # one ruined model must not hide the others
            failed[_name(other)] = str(error)
    comparisons = _correct(damages)
    itself = _damages(dense, dense, infos)
    first = _entry(dense, dense, itself, infos)
    entries = [
        _entry(dense, other, damages[_name(other)], infos)
        for other in others
        if _name(other) in damages
    ]
    _add_tracks(first, entries, infos)
    board = {
        **title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": dense.result["machine"],
        "versions": dense.result["versions"],
        "tasks": [
            info.model_dump()
            | {"items": itself[info.name].items, "clusters": itself[info.name].clusters}
            for info in infos
        ],
        "comparisons": comparisons,
        "dense": first,
        "entries": entries,
        "failed": [{"recipe": name, "error": why} for name, why in failed.items()],
    }
    # JSON knows neither infinity nor NaN; a ratio to nothing is simply not there.
    plain: dict[str, Any] = json.loads(to_json(board, inf_nan_mode="null"))
    return plain


def write_board(board: dict[str, Any], out: Path) -> None:
    """Write ``leaderboard.json``, ``leaderboard.html`` and ``leaderboard.md`` into a folder."""
    write_json(out / "leaderboard.json", board)
    write_atomic(out / "leaderboard.html", leaderboard_html(board).encode())
    write_atomic(out / "leaderboard.md", leaderboard_markdown(board).encode())


def _name(job: Finished) -> str:
    return DENSE if job.recipe is None else job.recipe.name


def _damages(dense: Finished, other: Finished, infos: Sequence[TaskInfo]) -> dict[str, TaskDamage]:
    before, after = _by_task(dense.records), _by_task(other.records)
    return {i.name: compare(before[i.name], after[i.name], i) for i in infos}


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task].append(record)
    return groups


def _correct(damages: dict[str, dict[str, TaskDamage]]) -> int:
    """Fill in Holm's p-values over all recipes and tasks together; return how many there are."""
    tested = [
        (tasks, name, damage.p_value)
        for tasks in damages.values()
        for name, damage in tasks.items()
        if damage.p_value is not None
    ]
    for (tasks, name, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        tasks[name] = replace(tasks[name], p_holm=p)
    return len(tested)


def _entry(
    dense: Finished, job: Finished, damages: dict[str, TaskDamage], infos: Sequence[TaskInfo]
) -> dict[str, Any]:
    recipe, cost = job.recipe, job.result["cost"]
    prunes = recipe is not None and roles.prunes(recipe)
    zeros = (cost["parameters"] - cost["nonzero"]) / max(cost["linear_parameters"], 1)
    return {
        "recipe": _name(job),
        "description": recipe.description if recipe else "the model as it is",
        "methods": roles.methods(recipe) if recipe else [],
        "role": roles.role(recipe) if recipe else DENSE,
        "level": {
            "sparsity": zeros if prunes else None,
            "bits": cost["bits_linear"],
            "parameters": cost["parameters"],
        },
        "cost": cost,
        "quality": job.result["quality"],
        "tasks": {name: asdict(damage) for name, damage in damages.items()},
        "families": _families(damages, infos),
        "tracks": {},
        "lost": [asdict(one) for one in lost(dense.records, job.records, LOST)],
    }


def _add_tracks(
    dense: dict[str, Any], entries: Sequence[dict[str, Any]], infos: Sequence[TaskInfo]
) -> None:
    """Fill in LLMCBench's tracks, which need the best of all entries."""
    abilities, best = {info.name: info.ability for info in infos}, least(entries)
    for entry in (dense, *entries):
        scored = tracks([Run(entry, dense, best=best)], abilities)
        entry["tracks"] = {name: asdict(track) for name, track in scored.items() if track}


def _families(
    damages: Mapping[str, TaskDamage], infos: Sequence[TaskInfo]
) -> dict[str, float | None]:
    """Mean of the relative scores of each family's tasks that can show damage."""
    shares: dict[str, list[float]] = {info.family: [] for info in infos}
    for info in infos:
        damage = damages[info.name]
        if damage.sensitive and damage.relative is not None:
            shares[info.family].append(max(0.0, damage.relative))
    return {family: fmean(found) if found else None for family, found in shares.items()}
