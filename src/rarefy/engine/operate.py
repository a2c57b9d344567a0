"""A surgery stage: score the dense model's units, cut the least, write a smaller ordinary model."""

from __future__ import annotations

import time
from dataclasses import replace
from math import floor
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.state import State
from rarefy.checkpoint.writer import write_json
from rarefy.engine.close import close, history
from rarefy.engine.importance import score_widths
from rarefy.engine.redundancy import choose_blocks
from rarefy.engine.resize import Sizes, check_opens, resized_config
from rarefy.engine.skeleton import Skeleton
from rarefy.engine.stage import untouched
from rarefy.errors import RarefyError
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import cut, parts_of, units_in
from rarefy.surgery.base import DepthSurgery, WidthSurgery

if TYPE_CHECKING:
    from rarefy.engine.stage import StageRun
    from rarefy.stages import Stage
    from rarefy.surgery.base import Kind

_CHOICE = "choice"  # the journalled part that holds the scores; no part of the result
_KINDS: tuple[Kind, ...] = ("heads", "neurons")


def run_surgery(run: StageRun, manifest: dict[str, Any]) -> None:
    """Choose what goes, cut every block to size, then close the new checkpoint.

    Args:
        run: what to do.
        manifest: facts known beforehand; the stage's own are added to what is written.

    Raises:
        RarefyError: the model is compressed already, its structure is not known, or what would be
            left is no model that transformers opens.
    """
    start = time.perf_counter()
    skeleton = Skeleton(run.source, run.device)
    wanted = sizes_after(skeleton, run.stage)
    earlier = sum(note["seconds"] for note in run.writer.journal["parts"].values())
    if not run.writer.has(_CHOICE):
        run.writer.add(_CHOICE, _choose(skeleton, run), _spent(start))
    scored = time.perf_counter()
    choice = run.writer.read(_CHOICE)
    gone = _gone(choice, wanted, getattr(run.stage.method, "ranking", "block"))
    sizes = _left_by(skeleton, wanted, choice, gone)
    check_opens(skeleton, sizes)
    for new in range(len(sizes.blocks)):
        _cut_block(run, skeleton, sizes, new, gone)
        run.watcher.step(new + 1, len(sizes.blocks))
    if not run.writer.has("outside"):
        tensors = untouched(skeleton, "", set())
        run.writer.add("outside", tensors, {"seconds": 0.0, "weights": _count(tensors)})
    parts = ["outside", *(f"{i:05d}" for i in range(len(sizes.blocks)))]
    folder = run.writer.folder
    State(skeleton.state.base or run.source.fingerprint()).write(folder)
    write_json(folder / "config.json", resized_config(skeleton, sizes))
    done = {
        "parameters_before": skeleton.parameters,
        "parameters_after": sum(run.writer.notes(part)["weights"] for part in parts),
        **_account(choice, gone),
    }
    facts = {"nodes": [], "kept": [], "fallbacks": [], "coverage": 0.0}
    timings = {
        "earlier": earlier,
        "score": scored - start,
        "cut": time.perf_counter() - scored,
    }
    close(run, manifest | facts | {"history": history(run, done)}, start - earlier, timings)
    run.writer.finish(parts)


def sizes_after(skeleton: Skeleton, stage: Stage) -> Sizes:
    """What a surgery stage would leave, before it is known which units go.

    Raises:
        RarefyError: see :func:`run_surgery`.
    """
    _refuse(skeleton, stage)
    sizes = _sizes(skeleton, stage)
    check_opens(skeleton, sizes)
    return sizes


def _refuse(skeleton: Skeleton, stage: Stage) -> None:
    skeleton.demand_dense(stage.name, "surgery", "cuts dense weights")
    if skeleton.map.experts is not None:
        raise RarefyError(
            f"{skeleton.map.family} is a mixture of experts, and {stage.name} cuts dense models "
            "only; use a recipe without surgery"
        )


def _sizes(skeleton: Skeleton, stage: Stage) -> Sizes:
    """What is to be left, as if the first blocks stayed and units went from all blocks alike.

    Raises:
        RarefyError: a share of less than one unit, or more blocks than there are.
    """
    method, dims = stage.method, dims_of(skeleton.model.config)
    count = len(skeleton.blocks)
    if isinstance(method, DepthSurgery):
        free = len(method.candidates(count))
        if method.blocks > free:
            raise RarefyError(
                f"{stage.name} is to remove {method.blocks} of {count} blocks, and with "
                f"protect: {method.protect} no more than {free} may go; ask for fewer blocks"
            )
        stays = count - method.blocks
        if not stays:
            raise RarefyError(f"{stage.name} would remove every block; ask for fewer blocks")
        return Sizes(tuple(range(stays)), (dims.kv,) * stays, (dims.intermediate,) * stays)
    assert isinstance(method, WidthSurgery)
    left = {
        kind: _left(units_in(dims, kind), share, f"{stage.name}, {kind}")
        for kind, share in zip(_KINDS, (method.heads, method.neurons), strict=True)
    }
    return Sizes(tuple(range(count)), (left["heads"],) * count, (left["neurons"],) * count)


