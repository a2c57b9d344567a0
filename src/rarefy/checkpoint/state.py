"""What earlier stages imposed on a checkpoint: ``state.json`` beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.writer import write_json
from rarefy.recipe import activation_from, describe, format_from

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format

NAME = "state.json"


@dataclass(frozen=True)
class State:
    """The compressed matrices of a checkpoint.

    Attributes:
        base: fingerprint of the dense checkpoint that everything began with.
        formats: module-side name -> the format that the module's matrix is stored in. A sparse
            one imposes its support on later stages; the places are stored with the values.
        inputs: module-side name -> how the module's input is rounded.
    """

    base: str = ""
    formats: dict[str, Format] = field(default_factory=dict)
    inputs: dict[str, Activation] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put the state beside the weights."""
        nodes = {name: describe(fmt) for name, fmt in self.formats.items()}
        inputs = {name: describe(activation) for name, activation in self.inputs.items()}
        state = {"version": 1, "base": self.base, "nodes": nodes, "inputs": inputs}
        write_json(folder / NAME, state)


def read_state(folder: Path) -> State:
    """The state of a checkpoint folder; empty for a dense one."""
    file = folder / NAME
    if not file.is_file():
        return State()
    data: dict[str, Any] = json.loads(file.read_text())
    formats = {name: format_from(node) for name, node in data["nodes"].items()}
    inputs = {name: activation_from(node) for name, node in data.get("inputs", {}).items()}
    return State(data["base"], formats, inputs)
