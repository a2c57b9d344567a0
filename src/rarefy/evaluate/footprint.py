"""Size of a model folder, measured from its files: nothing is taken from the recipe's word.

Only safetensors headers are read (plus the two integers of each ``weight_shape``), so a folder
of any size takes milliseconds. A packed linear ``X`` is stored as ``X.weight_packed``,
``X.weight_scale``, ``X.weight_zero_point`` and ``X.weight_shape`` and counts as the weights it
stands for; everything that belongs to it, scales and the places of sparse values included, counts
as its bytes. Two thin factors, ``X.first`` and ``X.second``, count as the matrix X.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embed_positions")
_HEADS = ("lm_head", "embed_out")
_PACKED = (".weight_scale", ".weight_packed", ".weight_values", ".weight_shape")


@dataclass(frozen=True)
class Part:
    """One weight as the model sees it: a dense tensor or a packed linear with its scales.

    Attributes:
        kind: "embedding", "head", "linear" or "other" (norms, biases).
        weights: logical element count. bytes: stored bytes, scales and zero points included.
        compressed: stored with scales, that is, in a packed or quantized layout.
    """

    name: str
    kind: str
    weights: int
    bytes: int
    compressed: bool


@dataclass(frozen=True)
class Footprint:
    """Size of one folder.

    Attributes:
        files: number of weight files. disk_bytes: their size on disk.
        payload_bytes: tensor data alone, without headers.
        parameters: logical count, a tied pair once.
        bits_compressed: bits per weight of the compressed linears, scales included; None without.
        bits_linear: of all linears inside the blocks. bits_model: of the whole model.
        ratio_16bit: 2 bytes per parameter of the source, over disk_bytes.
        ratio_stored: the source's disk bytes over disk_bytes; None when no source was given.
        coverage_linear: share of the blocks' linear weights that is compressed.
        coverage_model: share of all weights that is compressed.
        breakdown: stored bytes of "linear, compressed", "linear, kept", "embedding", ...
    """

    files: int
    disk_bytes: int
    payload_bytes: int
    parameters: int
    bits_compressed: float | None
    bits_linear: float | None
    bits_model: float
    ratio_16bit: float
    ratio_stored: float | None
    coverage_linear: float
    coverage_model: float
    breakdown: dict[str, int]


def footprint(folder: Path, source: Footprint | None = None) -> Footprint:
    """Measure a model folder.

    Args:
        folder: holds config.json and safetensors shards, dense or compressed.
        source: the dense model's footprint, against which the ratios are taken; without it the
            16-bit ratio uses this folder's own parameter count.

    Raises:
        RarefyError: no safetensors file, or one whose header cannot be read.
    """
    files = weight_files(folder)
    parts = _parts({name: entry for file in files for name, entry in _header(file).items()})
    disk, payload = sum(file.stat().st_size for file in files), sum(part.bytes for part in parts)
    parameters = sum(part.weights for part in parts) - _stored_twice(folder, parts)
    linear = [part for part in parts if part.kind == "linear"]
    compressed = [part for part in parts if part.compressed]
    breakdown: dict[str, int] = {}
    for part in parts:
        label = part.kind
        if part.kind == "linear" or part.compressed:
            label += ", compressed" if part.compressed else ", kept"
        breakdown[label] = breakdown.get(label, 0) + part.bytes
    return Footprint(
        files=len(files),
        disk_bytes=disk,
        payload_bytes=payload,
        parameters=parameters,
        bits_compressed=_bits(compressed),
        bits_linear=_bits(linear),
        bits_model=8 * payload / max(parameters, 1),
        ratio_16bit=2 * (source.parameters if source else parameters) / disk,
        ratio_stored=source.disk_bytes / disk if source else None,
        coverage_linear=_share([part for part in linear if part.compressed], linear),
        coverage_model=sum(part.weights for part in compressed) / max(parameters, 1),
        breakdown=breakdown,
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that loading the folder reads.

    The index decides where there is one: some folders also carry a second copy of the weights.

    Raises:
        RarefyError: there is none, or one that the index names is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise RarefyError(
            f"{folder} has no {missing[0] if missing else 'safetensors file'}; "
            "give a model folder with its weights"
        )
    return files


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors header: tensor name -> dtype, shape, data_offsets, and its file."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (ValueError, MemoryError, OverflowError) as error:
        raise RarefyError(f"{file} is not a readable safetensors file; fetch it again") from error
    header.pop("__metadata__", None)
    return {name: {**entry, "file": file} for name, entry in header.items()}


def _parts(header: dict[str, dict[str, Any]]) -> list[Part]:
    """Group the tensors of all shards into parts."""
    compressed = {name.rpartition(".")[0] for name in header if name.endswith(_PACKED)}
    stored: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in header.items():
        module, _, leaf = name.rpartition(".")
        mine = module in compressed and leaf.startswith(("weight", "input_scale"))
        key = f"{module}.weight" if mine else name
        begin, end = entry["data_offsets"]
        stored[key] = stored.get(key, 0) + end - begin
        if leaf == "weight_shape" and mine:
            shapes[key] = _shape(entry["file"], name)
        elif key == name:
            shapes[key] = tuple(entry["shape"])
    factored = _join_factors(stored, shapes)
    return [
        Part(
            name=key,
            kind=_kind(key, len(shapes.get(key, (0, 0)))),
            weights=math.prod(shapes.get(key, (0,))),
            bytes=stored[key],
            compressed=key in factored
            or (key.removesuffix(".weight") in compressed and key.endswith(".weight")),
        )
        for key in stored
    ]


def _join_factors(stored: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Count two thin factors, in place, as the one matrix that they stand for; return those."""
    found = set()
    for first in [name for name in stored if name.endswith(".first.weight")]:
        parent = first.removesuffix(".first.weight")
        second, whole = f"{parent}.second.weight", f"{parent}.weight"
        if second in stored:
            stored[whole] = stored.pop(first) + stored.pop(second)
            shapes[whole] = (shapes.pop(second)[0], shapes.pop(first)[1])
            found.add(whole)
    return found


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="numpy") as reader:
        return tuple(int(size) for size in reader.get_tensor(name))


def _kind(name: str, rank: int) -> str:
    module = name.split(".")[-2] if "." in name else name
    if module in _EMBEDDINGS:
        return "embedding"
    if module in _HEADS:
        return "head"
    return "linear" if rank > 1 else "other"


def _stored_twice(folder: Path, parts: list[Part]) -> int:
    """Count the weights of a head that is stored although it is tied to the embedding."""
    config = folder / "config.json"
    if not config.is_file() or not json.loads(config.read_text()).get("tie_word_embeddings"):
        return 0
    has_embedding = any(part.kind == "embedding" for part in parts)
    return sum(part.weights for part in parts if part.kind == "head" and has_embedding)


def _bits(parts: list[Part]) -> float | None:
    weights = sum(part.weights for part in parts)
    return 8 * sum(part.bytes for part in parts) / weights if weights else None


def _share(some: list[Part], of: list[Part]) -> float:
    return sum(part.weights for part in some) / max(sum(part.weights for part in of), 1)
