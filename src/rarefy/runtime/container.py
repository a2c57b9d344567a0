"""The ``quantization_config`` of a folder in rarefy's own container, as transformers reads it."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

VERSION = 1


class RarefyConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a folder in rarefy's own container.

    Attributes:
        version: of the container.
        groups: [{"scheme": format as plain data, "modules": stored module names}, ...], with
            "input", an activation format as plain data, where inputs are rounded.
        widths: kind of unit -> how many each block has, where blocks differ.
    """

    def __init__(
        self, version: int = VERSION, groups: Any = (), widths: Any = None, **_: Any
    ) -> None:
        self.quant_method = "rarefy"
        self.version = version
        self.groups = list(groups)
        self.widths = dict(widths or {})
