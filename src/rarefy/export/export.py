"""The verb ``export``: a folder that rarefy made, written in another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.errors import RarefyError
from rarefy.export.dense import export_dense
from rarefy.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Callable

EXPORTERS: dict[str, Callable[[Path, Path, str | None], None]] = {"dense": export_dense}
"""Format name -> function of (source folder, new folder, dtype name or None)."""


def export(
    directory: str | Path, out: str | Path, *, format: str = "dense", dtype: str | None = None
) -> Path:
    """Write a compressed folder in another format.

    Args:
        directory: a folder that ``compress`` made.
        out: the folder to be made; it appears only when it is complete.
        format: "dense" decodes every weight into plain safetensors, which anything can open.
        dtype: "float32", "float16" or "bfloat16"; by default that of the uncompressed weights.

    Returns:
        The new folder.

    Raises:
        RarefyError: an unknown format, or a folder that rarefy did not make.
    """
    writer = EXPORTERS.get(format)
    if writer is None:
        raise RarefyError(f"there is no export format {format!r}{suggest(format, list(EXPORTERS))}")
    writer(Path(directory), Path(out), dtype)
    return Path(out)
