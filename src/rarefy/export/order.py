"""What an exporter is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Order:
    """One export.

    Attributes:
        source: a folder; GGUF takes whatever ``resolve`` takes.
        out: the folder, or for GGUF the file, to be made.
        dtype: "dense" only: of every floating tensor.
        type: what dense matrices become: a GGUF type or mix; "FP8" for compressed-tensors.
        embedding: another GGUF type for the embedding and the head.
        imatrix: GGUF only: file or corpus that says how much each column matters.
        say: receives remarks. tell: receives (what, done, total).
    """

    source: str | Path
    out: Path
    dtype: str | None = None
    type: str | None = None
    embedding: str | None = None
    imatrix: str | None = None
    say: Callable[[str], None] = field(default=lambda text: None)
    tell: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)
