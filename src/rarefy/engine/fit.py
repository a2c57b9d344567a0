"""The one gradient loop: steps, learning rates, the best or the last numbers, checkpoints.

Whoever calls it says how gradients are made; the loop says when, how large a step they lead to,
and what is kept. A run that was killed goes on from its last checkpoint and ends with the same
bytes: the data of a step depends on the seed and the step's number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, isfinite, pi
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable

_SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Loop:
    """How a training run is cut into steps.

    Attributes:
        steps: updates.
        rows: token rows of each step.
        schedule: "linear" (to zero), "cosine" (to zero) or "constant", after the warm-up.
        warmup: first steps, over which the learning rate rises from zero.
        clip: largest norm of all gradients together, or None.
        best: keep the numbers of the step with the least loss, not of the last one.

    Raises:
        ValueError: a field outside these values.
    """

    steps: int
    rows: int = 4
    schedule: str = "linear"
    warmup: int = 0
    clip: float | None = None
    best: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rows < 1 or self.warmup < 0:
            raise ValueError("steps and warmup must be at least 0, and rows at least 1")
        if self.schedule not in _SCHEDULES:
            known = ", ".join(_SCHEDULES)
            raise ValueError(f"schedule must be one of {known}, not {self.schedule!r}")

    def factor(self, step: int) -> float:
        """Share of the learning rate at an update, the first being 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return {"linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2, "constant": 1.0}[
            self.schedule
        ]


@dataclass
class Progress:
    """Where a run stands; what a checkpoint holds beside the numbers and the optimizer's state.

    Attributes:
        step: updates done.
        losses: of each step, before its update.
        least: the least of them, and of which step.
        kept: the leaves at that step, if the loop keeps the best.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    least: tuple[float, int] = (float("inf"), -1)
    kept: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Hooks:
    """What is called around a step; each may be left at its silent default.

    Attributes:
        after: (progress) after every update: masks, checkpoints, news.
    """

    after: Callable[[Progress], None] = field(default=lambda progress: None)


def leaves_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All numbers that an optimizer moves."""
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def fit(
    loop: Loop,
    optimizer: torch.optim.Optimizer,
    gradients: Callable[[int], float],
    hooks: Hooks = Hooks(),
    progress: Progress | None = None,
) -> Progress:
    """Run the loop.

    Args:
        loop: its size.
        optimizer: whose groups carry their largest learning rate as ``lr``.
        gradients: (number of the step) -> loss; leaves the gradients in the leaves' ``grad``.
        hooks: called after every update.
        progress: where to go on; the optimizer and the leaves must have been restored.

    Returns:
        The losses; the leaves hold the result.

    Raises:
        RarefyError: the loss is NaN or infinite.
    """
    progress = progress or Progress()
    leaves = leaves_of(optimizer)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    while progress.step < loop.steps:
        step = progress.step
        optimizer.zero_grad(set_to_none=True)
        loss = gradients(step)
        if not isfinite(loss):
            raise RarefyError(
                f"the loss is {loss} at step {step + 1}; lower the learning rate, "
                "or check the model with `rarefy evaluate`"
            )
        progress.losses.append(loss)
        if loop.best and loss < progress.least[0]:
            progress.least = (loss, step)
            _copy(progress, leaves)
        if loop.clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves, loop.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * loop.factor(step)
        optimizer.step()
        progress.step = step + 1
        hooks.after(progress)
    optimizer.zero_grad(set_to_none=True)
    if loop.best and progress.kept:
        with torch.no_grad():
            for leaf, value in zip(leaves, progress.kept, strict=True):
                leaf.copy_(value)
    return progress


def _copy(progress: Progress, leaves: list[torch.Tensor]) -> None:
    if not progress.kept:
        progress.kept = [leaf.detach().clone() for leaf in leaves]
        return
    for value, leaf in zip(progress.kept, leaves, strict=True):
        value.copy_(leaf.detach())


class SignSGD(torch.optim.Optimizer):
    """``theta <- theta - lr sign(m)``: every number moves by the same amount.

    ``m`` is the gradient (Bernstein et al., 2018, arXiv 1802.04434), or with momentum its running
    mean, ``m <- momentum m + (1 - momentum) gradient``, which forgives the noise of small batches.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is None:
                    continue
                direction = leaf.grad
                if group["momentum"]:
                    state = self.state[leaf]
                    mean = state.setdefault("mean", torch.zeros_like(leaf))
                    mean.lerp_(leaf.grad, 1 - group["momentum"])
                    direction = mean
                leaf.add_(direction.sign(), alpha=-group["lr"])
