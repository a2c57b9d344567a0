"""What the blocks are called with: hidden states and every other argument, without running them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError
from rarefy.maps.discover import discover_block

if TYPE_CHECKING:
    from torch import nn

    from rarefy.engine.skeleton import Skeleton


@dataclass
class Batch:
    """One calibration batch on its way through the blocks.

    Attributes:
        hidden: input of the next block, [B, L, hidden].
        calls: for every block, its other positional and keyword arguments.
    """

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, block: nn.Module, index: int) -> torch.Tensor:
        """Output of a block on this batch."""
        args, kwargs = self.calls[index]
        out = block(self.hidden, *args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _Stop(Exception):  # noqa: N818  (not an error: it ends the forward pass after the blocks)
    pass


def capture(skeleton: Skeleton, ids: torch.Tensor) -> Batch:
    """Run the model up to its blocks and note what each block is called with.

    The blocks themselves are bypassed, so models that give different blocks different arguments
    (Gemma's local and global masks) are captured in one pass.

    Args:
        skeleton: its modules outside the blocks must be loaded.
        ids: token ids [B, L].
    """
    for as_tuple in (False, True):
        batch = Batch(torch.empty(0))
        originals = [block.forward for block in skeleton.blocks]
        try:
            for index, block in enumerate(skeleton.blocks):
                block.forward = partial(_record, batch, index, len(originals), as_tuple)
            with torch.no_grad():
                skeleton.model(input_ids=ids.to(skeleton.device), use_cache=False)
        except _Stop:
            return batch
        except _Mismatch:
            continue
        finally:
            for block in skeleton.blocks:
                del block.forward
    raise RarefyError(
        f"the blocks of model type {skeleton.map.family!r} are not called in the usual way "
        "(hidden states first); this architecture is not supported"
    )


class _Mismatch(Exception):  # noqa: N818  (the model unpacks its blocks' outputs, or does not)
    pass


def _record(batch: Batch, index: int, count: int, as_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    hidden = args[0] if args else kwargs.pop("hidden_states")
    if index == 0:
        batch.hidden = hidden
    elif not isinstance(hidden, torch.Tensor) or hidden.shape != batch.hidden.shape:
        raise _Mismatch
    batch.calls.append((tuple(args[1:]), kwargs))
    if index == count - 1:
        raise _Stop
    return (hidden,) if as_tuple else hidden


def outside(skeleton: Skeleton) -> list[tuple[str, nn.Module]]:
    """Leaf modules that run before the blocks: embeddings, positions, projections."""
    prefix = f"{skeleton.map.blocks}."
    skip = {skeleton.map.head, skeleton.map.final_norm}
    return [
        (name, module)
        for name, module in skeleton.model.named_modules()
        if module._parameters and not name.startswith(prefix) and name not in skip
    ]


def capture_all(skeleton: Skeleton, ids: torch.Tensor, batch_tokens: int = 1024) -> list[Batch]:
    """Capture calibration tokens [N, L] in batches of about ``batch_tokens`` tokens.

    Larger batches leave the cache between one operation and the next and are slower.
    """
    size = max(1, batch_tokens // ids.shape[1])
    modules = outside(skeleton)
    for name, module in modules:
        skeleton.fill(module, name)
    batches = [capture(skeleton, part) for part in torch.split(ids, size)]
    for _, module in modules:
        skeleton.drop(module)
    return batches


def complete_map(skeleton: Skeleton) -> None:
    """Give a model without a written map one: linears grouped by identical input."""
    if skeleton.map.nodes:
        return
    vocabulary = skeleton.model.config.vocab_size
    [batch] = capture_all(skeleton, torch.arange(8).unsqueeze(0) % vocabulary)
    with skeleton.block(0) as block, torch.no_grad():
        nodes, edges = discover_block(block, lambda: batch.run(block, 0))
    skeleton.map = replace(skeleton.map, nodes=nodes, edges=edges)
