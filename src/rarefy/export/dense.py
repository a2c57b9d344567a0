"""Dense export: every compressed matrix decoded into an ordinary weight, a part at a time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

import rarefy
from rarefy.checkpoint.reader import DTYPES, Checkpoint
from rarefy.checkpoint.travel import travel
from rarefy.checkpoint.writer import Writer, write_json
from rarefy.engine.skeleton import Skeleton, is_transposed
from rarefy.errors import RarefyError
from rarefy.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PART_BYTES = 256_000_000


def export_dense(directory: Path, out: Path, dtype: str | None = None) -> None:
    """Write a folder that rarefy compressed as a plain checkpoint.

    Args:
        directory: the compressed folder, of either container.
        out: the folder to be made.
        dtype: "float32", "float16" or "bfloat16" for every floating tensor; by default that of
            the weights that were left alone.

    Raises:
        RarefyError: not a compressed folder, an unknown dtype, or ``out`` holds something else.
    """
    if not directory.is_dir():
        raise RarefyError(f"there is no folder {directory}; give one that rarefy compress made")
    skeleton = Skeleton(Checkpoint(directory), torch.device("cpu"))
    if not skeleton.state.formats:
        raise RarefyError(
            f"{directory} holds no matrix that rarefy compressed; it is dense already"
        )
    target = _target(skeleton, dtype)
    wanted = {word: DTYPES[code] for code, word in _NAMES.items()}[target]
    source = skeleton.checkpoint
    transposed = {
        skeleton.stored_name(name)
        for name, module in skeleton.model.named_modules()
        if is_transposed(module)
    }
    writer = Writer(out, f"dense {rarefy.__version__} {dtype} {source.fingerprint()}")
    parts = []
    for number, names in enumerate(_portions(skeleton)):
        parts.append(f"{number:05d}")
        if not writer.has(parts[-1]):
            tensors = {name: _dense(skeleton, name, wanted, transposed) for name in names}
            if dtype is not None:
                tensors = {
                    k: v.to(wanted) if v.is_floating_point() else v for k, v in tensors.items()
                }
            writer.add(parts[-1], tensors, None)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    config.pop("torch_dtype", None)
    write_json(writer.folder / "config.json", config | {"dtype": target})
    travel(source.path, writer.folder)
    writer.finish(parts)


def _target(skeleton: Skeleton, dtype: str | None) -> str:
    """The name of the floating type of decoded weights."""
    if dtype is None:
        packed = tuple(f"{module}." for module in skeleton.state.formats)
        kinds: Counter[str] = Counter()
        for name, entry in skeleton.checkpoint.entries.items():
            if entry.dtype in _NAMES and not name.startswith(packed):
                kinds[entry.dtype] += entry.size
        return _NAMES[kinds.most_common(1)[0][0]] if kinds else "float16"
    if dtype not in _NAMES.values():
        raise RarefyError(f"there is no export dtype {dtype!r}{suggest(dtype, [*_NAMES.values()])}")
    return dtype


def _portions(skeleton: Skeleton) -> Iterator[list[str]]:
    """Names of the dense checkpoint's tensors, in portions that fit the memory."""
    formats, entries = skeleton.state.formats, skeleton.checkpoint.entries
    portion: list[str] = []
    filled = 0
    for stored, entry in entries.items():
        module, _, leaf = stored.rpartition(".")
        is_packed = module in formats and leaf.startswith("weight")
        if is_packed and leaf != "weight_shape":
            continue
        name = f"{module}.weight" if is_packed else stored
        rows, columns = skeleton.checkpoint.read(stored).tolist() if is_packed else (1, 1)
        size = 4 * rows * columns if is_packed else entry.size
        if portion and filled + size > _PART_BYTES:
            yield portion
            portion, filled = [], 0
        portion.append(name)
        filled += size
    yield portion


def _dense(skeleton: Skeleton, name: str, dtype: torch.dtype, transposed: set[str]) -> torch.Tensor:
    """One tensor of the dense checkpoint; one that was never compressed keeps its type."""
    module = name.removesuffix(".weight")
    fmt = skeleton.state.formats.get(module)
    if fmt is None or name in skeleton.checkpoint:
        return skeleton.checkpoint.read(name)
    matrix = fmt.decode(skeleton.packed(module)).to(dtype)
    return matrix.T.contiguous() if module in transposed else matrix
