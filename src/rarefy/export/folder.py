"""A checkpoint folder written from another one, a block at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.travel import travel
from rarefy.checkpoint.writer import Writer, write_json
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rarefy.export.order import Order
    from rarefy.formats.base import Format, Packed
    from rarefy.formats.integer import Int


def open_folder(directory: Path) -> Skeleton:
    """A folder that is to be written in another format.

    Raises:
        RarefyError: there is none.
    """
    if not directory.is_dir():
        raise RarefyError(f"there is no folder {directory}; give one that rarefy compress made")
    return Skeleton(Checkpoint(directory), torch.device("cpu"), factored=False)


def open_compressed(directory: Path) -> Skeleton:
    """The same, holding at least one compressed matrix."""
    skeleton = open_folder(directory)
    if not skeleton.earlier:
        raise RarefyError(f"{directory} holds no matrix that rarefy compressed; compress it first")
    return skeleton


def demand_linears(skeleton: Skeleton, target: str) -> None:
    """Refuse models whose compressed matrices other readers have no place for.

    Raises:
        RarefyError: blocks of different width, or a matrix that is no linear of the stock model.
    """
    if skeleton.widths:
        raise RarefyError(
            f"the blocks of {skeleton.checkpoint.path} differ in width, which {target} cannot say; "
            "only rarefy's own container can"
        )
    for name, node in skeleton.stored_matrices(skeleton.earlier, skeleton.state.inputs).items():
        if not node.plain:
            raise RarefyError(
                f"{name} is not the weight of a plain linear layer, the only thing that {target} "
                "compresses; leave it out of the recipe"
            )


def only_format(skeleton: Skeleton, target: str) -> Format:
    """The one format of all compressed matrices.

    Raises:
        RarefyError: there are several.
    """
    first, *others = skeleton.earlier.items()
    for name, fmt in others:
        if fmt != first[1]:
            raise RarefyError(
                f"{first[0]} is {first[1].label()} and {name} is {fmt.label()}, and rarefy writes "
                f"{target} with one format only; use one scheme for all"
            )
    return first[1]


def demand_no_rounded_inputs(skeleton: Skeleton, target: str) -> None:
    """Refuse rounded activations.

    Raises:
        RarefyError: the input of a matrix is rounded.
    """
    for name, rounding in skeleton.state.inputs.items():
        raise RarefyError(
            f"the input of {name} is rounded ({rounding.label()}), which {target} cannot say; "
            "export compressed-tensors"
        )


def demand_groups(skeleton: Skeleton, fmt: Int, unit: int, target: str) -> None:
    """Refuse matrices whose sides or groups do not fit words.

    Raises:
        RarefyError: rows or columns are no multiples of the unit, or a group is not whole.
    """
    for name in skeleton.earlier:
        rows, columns = skeleton.shape(name)
        if rows % unit or columns % unit:
            raise RarefyError(
                f"{name} is {rows} x {columns}, and {target} needs multiples of {unit}; "
                "leave it out of the recipe"
            )
        if fmt.group is not None and columns % fmt.group:
            raise RarefyError(
                f"groups of {fmt.group} do not divide the {columns} columns of {name}, which "
                f"{target} needs; choose a divisor"
            )


def half_scales(fmt: Int, name: str, packed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Stored scales in float16, [m, G].

    Raises:
        RarefyError: a bfloat16 scale is beyond float16.
    """
    scale = packed["weight_scale"].float()
    if not torch.equal(scale.half().float(), scale):
        raise RarefyError(
            f"a scale of {name} is stored in {fmt.scale_dtype} and beyond float16, the type that "
            "this layout has; export compressed-tensors"
        )
    return scale.half()


def parts_of(skeleton: Skeleton) -> dict[str, list[str]]:
    """Parameters by block, and those outside, so that one block is in memory at a time."""
    prefix = f"{skeleton.map.blocks}."
    parts: dict[str, list[str]] = {}
    for name in skeleton.parameter_names:
        if skeleton.tied and name.startswith(f"{skeleton.map.head}."):
            continue
        inside = name.startswith(prefix)
        part = f"{int(name[len(prefix) :].split('.')[0]):05d}" if inside else "outside"
        parts.setdefault(part, []).append(name)
    return parts


def write_folder(
    skeleton: Skeleton,
    order: Order,
    config: dict[str, Any],
    tensors: Callable[[list[str]], dict[str, torch.Tensor]],
    files: Mapping[str, object] | None = None,
) -> None:
    """Write a folder; a run that was killed goes on when it is repeated.

    Args:
        skeleton: the source. order: names the folder.
        config: of the new checkpoint.
        tensors: (module-side parameter names) -> stored tensors by stored name.
        files: further JSON files by name.
    """
    source = skeleton.checkpoint
    asked = f"{order.dtype} {order.type} {config.get('quantization_config')}"
    key = f"export {rarefy.__version__} {asked} {source.fingerprint()}"
    writer = Writer(order.out, key)
    parts = parts_of(skeleton)
    for number, (part, names) in enumerate(parts.items()):
        order.tell("parts", number, len(parts))
        if not writer.has(part):
            writer.add(part, tensors(names), None)
    write_json(writer.folder / "config.json", config)
    for name, content in (files or {}).items():
        write_json(writer.folder / name, content)
    travel(source.path, writer.folder)
    writer.finish(list(parts))


def converted(
    skeleton: Skeleton,
    names: list[str],
    convert: Callable[[str, Packed], Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Tensors of some parameters: compressed matrices converted, everything else as it is.

    Args:
        skeleton: the source. names: module-side parameter names.
        convert: (module-side name, stored tensors) -> new tensors by suffix.
    """
    found: dict[str, torch.Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module in skeleton.earlier:
            stored = skeleton.stored_name(module)
            new = convert(module, skeleton.packed(module))
            found |= {f"{stored}.{suffix}": t.contiguous() for suffix, t in new.items()}
        else:
            found[skeleton.stored_name(name)] = skeleton.read(name)
    return found


def plain_config(skeleton: Skeleton) -> dict[str, Any]:
    """The source's config without what it says of quantization."""
    config = skeleton.checkpoint.config
    return {key: value for key, value in config.items() if key != "quantization_config"}
