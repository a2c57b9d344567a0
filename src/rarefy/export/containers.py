"""How a compressed checkpoint announces itself in ``config.json``.

Two containers hold the same packed tensors under the same names:

 * ``compressed-tensors`` (format ``pack-quantized``), which stock transformers and vLLM open, for
   integers of 2, 4 or 8 bits in linears with whole groups;
 * ``rarefy``, our own, for everything else; ``import rarefy`` teaches transformers to open it.

(compressed-tensors changed its packing of 3, 5, 6 and 7 bits between versions, so files of these
widths are not interchangeable there.)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.formats.integer import Int
from rarefy.recipe import describe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format
    from rarefy.surgery.base import Kind

_PACK_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Stored:
    """One compressed matrix, as a container sees it.

    Attributes:
        fmt: its format. shape: [out, in].
        plain: whether it is the weight of an ordinary ``nn.Linear`` of the stock model.
        input: how its input is rounded, if it is.
    """

    fmt: Format
    shape: tuple[int, int]
    plain: bool
    input: Activation | None = None


def obstacle(nodes: Mapping[str, Stored], uneven: bool = False) -> str | None:
    """Why compressed-tensors cannot hold these matrices, or None when it can.

    Args:
        nodes: stored module name -> compressed matrix.
        uneven: whether the blocks differ in width.
    """
    if uneven:
        return "the blocks differ in width, which no config of transformers can say"
    if len({node.fmt for node in nodes.values()}) > 1:
        return "several formats are mixed, which stock loaders decode by the first one's settings"
    for name, node in nodes.items():
        fmt = node.fmt
        if not isinstance(fmt, Int) or fmt.bits not in _PACK_BITS:
            return f"{name} is {fmt.label()}, and only 2, 4 and 8 bits are portable"
        if node.input is not None:
            return f"the input of {name} is rounded ({node.input.label()})"
        if not node.plain:
            return f"{name} is not the weight of a plain linear layer"
        if fmt.group is not None and node.shape[1] % fmt.group:
            return f"{fmt.group} does not divide the {node.shape[1]} columns of {name}"
    return None


def quantization_config(
    nodes: Mapping[str, Stored], dense: Sequence[str], widths: Mapping[Kind, Sequence[int]]
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint.

    Args:
        nodes: stored module name -> compressed matrix.
        dense: stored names of the linears that stay dense.
        widths: kind of unit -> how many each block has; empty where all blocks are alike.
    """
    by_scheme: dict[tuple[Format, Activation | None], list[str]] = defaultdict(list)
    for name, node in nodes.items():
        by_scheme[node.fmt, node.input].append(name)
    if obstacle(nodes, bool(widths)) is not None:
        groups = [
            {"scheme": describe(fmt), "modules": names}
            | ({} if rounding is None else {"input": describe(rounding)})
            for (fmt, rounding), names in by_scheme.items()
        ]
        ours = {"quant_method": "rarefy", "version": 1, "groups": groups}
        return ours | ({"widths": dict(widths)} if widths else {})
    [(fmt, _)] = by_scheme
    assert isinstance(fmt, Int)
    group = {
        "targets": ["Linear"],
        "weights": _arguments(fmt),
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "config_groups": {"group_0": group},
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        # transformers decodes at load time then; its other route cannot size packed zero points
        # (compressed-tensors 0.20). Other readers ignore the key.
        "dequantize": True,
    }


def _arguments(fmt: Int) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs, which forbids any further key."""
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "group" if fmt.group else "channel",
        "group_size": fmt.group,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