def _left_by(
    skeleton: Skeleton,
    wanted: Sizes,
    choice: dict[str, torch.Tensor],
    gone: dict[Kind, tuple[torch.Tensor, ...]],
) -> Sizes:
    """What is left once it is known which blocks or units go."""
    if "removed" in choice:
        going = choice["removed"].tolist()
        blocks = (i for i in range(len(skeleton.blocks)) if i not in going)
        return replace(wanted, blocks=tuple(blocks))
    left = {
        str(kind): tuple(choice[kind].shape[1] - len(units) for units in blocks)
        for kind, blocks in gone.items()
    }
    return replace(wanted, **left)


def _left(units: int, share: float, what: str) -> int:
    """Units that stay if at most ``share`` of them go."""
    # 0.29 * 100 is a hair below 29.
    going = floor(share * units + 1e-6)
    if share and not going:
        raise RarefyError(
            f"{what}: a share of {share} of {units} is less than one; "
            f"ask for at least {1 / units:.3g} or for 0"
        )
    return units - going


def _choose(skeleton: Skeleton, run: StageRun) -> dict[str, torch.Tensor]:
    """Scores of units [blocks, units] by kind, or the scores of blocks and those removed."""
    method, ids = run.stage.method, _rows(run)
    if isinstance(method, DepthSurgery):
        removal = choose_blocks(skeleton, method, ids)
        return {"removed": torch.tensor(removal.blocks), "blocks": removal.scores.float().cpu()}
    assert isinstance(method, WidthSurgery)
    kinds = [kind for kind in _KINDS if getattr(method, kind)]
    found = score_widths(skeleton, method, kinds, ids)
    for kind, scores in found.items():
        bad = (~scores.isfinite()).any(1).nonzero()
        if len(bad):
            raise RarefyError(
                f"{run.stage.name} scored {kind} of block {int(bad[0])} NaN or infinite; "
                "check the model with `rarefy evaluate` before compressing it"
            )
    return {str(kind): scores for kind, scores in found.items()}


def _rows(run: StageRun) -> torch.Tensor | None:
    """The calibration tokens that the method asks for, [N, L]."""
    method = run.stage.method
    assert isinstance(method, DepthSurgery | WidthSurgery)
    if run.tokens is None or not method.needs:
        return None
    rows, length = run.tokens.ids.shape
    samples, tokens = method.samples or rows, method.length or length
    if samples > rows or tokens > length:
        raise RarefyError(
            f"{run.stage.name} reads {samples} rows of {tokens} tokens, and there are {rows} of "
            f"{length}; calibrate on more, or lower its samples and length"
        )
    return run.tokens.ids[:samples, :tokens]


def _gone(
    choice: dict[str, torch.Tensor], sizes: Sizes, ranking: str
) -> dict[Kind, tuple[torch.Tensor, ...]]:
    """Units to cut: kind -> ascending indices for each block.

    The lowest of every block, or ("model") as many of all blocks together; a unit of every block
    stays then, so that no block loses its attention or its MLP.
    """
    left: dict[Kind, tuple[int, ...]] = {"heads": sizes.heads, "neurons": sizes.neurons}
    found: dict[Kind, tuple[torch.Tensor, ...]] = {}
    for kind in _KINDS:
        if (scores := choice.get(kind)) is None:
            continue
        order = scores.argsort(dim=1, stable=True)
        going = [scores.shape[1] - stays for stays in left[kind]]
        if ranking == "model":
            free = scores.clone()
            free.scatter_(1, order[:, -1:], torch.inf)
            lowest = free.flatten().argsort(stable=True)[: sum(going)]
            going = (lowest // scores.shape[1]).bincount(minlength=len(scores)).tolist()
        rows = zip(order, going, strict=True)
        found[kind] = tuple(row[:count].sort().values for row, count in rows)
    return found


def _cut_block(
    run: StageRun,
    skeleton: Skeleton,
    sizes: Sizes,
    new: int,
    gone: dict[Kind, tuple[torch.Tensor, ...]],
) -> None:
    """Write what is left of a block under its new number."""
    if run.writer.has(f"{new:05d}"):
        return
    start = time.perf_counter()
    old, dims = sizes.blocks[new], dims_of(skeleton.model.config)
    prefix = f"{skeleton.map.blocks}.{old}."
    tensors = {
        name.removeprefix(prefix): skeleton.read(name)
        for name in skeleton.parameter_names
        if name.startswith(prefix)
    }
    for kind, units in gone.items():
        tensors = cut(tensors, parts_of(skeleton.map, dims, kind), units[old])
    stored = {
        skeleton.stored_name(f"{skeleton.map.blocks}.{new}.{name}"): tensor
        for name, tensor in tensors.items()
    }
    run.writer.add(f"{new:05d}", stored, _spent(start) | {"weights": _count(stored)})


def _spent(start: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start}


def _count(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _account(
    choice: dict[str, torch.Tensor], gone: dict[Kind, tuple[torch.Tensor, ...]]
) -> dict[str, Any]:
    """What the history says was removed, and why.

    Neurons are too many to list the score of each: ``lost`` is the share of each block's total
    importance that went.
    """
    if "removed" in choice:
        return {"removed": choice["removed"].tolist(), "scores": choice["blocks"].tolist()}
    lost = {
        kind: [
            float(row[at].sum() / row.sum()) for row, at in zip(choice[kind], units, strict=True)
        ]
        for kind, units in gone.items()
    }
    scores = {"heads": choice["heads"].tolist()} if "heads" in choice else {}
    removed = {kind: [at.tolist() for at in units] for kind, units in gone.items()}
    return {"removed": removed, "scores": scores, "lost": lost}
