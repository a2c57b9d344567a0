"""A model with all of its weights at once, for what cannot be had block by block: its loss."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from rarefy.engine.capture import outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from rarefy.engine.skeleton import Skeleton


@contextmanager
def whole(skeleton: Skeleton) -> Iterator[None]:
    """Load every weight in fp32, for the duration of the context.

    A tied head shares the embedding's matrix.
    """
    model, table = skeleton.model, skeleton.map
    modules = outside(skeleton)
    modules += [(f"{table.blocks}.{i}", block) for i, block in enumerate(skeleton.blocks)]
    if table.final_norm:
        modules.append((table.final_norm, model.get_submodule(table.final_norm)))
    head = model.get_submodule(table.head)
    if not skeleton.tied:
        modules.append((table.head, head))
    for name, module in modules:
        skeleton.fill(module, name)
    if skeleton.tied:
        head.weight = model.get_submodule(table.embedding).weight
    try:
        yield
    finally:
        for module in (head, *(module for _, module in modules)):
            skeleton.drop(module)


def next_token_loss(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every next token of the rows [N, L], summed over all of them.

    Args:
        skeleton: with all of its weights.
        ids: on the skeleton's device.
    """
    logits = skeleton.model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
