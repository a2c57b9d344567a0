"""What was done to a checkpoint, as written beside its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest and timings of a compressed folder; empty for a dense one."""
    merged: dict[str, Any] = {}
    for name in ("manifest.json", "timings.json"):
        if (folder / name).is_file():
            merged |= json.loads((folder / name).read_text())
    return merged
