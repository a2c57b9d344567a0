"""Lazy reader of a safetensors checkpoint: headers at once, bytes when asked for.

Tensors are read with ``pread`` instead of a memory map, so that pages of a checkpoint larger than
the memory never count as resident.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, safetensors dtype name, shape, first byte and byte count."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def read_header(file: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, in the order of their bytes.

    Raises:
        RarefyError: the file is no safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise RarefyError(f"{file} is truncated or not a safetensors file; fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise RarefyError(f"{file} has a damaged header; fetch it again") from error
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        start, end = info["data_offsets"]
        entries[name] = Entry(
            file, info["dtype"], tuple(info["shape"]), 8 + length + start, end - start
        )
    past = max((e.start + e.size for e in entries.values()), default=8 + length)
    if past > size:
        raise RarefyError(
            f"{file} is truncated: {size} bytes where its header promises {past}; fetch it again"
        )
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


class Checkpoint:
    """A folder with ``config.json`` and safetensors shards.

    Args:
        path: the folder.

    Raises:
        RarefyError: no config, no shard, or a damaged shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise RarefyError(f"{path} holds no config.json; give the folder of a model")
        try:
            self.config: dict[str, Any] = json.loads(config.read_text())
        except ValueError as error:
            raise RarefyError(f"{config} is not valid JSON: {error}") from error
        self.entries: dict[str, Entry] = {}
        for file in self.shards:
            self.entries |= read_header(file)

    @cached_property
    def shards(self) -> list[Path]:
        """The weight files, in order."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(p.name for p in self.path.glob("*.safetensors"))
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing or not names:
            raise RarefyError(
                f"{self.path} lacks the weight file {missing[0]}; fetch it again"
                if missing
                else f"{self.path} holds no safetensors file; convert the model to safetensors"
            )
        return [self.path / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor, in its stored type.

        Raises:
            RarefyError: no such tensor, an unknown type, or the file ends too early.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise RarefyError(f"{self.path} holds no tensor {name!r}; the checkpoint is incomplete")
        return read_entry(entry, name)

    def fingerprint(self) -> str:
        """Hash of the headers and of one page of every tensor: names the checkpoint cheaply."""
        digest = blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=16)
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            with entry.file.open("rb") as stream:
                stream.seek(entry.start + entry.size // 2)
                digest.update(stream.read(min(4096, entry.size - entry.size // 2)))
        return digest.hexdigest()


def read_entry(entry: Entry, name: str) -> torch.Tensor:
    """Read one tensor's bytes; see :meth:`Checkpoint.read`."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise RarefyError(f"{name} is stored as {entry.dtype}, which rarefy cannot read")
    if entry.elements == 0:
        return torch.empty(entry.shape, dtype=dtype)
    raw = bytearray(entry.size)
    view = memoryview(raw)
    with entry.file.open("rb", buffering=0) as stream:
        done = 0
        while done < entry.size:
            count = os.preadv(stream.fileno(), [view[done:]], entry.start + done)
            if count == 0:
                raise RarefyError(f"{entry.file} ends inside {name}; fetch it again")
            done += count
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)


def parameters(entries: Mapping[str, Entry]) -> int:
    """Stored elements of all tensors."""
    return sum(entry.elements for entry in entries.values())
