"""The verb ``kick``: plan the jobs, have them run, and put what they found on one leaderboard."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.writer import write_atomic
from rarefy.engine.skeleton import causal_config
from rarefy.errors import RarefyError, disk_errors
from rarefy.kick.choose import choose_recipes, choose_tasks
from rarefy.kick.local import run_local
from rarefy.kick.profiles import Profile, find_profile
from rarefy.kick.spec import DENSE, RESULT, SPEC, Spec, differences, read_spec, write_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.kick.choose import Tasks
    from rarefy.kick.local import Tell
    from rarefy.stages import Recipe


@dataclass(frozen=True)
class Options:
    """How a leaderboard is made, beyond what is measured.

    Attributes:
        tasks: globs over task names and .jsonl files, comma-separated; None for the profile's.
        seed: of the choice of calibration documents.
        jobs: local processes at a time; with more than one, speed and energy are not measured,
            since jobs would slow one another down.
        threads: of PyTorch in each job; None shares the machine's out.
        ray: address of a Ray cluster, empty for this machine's; None runs the jobs here.
        dola: "low" or "high": ask every model, the dense one too, with DoLa on these layers.
        keep: leave the compressed models in their folders.
        fresh: discard what is there first.
    """

    tasks: str | None = None
    seed: int = 0
    jobs: int = 1
    threads: int | None = None
    ray: str | None = None
    keep: bool = False
    fresh: bool = False
    dola: str | None = None


@dataclass(frozen=True)
class Leaderboard:
    """A finished leaderboard: the folder of its files, and the content of leaderboard.json."""

    path: Path
    content: dict[str, Any]


def kick(
    model: str | Path,
    recipes: str | None = None,
    out: str | Path | None = None,
    *,
    profile: str | Profile = "smoke",
    options: Options = Options(),
    tell: Tell = lambda *_: None,
) -> Leaderboard:
    """Compress a model by many recipes and find out what each of them cost it.

    An interrupted run goes on where it stopped when the same call is made again.

    Args:
        model: folder, ``.gguf`` file, hub id, or "demo".
        recipes: globs over presets and recipe files, comma-separated; the profile's when None.
        out: folder of the jobs and of the leaderboard; "kick/<model>-<profile>" when None.
        profile: "smoke", "full", or one of your own.
        options: see there.
        tell: called with (recipe, step, done, total).

    Raises:
        RarefyError: anything that a user can mend; a recipe that fails is an entry of "failed".
    """
    # Not above: it draws, and drawing takes a second to import.
    from rarefy.kick.board import leaderboard, read_finished, write_board

    profile = find_profile(profile) if isinstance(profile, str) else profile
    if options.dola not in (None, "low", "high"):
        raise RarefyError(f"--dola takes low or high layers, not {options.dola!r}")
    if options.keep and options.ray is not None:
        raise RarefyError("--keep is for local jobs: with --ray, models stay on their nodes")
    chosen = choose_recipes(recipes, profile.recipes)
    asked = choose_tasks(options.tasks, profile.items)
    if profile.limit is not None:
        most = profile.limit
        asked.counts = {name: min(count or most, most) for name, count in asked.counts.items()}
    source = resolve(model)
    folder = Path("kick") / f"{_stem(str(model))}-{profile.name}" if out is None else Path(out)
    specs = _specs(_shared(str(model), source, profile, options, asked), chosen)
    folders = {spec.recipe: folder / spec.folder for spec in specs}
    _prepare(folder, specs, asked.files, options.fresh)
    failed = _execute(list(folders.values()), options, tell)
    done = [recipe for recipe in chosen if not failed[folders[recipe.name]]]
    dense = read_finished(folders[DENSE], None)
    board = leaderboard(
        {
            "model": str(model),
            "reference": _reference(str(model), source, dense.result["protocol"]["arithmetic"]),
            "profile": profile.name + (f", DoLa {options.dola}" if options.dola else ""),
        },
        dense,
        [read_finished(folders[recipe.name], recipe) for recipe in done],
        list(asked.infos.values()),
        {name: why for name, path in folders.items() if (why := failed[path])},
    )
    write_board(board, folder)
    return Leaderboard(folder, board)


def _shared(model: str, source: Path, profile: Profile, options: Options, asked: Tasks) -> Spec:
    """Return the job of the dense model, from which the others differ by their recipe."""
    checkpoint = Checkpoint(source)
    causal_config(checkpoint)  # an architecture that cannot be built is refused before anything
    local = Path(model).expanduser()
    is_local = model != "demo" and local.exists()
    return Spec(
        recipe=DENSE,
        source=None,
        model=str(local.resolve()) if is_local else model,
        fingerprint=checkpoint.fingerprint(),
        calibration=replace(profile.calibration, seed=options.seed),
        text=profile.text,
        windows=profile.windows,
        length=profile.length,
        tasks=asked.counts,
        versions={name: asked.infos[name].version for name in asked.counts},
        local={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in asked.files},
        speed=profile.speed if options.jobs == 1 else 0,
        energy=profile.energy and options.jobs == 1,
        threads=options.threads or max(1, torch.get_num_threads() // options.jobs),
        rarefy=rarefy.__version__,
        dola=options.dola,
    )


def _specs(dense: Spec, recipes: Sequence[Recipe]) -> list[Spec]:
    specs = [dense]
    for recipe in recipes:
        source = {**recipe.source, "name": recipe.name}
        specs.append(replace(dense, recipe=recipe.name, source=source))
    taken: dict[str, str] = {}
    for spec in specs:
        other = taken.setdefault(spec.folder.casefold(), spec.recipe)
        if other != spec.recipe or (spec.recipe == DENSE and spec.source is not None):
            raise RarefyError(
                f"the recipe {spec.recipe} needs the folder of {other}; give it another name"
            )
    return specs


def _prepare(out: Path, specs: Sequence[Spec], files: Sequence[Path], fresh: bool) -> None:
    """Put into every job's folder what the job reads, unless it is there already."""
    for spec in specs:
        folder = out / spec.folder
        if fresh and (folder / SPEC).is_file():
            shutil.rmtree(folder)
        if (folder / SPEC).is_file():
            before = read_spec(folder)
            if before.key != spec.key:
                raise RarefyError(
                    f"{folder} was made with another configuration "
                    f"({differences(before, spec)}); choose another --out or give --fresh"
                )
            continue
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            write_atomic(folder / file.name, file.read_bytes())
        write_spec(folder, spec)  # the last: a folder with a specification is complete


