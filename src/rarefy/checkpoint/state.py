"""What earlier stages imposed on a checkpoint: ``state.json`` beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.writer import write_json
from rarefy.recipe import describe, format_from

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.formats.base import Format

NAME = "state.json"


@dataclass(frozen=True)
class State:
    """The compressed matrices of a checkpoint.

    Attributes:
        base: fingerprint of the dense checkpoint that everything began with.
        formats: module-side name -> the format that the module's matrix is stored in.
    """

    base: str = ""
    formats: dict[str, Format] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the state beside the weights."""
        nodes = {name: describe(fmt) for name, fmt in self.formats.items()}
        write_json(folder / NAME, {"version": 1, "base": self.base, "nodes": nodes})


def read_state(folder: Path) -> State:
    """The state of a checkpoint folder; empty for a dense one."""
    file = folder / NAME
    if not file.is_file():
        return State()
    data: dict[str, Any] = json.loads(file.read_text())
    formats = {name: format_from(node) for name, node in data["nodes"].items()}
    return State(data["base"], formats)
