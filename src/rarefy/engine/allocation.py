"""Before the walk: share the formats' budget out among the matrices, by the stage's allocator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rarefy.allocate.base import ALLOCATORS, Matrix, Share
from rarefy.engine.capture import capture_all
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import matrix_of

if TYPE_CHECKING:
    from rarefy.allocate.base import Allocator
    from rarefy.engine.capture import Batch
    from rarefy.engine.select import Selection
    from rarefy.engine.skeleton import Skeleton
    from rarefy.engine.stage import StageRun

_PART = "allocation"


def allocate(run: StageRun, skeleton: Skeleton, chosen: Selection) -> Selection:
    """The selection with every format of a block at the density that the allocator gives it.

    The result is journalled, so a resumed run does not measure again.

    Raises:
        RarefyError: a format that has no budget.
    """
    allocator = run.stage.allocator
    assert allocator is not None
    if not run.writer.has(_PART):
        densities = _densities(run, skeleton, chosen, allocator)
        run.writer.add(_PART, {}, densities)
    table = run.writer.notes(_PART)
    blocks = tuple(
        {path: fmt.with_density(row[path]) for path, fmt in block.items()}
        for block, row in zip(chosen.blocks, table, strict=True)
    )
    return replace(chosen, blocks=blocks)


def _densities(
    run: StageRun, skeleton: Skeleton, chosen: Selection, allocator: Allocator
) -> list[dict[str, float]]:
    """Density of every matrix, by block and node path."""
    batches: list[Batch] = []
    measures, shares = [], []
    run.watcher.say(f"{ALLOCATORS.name_of(allocator)} measures every block first")
    with torch.no_grad():
        if allocator.needs and run.tokens is not None:
            batches = capture_all(skeleton, run.tokens.ids)
        for index, formats in enumerate(chosen.blocks):
            groups = [
                [node.path for node in group if node.path in formats]
                for group in skeleton.nodes(index).shared_inputs
            ]
            shares.append(
                {
                    path: Share(
                        *skeleton.shape(f"{skeleton.map.blocks}.{index}.{path}"), fmt.density
                    )
                    for path, fmt in formats.items()
                }
            )
            with skeleton.block(index) as module:
                seen = {}
                if batches:
                    watched = {group[0]: group[0] for group in groups if group}
                    found = observe(module, index, batches, watched, allocator.needs)
                    seen = {path: found[group[0]] for group in groups for path in group}
                block = {}
                for path in formats:
                    weight = matrix_of(module.get_submodule(path))
                    stats = seen[path].result() if path in seen else (None, None)
                    block[path] = Matrix(weight, gram=stats[0], moments=stats[1])
                measures.append(allocator.measure(block))
    densities = allocator.spread(measures, shares)
    _check(densities, shares)
    return densities


def _check(densities: list[dict[str, float]], shares: list[dict[str, Share]]) -> None:
    """An allocator that does not meet its budget is a defect, and its result is not used."""
    pairs = [
        (share, row[path])
        for row, block in zip(densities, shares, strict=True)
        for path, share in block.items()
    ]
    budget = sum(share.weights * share.density for share, _ in pairs)
    spent = sum(share.weights * density for share, density in pairs)
    if abs(spent - budget) > 1e-5 * budget or not all(0 < density <= 1 for _, density in pairs):
        raise AssertionError(f"the allocator spent {spent:.0f} of a budget of {budget:.0f} weights")
