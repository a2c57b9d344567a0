"""Losses of rows of logits whose gradient has a closed form: one pass, a few rows at a time.

Autograd of a divergence written in torch keeps about five [N, V] tensors. Here every chunk of rows
is read once; its gradient is written where the backward pass will find it, and everything else
stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Rule = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""(logits [n, V] of the rows in a slice, the slice) -> (losses [n], gradients [n, V])."""

CHUNK = 1 << 20
"""Numbers in a chunk: 4 MiB of float32, which a processor's cache can hold."""


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rule: Rule, chunk: int) -> torch.Tensor:
        rows, width = logits.shape
        precision = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(rows, dtype=precision)
        slopes = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        size = max(1, chunk // max(1, width))
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            losses[part], slope = rule(logits[part].to(precision), part)
            if slopes is not None:
                slopes[part] = slope
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # In place: torch notices, and refuses, a second pass over the same graph.
        (slopes,) = ctx.saved_tensors
        return slopes.mul_(outer[:, None]), None, None


def rowwise(logits: torch.Tensor, rule: Rule, chunk: int = CHUNK) -> torch.Tensor:
    """Losses of all rows, differentiable once in the logits.

    Args:
        logits: float [N, V]; half precision is raised to float32 chunk by chunk.
        rule: loss and gradient of some rows; it must not write into what it is given.
        chunk: how many numbers are held at a time; at least one row is.

    Returns:
        Float [N].
    """
    if not torch.is_grad_enabled():
        logits = logits.detach()
    losses: torch.Tensor = _Rowwise.apply(logits, rule, chunk)  # type: ignore[no-untyped-call]
    return losses
