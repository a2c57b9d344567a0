"""The transformers plug-in: ``quant_method: "rarefy"`` opens with ``from_pretrained``.

``import rarefy`` calls :func:`register`. Importing transformers' quantizers takes a second and tens
of megabytes, so the registration waits until transformers itself imports them.
"""

from __future__ import annotations

from typing import Any

import wrapt


def register() -> None:
    """Teach transformers to open folders in rarefy's own container."""
    wrapt.register_post_import_hook(_enter, "transformers.quantizers.auto")


def _enter(auto: Any) -> None:
    """Put rarefy into transformers' tables of quantizers.

    This may run in the middle of any import, so it imports next to nothing of rarefy.
    """
    from rarefy.runtime.container import RarefyConfig

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["rarefy"] = RarefyConfig
    auto.AUTO_QUANTIZER_MAPPING["rarefy"] = _quantizer


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """The quantizer; its module is imported once there is a model to open."""
    from rarefy.runtime.quantizer import RarefyQuantizer

    return RarefyQuantizer(*args, **kwargs)
