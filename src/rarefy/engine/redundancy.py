"""What depth surgeries ask about a model: how blocks move the state, and its loss without them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rarefy.engine.capture import capture, capture_all
from rarefy.engine.whole import next_token_loss, whole
from rarefy.errors import RarefyError
from rarefy.surgery.base import Stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.engine.skeleton import Skeleton
    from rarefy.surgery.base import DepthSurgery, Removal

_TOKENS_AT_ONCE = 1024  # of a pass that ends in logits, which are as wide as the vocabulary


def choose_blocks(skeleton: Skeleton, method: DepthSurgery, ids: torch.Tensor | None) -> Removal:
    """Ask a depth surgery which blocks of the dense model to remove.

    Args:
        skeleton: the source. method: chooses.
        ids: token rows [N, L]; None for a method without needs.

    Raises:
        RarefyError: hidden states are NaN or infinite.
    """
    count = len(skeleton.blocks)
    if ids is None:
        return method.choose(Stack(count))
    if "losses" in method.needs:
        with torch.no_grad(), whole(skeleton):
            return method.choose(Stack(count, losses=_Losses(skeleton, ids)))
    cosine, last = _states(skeleton, ids)
    return method.choose(Stack(count, cosine, last))


def _states(skeleton: Skeleton, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine between input and output of every block, and the last tokens' states."""
    cosines, lasts = [], []
    with torch.no_grad():
        batches = capture_all(skeleton, ids)
        for index in range(len(skeleton.blocks)):
            lasts.append(torch.cat([batch.hidden[:, -1] for batch in batches]).cpu())
            total = torch.zeros((), dtype=torch.float64)
            with skeleton.block(index) as module:
                for batch in batches:
                    out = batch.run(module, index)
                    cosine = torch.cosine_similarity(batch.hidden, out, dim=-1)
                    total += cosine.sum(dtype=torch.float64).cpu()
                    batch.hidden = out
            cosines.append(total / ids.numel())
    lasts.append(torch.cat([batch.hidden[:, -1] for batch in batches]).cpu())
    cosine, last = torch.stack(cosines), torch.stack(lasts, 1)
    if not bool(last.isfinite().all() and cosine.isfinite().all()):
        raise RarefyError(
            "hidden states are NaN or infinite on the calibration text; "
            "check the model with `rarefy evaluate` before compressing it"
        )
    return cosine, last


class _Losses:
    """Loss of a loaded model without some of its blocks.

    What the blocks before a candidate compute does not depend on it: they run once for all, and
    only what follows each candidate runs anew.
    """

    def __init__(self, skeleton: Skeleton, ids: torch.Tensor) -> None:
        self.skeleton = skeleton
        self.predicted = ids.shape[0] * (ids.shape[1] - 1)
        size = max(1, _TOKENS_AT_ONCE // ids.shape[1])
        parts = torch.split(ids.to(skeleton.device), size)
        self.batches = [(part, capture(skeleton, part)) for part in parts]
        first = self.batches[0][1]
        args, kwargs = first.calls[0]
        self.as_tuple = isinstance(skeleton.blocks[0](first.hidden, *args, **kwargs), tuple)

    def __call__(self, left: Sequence[int]) -> torch.Tensor:
        total = torch.zeros(len(left), dtype=torch.float64)
        blocks = self.skeleton.blocks
        for ids, start in self.batches:
            before = start
            for at, index in enumerate(left):
                after = before
                for later in left[at + 1 :]:
                    after = replace(after, hidden=after.run(blocks[later], later))
                total[at] += self._loss(ids, after.hidden).cpu()
                before = replace(before, hidden=before.run(blocks[index], index))
        return total / self.predicted

    def _loss(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Summed loss if the last block's output is ``hidden``: the blocks are bypassed."""
        out = (hidden,) if self.as_tuple else hidden
        try:
            for block in self.skeleton.blocks:
                block.forward = partial(_answer, out)
            return next_token_loss(self.skeleton, ids)
        finally:
            for block in self.skeleton.blocks:
                del block.forward


def _answer(out: Any, *args: Any, **kwargs: Any) -> Any:
    return out
