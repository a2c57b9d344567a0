"""Statistics of a block's edges while its batches pass through, nothing being changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.engine.walk import advance
from rarefy.errors import RarefyError
from rarefy.statistics import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from rarefy.engine.capture import Batch


def observe(
    module: nn.Module,
    index: int,
    batches: list[Batch],
    watched: Mapping[str, str],
    needs: frozenset[str],
) -> dict[str, Collector]:
    """Move the batches to a block's output and collect statistics of some inputs on the way.

    Args:
        module: the loaded block. index: its position. batches: moved.
        watched: path of a linear -> the name that its input's statistics are collected under;
            several linears may share a name (the experts of one edge).
        needs: "gram", "moments".

    Raises:
        RarefyError: an input is NaN or infinite.
    """
    found: dict[str, Collector] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def enter(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in found:
                found[name] = Collector(needs, x.shape[-1], x.device)
            found[name].add(x)

        return enter

    handles = [
        module.get_submodule(path).register_forward_pre_hook(hook(name))
        for path, name in watched.items()
    ]
    try:
        advance(module, index, batches)
    finally:
        for handle in handles:
            handle.remove()
    for name, collector in found.items():
        if not collector.finite():
            raise RarefyError(
                f"the input at {name} of block {index} is NaN or infinite on the calibration "
                "text; check the model with `rarefy evaluate` before compressing it"
            )
    return found
