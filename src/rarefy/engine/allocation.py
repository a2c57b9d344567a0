"""Before the walk: share the formats' budget out among the matrices, by the stage's allocator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rarefy.allocate.base import (
    DensityAllocator,
    Matrix,
    Offer,
    Share,
    WidthAllocator,
)
from rarefy.engine.capture import capture_all
from rarefy.engine.importance import fisher
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import matrix_of
from rarefy.formats.base import stored_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.engine.capture import Batch
    from rarefy.engine.select import Selection
    from rarefy.engine.skeleton import Skeleton
    from rarefy.engine.stage import StageRun
    from rarefy.formats.base import Format

_PART = "allocation"


def allocate(run: StageRun, skeleton: Skeleton, chosen: Selection) -> Selection:
    """The selection with every format of a block at the density or width that it is given.

    The result is journalled, so a resumed run does not measure again.

    Raises:
        RarefyError: a format that has no budget.
    """
    allocator = run.stage.allocator
    widths = isinstance(allocator, WidthAllocator)
    if not run.writer.has(_PART):
        run.watcher.say(
            f"{run.stage.name}: every matrix is measured first, to share the budget out"
        )
        if isinstance(allocator, WidthAllocator):
            run.writer.add(_PART, {}, _widths(run, skeleton, chosen, allocator))
        else:
            assert isinstance(allocator, DensityAllocator)
            run.writer.add(_PART, {}, _densities(run, skeleton, chosen, allocator))
    table = run.writer.notes(_PART)
    blocks = tuple(
        {
            path: fmt.with_bits(row[path]) if widths else fmt.with_density(row[path])
            for path, fmt in block.items()
        }
        for block, row in zip(chosen.blocks, table, strict=True)
    )
    return replace(chosen, blocks=blocks)


def _densities(
    run: StageRun, skeleton: Skeleton, chosen: Selection, allocator: DensityAllocator
) -> list[dict[str, float]]:
    """Density of every matrix, by block and node path."""
    batches: list[Batch] = []
    measures, shares = [], []
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


def _widths(
    run: StageRun, skeleton: Skeleton, chosen: Selection, allocator: WidthAllocator
) -> list[dict[str, int]]:
    """Number of bits of every matrix, by block and node path."""
    assert run.tokens is not None
    length = min(allocator.length, run.tokens.ids.shape[1])
    ids = run.tokens.ids[:, : run.tokens.ids.shape[1] // length * length].reshape(-1, length)
    ids = ids[:: max(1, len(ids) // allocator.pieces)][: allocator.pieces]
    prefixes = [f"{skeleton.map.blocks}.{index}." for index in range(len(chosen.blocks))]
    names = [p + path for p, block in zip(prefixes, chosen.blocks, strict=True) for path in block]
    information = fisher(skeleton, names, ids)
    offers = {}
    with torch.no_grad():
        for index, (prefix, block) in enumerate(zip(prefixes, chosen.blocks, strict=True)):
            with skeleton.block(index) as module:
                for path, fmt in block.items():
                    weight = matrix_of(module.get_submodule(path))
                    offers[prefix + path] = _offer(
                        fmt, weight, information.pop(prefix + path), allocator.bits
                    )
    bits = allocator.choose(offers)
    spent = sum(float(o.bytes[allocator.bits.index(bits[name])]) for name, o in offers.items())
    if spent > sum(offer.given for offer in offers.values()):
        raise AssertionError("the allocator spent more than its budget")
    return [
        {path: bits[prefix + path] for path in block}
        for prefix, block in zip(prefixes, chosen.blocks, strict=True)
    ]


def _offer(
    fmt: Format, weight: torch.Tensor, information: torch.Tensor, bits: Sequence[int]
) -> Offer:
    """Bytes and expected damage of one matrix at every width."""
    formats = [fmt.with_bits(b) for b in bits]
    errors = (wide.fit(weight).round(weight).sub_(weight) for wide in formats)
    damage = [
        float((information * error.square_()).sum(dtype=torch.float64)) / 2 for error in errors
    ]
    shape = (weight.shape[0], weight.shape[1])
    return Offer(
        bytes=torch.tensor([stored_bytes(wide, *shape) for wide in formats], dtype=torch.float64),
        damage=torch.tensor(damage, dtype=torch.float64),
        given=stored_bytes(fmt, *shape),
    )


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
