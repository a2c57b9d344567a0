"""Streaming writer: one part per block, a journal, and a finish that is all or nothing.

While it runs, everything lies in a sibling folder ``OUT.partial``. Each part is written to a
temporary name, flushed to disk and renamed, and only then entered in the journal, so a kill at any
moment loses at most the block in progress. ``finish`` joins the parts into shards in
``OUT.partial/out`` and renames that folder to ``OUT``: what is called ``OUT`` is always complete.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.reader import DTYPES, Entry, read_entry, read_header
from rarefy.errors import RarefyError, disk_errors
from rarefy.formats.base import BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

JOURNAL = "journal.json"
SHARD_BYTES = 5_000_000_000


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that its name never shows partial content."""
    with disk_errors(path.parent):
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys in the order given."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


class Writer:
    """Writes one compressed checkpoint.

    Args:
        out: the folder to be made.
        key: hash of everything that decides the result; a partial folder with the same key is
            resumed, one with another key is refused.
        fresh: throw away what is there instead.

    Raises:
        RarefyError: ``out`` exists, or a partial result of another configuration does.
    """

    def __init__(self, out: Path, key: str, *, fresh: bool = False) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        if fresh:
            _remove(self.partial)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RarefyError(
                f"{out} exists and holds something else; choose another --out or give --fresh"
            )
        with disk_errors(out.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.journal: dict[str, Any] = {"key": key, "parts": {}}
        if (self.partial / JOURNAL).is_file():
            self.journal = json.loads((self.partial / JOURNAL).read_text())
            if self.journal["key"] != key:
                raise RarefyError(
                    f"{self.partial} holds a half-done run of another recipe, model or data; "
                    "choose another --out or give --fresh to discard it"
                )

    @property
    def folder(self) -> Path:
        """Where every other file of the result is to be put before ``finish``."""
        return self.partial / "out"

    def has(self, part: str) -> bool:
        """Whether a part is finished."""
        return part in self.journal["parts"]

    def notes(self, part: str) -> Any:
        """What was journalled with a finished part."""
        return self.journal["parts"][part]

    def add(self, part: str, tensors: Mapping[str, torch.Tensor], notes: object) -> None:
        """Store a part's tensors and enter it, with JSON-ready notes, in the journal."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        shapes = {n: (names[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()}
        with disk_errors(self.partial):
            _write_safetensors(self._file(part), shapes, lambda name: [_octets(tensors[name])])
        self.journal["parts"][part] = notes
        write_json(self.partial / JOURNAL, self.journal)

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        entries = read_header(self._file(part))
        return {name: read_entry(entry, name) for name, entry in entries.items()}

    def _file(self, part: str) -> Path:
        return self.partial / f"part-{part}.safetensors"

    def finish(self, parts: list[str], shard_bytes: int = SHARD_BYTES) -> None:
        """Join the parts into shards, then give the folder its final name."""
        with disk_errors(self.out.parent):
            for stale in self.folder.glob("model*.safetensors*"):
                stale.unlink()
            self._join([self._file(part) for part in parts], shard_bytes)
            _remove(self.out)
            self.folder.replace(self.out)
            _remove(self.partial)

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove an intermediate result."""
        _remove(folder)

    def _join(self, files: list[Path], shard_bytes: int) -> None:
        shards: list[dict[str, Entry]] = [{}]
        filled = 0
        for file in files:
            for name, entry in read_header(file).items():
                if filled + entry.size > shard_bytes and shards[-1]:
                    shards.append({})
                    filled = 0
                shards[-1][name] = entry
                filled += entry.size
        if len(shards) == 1:
            _write_shard(self.folder / "model.safetensors", shards[0])
            return
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(self.folder / file_name, shard)
            weight_map |= dict.fromkeys(shard, file_name)
        size = sum(entry.size for shard in shards for entry in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _write_shard(path: Path, shard: Mapping[str, Entry]) -> None:
    """Copy tensors of other files into one safetensors file without holding them in memory."""

    def chunks(name: str) -> Iterator[bytes]:
        entry = shard[name]
        with entry.file.open("rb") as source:
            source.seek(entry.start)
            left = entry.size
            while left:
                chunk = source.read(min(left, 1 << 24))
                left -= len(chunk)
                yield chunk

    shapes = {name: (entry.dtype, entry.shape, entry.size) for name, entry in shard.items()}
    _write_safetensors(path, shapes, chunks)


def _octets(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, without copying those of a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
    chunks: Callable[[str], Iterable[bytes | memoryview]],
) -> None:
    """Write a safetensors file as a stream, under a temporary name until it is on disk.

    Args:
        path: the file.
        tensors: name -> (safetensors dtype, shape, bytes).
        chunks: the bytes of a tensor, piece by piece.
    """
    # Readers may map the file: wide types first keeps every tensor aligned to its element.
    order = sorted(tensors, key=lambda name: -BYTES.get(tensors[name][0], 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, size = tensors[name]
        offsets = [offset, offset + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in chunks(name):
                out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)
