"""Which matrices of a model a stage compresses, into what, and why the others are left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from rarefy.errors import RarefyError
from rarefy.maps.discover import LINEARS

if TYPE_CHECKING:
    from collections.abc import Container

    from rarefy.engine.skeleton import Skeleton
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format
    from rarefy.stages import Stage


@dataclass(frozen=True)
class Selection:
    """The resolved scheme table of one stage.

    Attributes:
        blocks: for each block, node path -> format.
        outside: module name -> format, for the embedding and the head.
        inputs: module name -> how its input is rounded while the model runs.
        kept: module name -> reason, for every matrix that is left alone.
        notes: remarks that a user should see before the run.
    """

    blocks: tuple[dict[str, Format], ...]
    outside: dict[str, Format]
    inputs: dict[str, Activation]
    kept: dict[str, str]
    notes: tuple[str, ...]


def select(skeleton: Skeleton, stage: Stage) -> Selection:
    """Apply a stage's scheme table to a model, reading no weight.

    A stage without a table refines what earlier stages have compressed, each matrix in its format.

    Raises:
        RarefyError: a group larger than a row, a matrix that an earlier stage compressed already,
            or a table that matches nothing.
    """
    if not stage.schemes:
        return _refine(skeleton, stage)
    kept: dict[str, str] = {}
    notes: dict[str, None] = {}
    inputs: dict[str, Activation] = {}
    blocks = []
    for index, block in enumerate(skeleton.blocks):
        chosen: dict[str, Format] = {}
        for node in skeleton.linears(index):
            name = skeleton.node_name(index, node)
            scheme = stage.scheme_for(name, inside=True)
            if scheme is None:
                kept[name] = "left alone by the recipe"
                continue
            chosen[node.path] = _fitted(skeleton, name, scheme.weight, notes)
            if scheme.input is not None:
                inputs[name] = scheme.input
        blocks.append(chosen)
        inside = {node.path for node in skeleton.linears(index)}
        for path, module in block.named_modules():
            if path not in inside and isinstance(module, LINEARS):
                kept[f"{skeleton.map.blocks}.{index}.{path}"] = "not in the model map (a router)"
    outside = {}
    for name in (skeleton.map.embedding, skeleton.map.head):
        scheme = stage.scheme_for(name, inside=False)
        if scheme is None:
            kept[name] = "embeddings and head are left alone unless a pattern names them"
        elif scheme.input is not None:
            raise RarefyError(
                f"{name} lies outside the decoder blocks, where inputs are not rounded; "
                "leave its input out of the recipe"
            )
        elif scheme.weight.inner_width(*skeleton.shape(name)) is not None:
            raise RarefyError(
                f"{name} cannot be factorized: only the linears of decoder blocks can; "
                "give it another format, or 'keep'"
            )
        else:
            outside[name] = _fitted(skeleton, name, scheme.weight, notes)
    if not outside and not any(blocks):
        raise RarefyError("no matrix of the model matches a pattern of the recipe's schemes")
    return Selection(tuple(blocks), outside, inputs, kept, tuple(notes))


def _refine(skeleton: Skeleton, stage: Stage) -> Selection:
    """The matrices that are compressed already and whose numbers a tuner may go on moving.

    Raises:
        RarefyError: the tuner is to round, and there is none.
    """
    blocks: list[dict[str, Format]] = []
    kept: dict[str, str] = {}
    rounds = getattr(stage.method, "rounds", False)
    for index in range(len(skeleton.blocks)):
        names = {node.path: skeleton.node_name(index, node) for node in skeleton.linears(index)}
        formats = {path: skeleton.earlier.get(name) for path, name in names.items()}
        chosen = {path: fmt for path, fmt in formats.items() if rounds and fmt and fmt.learnable}
        kept |= {name: "left alone by the recipe" for p, name in names.items() if p not in chosen}
        blocks.append(chosen)
    if rounds and not any(blocks):
        raise RarefyError(
            f"{stage.name} has no schemes, and no matrix of {skeleton.checkpoint.path} has a grid "
            "yet; give the stage schemes, or put a solver with an integer format before it"
        )
    if not skeleton.earlier and getattr(stage.method, "stream", None):
        raise RarefyError(
            f"{stage.name} makes up for what compression does to a block, and no matrix of "
            f"{skeleton.checkpoint.path} is compressed; put a solver before it"
        )
    outside = "embeddings and head are left alone unless a pattern names them"
    kept |= dict.fromkeys((skeleton.map.embedding, skeleton.map.head), outside)
    return Selection(tuple(blocks), {}, {}, kept, ())


def _fitted(skeleton: Skeleton, name: str, fmt: Format, notes: dict[str, None]) -> Format:
    """Check a format against a matrix's shape and dress it for the checkpoint's dtype."""
    earlier = skeleton.earlier.get(name)
    if earlier is not None:
        kept = earlier.carrying(fmt)
        if kept is None:
            raise RarefyError(
                f"{name} is stored as {earlier.label()} already; "
                "exclude it with 'keep', or start from the dense model"
            )
        fmt = kept
    rows, columns = skeleton.shape(name)
    misfit = fmt.misfit(rows, columns)
    if misfit:
        raise RarefyError(f"{name}: {misfit}")
    span = fmt.span
    if span is not None and columns % span:
        notes[
            f"{span} does not divide the {columns} columns of {name.rsplit('.', 1)[-1]}: "
            "the last group of each row is shorter, and the result is stored in rarefy's own "
            "container (a divisor keeps it readable by other tools)"
        ] = None
    return fmt.for_dtype(skeleton.stored_dtype(name))


def dense_linears(skeleton: Skeleton, compressed: Container[str]) -> list[str]:
    """Stored names of every nn.Linear that stays dense, for containers' ignore lists."""
    return sorted(
        skeleton.stored_name(name)
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and name not in compressed
    )
