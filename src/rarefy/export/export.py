"""The verb ``export``: a folder that rarefy made, written in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.errors import RarefyError
from rarefy.export.awq import export_awq
from rarefy.export.compressed_tensors import export_compressed_tensors
from rarefy.export.dense import export_dense
from rarefy.export.gguf import export_gguf
from rarefy.export.gptq import export_gptq
from rarefy.export.order import Order
from rarefy.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Callable


def _dense(order: Order) -> None:
    export_dense(Path(order.source), order.out, order.dtype)


EXPORTERS: dict[str, Callable[[Order], None]] = {
    "dense": _dense,
    "gguf": export_gguf,
    "gptq": export_gptq,
    "awq": export_awq,
    "compressed-tensors": export_compressed_tensors,
}
"""Format name -> what writes it."""

_OPTIONS = {
    "dtype": ("dense",),
    "type": ("gguf", "compressed-tensors"),
    "embedding": ("gguf",),
    "imatrix": ("gguf",),
}


def export(
    directory: str | Path,
    out: str | Path,
    *,
    format: str = "dense",
    dtype: str | None = None,
    type: str | None = None,
    embedding: str | None = None,
    imatrix: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a compressed folder in another format.

    Args:
        directory: a folder that ``compress`` made; for GGUF also a dense folder, a hub id, or
            "demo".
        out: the folder to be made, or the ``.gguf`` file; it appears only when it is complete.
        format: "dense" decodes every weight into plain safetensors, which anything can open;
            "gguf", "gptq", "awq" and "compressed-tensors" are what they are called.
        dtype: of a dense export: "float32", "float16" or "bfloat16"; by default that of the
            uncompressed weights.
        type: a GGUF type or mix such as "Q8_0" or "Q4_K_M", by default codes as they are stored
            and F16 for dense matrices; "FP8" for compressed-tensors of a dense model.
        embedding: another GGUF type for the embedding and the head.
        imatrix: how much each column matters to GGUF's encoders: a file of llama.cpp, or a corpus
            to measure it on.
        say: receives remarks. tell: receives progress as (what, done, total).

    Returns:
        The new folder or file.

    Raises:
        RarefyError: an unknown format, an option that it does not have, or a model that it cannot
            express; before any work is done.
    """
    exporter = EXPORTERS.get(format)
    if exporter is None:
        raise RarefyError(f"there is no export format {format!r}{suggest(format, list(EXPORTERS))}")
    given = {"dtype": dtype, "type": type, "embedding": embedding, "imatrix": imatrix}
    for name, value in given.items():
        if value is not None and format not in _OPTIONS[name]:
            raise RarefyError(
                f"--{name} belongs to {' and '.join(_OPTIONS[name])}, not to {format}; leave it out"
            )
    texts = {name: None if value is None else str(value) for name, value in given.items()}
    watch = {name: hook for name, hook in (("say", say), ("tell", tell)) if hook is not None}
    exporter(Order(directory, Path(out), **texts, **watch))  # type: ignore[arg-type]
    return Path(out)