def _execute(folders: Sequence[Path], options: Options, tell: Tell) -> dict[Path, str | None]:
    """Run the jobs that have no result; the dense one first, since nothing works without it."""
    waiting = [folder for folder in folders if not (folder / RESULT).is_file()]
    outcome: dict[Path, str | None] = dict.fromkeys(folders)
    for batch in (waiting[:1], waiting[1:]) if folders[0] in waiting else (waiting,):
        if not batch:
            continue
        if options.ray is None:
            outcome |= run_local(batch, workers=options.jobs, keep=options.keep, tell=tell)
        else:
            from rarefy.kick.remote import run_ray

            outcome |= run_ray(batch, address=options.ray, fresh=options.fresh, tell=tell)
        if outcome[folders[0]]:
            raise RarefyError(f"the dense model could not be measured: {outcome[folders[0]]}")
    return outcome


def _reference(model: str, source: Path, arithmetic: str) -> str:
    """Say what the dense model is: compression is judged against it, whatever it went through."""
    stored = "/".join(sorted({entry.dtype for entry in Checkpoint(source).entries.values()}))
    note = source / "source.json"
    made = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    origin = f", read from {made['file']} ({made['note']})" if {"file", "note"} <= set(made) else ""
    return f"The dense model is {model}, stored as {stored}{origin}, computed in {arithmetic}."


def _stem(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(model).name).strip(".-") or "model"
