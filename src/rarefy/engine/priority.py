"""Prioritised training: spend the budget of numbers, or of rows, where compression hurt most.

Two readings of a name that no paper defines:

    parameters   only the most damaged half-blocks move (nearest: Zimmer et al., PERP, 2312.15230)
                 damage = L(compressed) - L(compressed with this half dense)       "restoration"
                 damage = |(Q - W) X|^2 / |W X|^2 on the dense model's inputs X    "local"
    rows         of a pool, those whose loss exceeds the dense model's by most
                 (after Mindermann et al., RHO-LOSS, 2206.07137)

L is the divergence from the dense model. Halves are ranked by damage for each number that would
move, and one whose restoration does not help is never chosen. Scores come from the calibration
rows, not from those that are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

from rarefy.engine.skeleton import Skeleton, matrix_of
from rarefy.engine.whole import whole
from rarefy.errors import RarefyError
from rarefy.losses.base import Reading, Target
from rarefy.losses.forward_kl import ForwardKL

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from rarefy.engine.stage import StageRun
    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows
    from rarefy.stages import Priority

_TOKENS = 1024  # of a forward pass


@dataclass(frozen=True)
class Ranking:
    """What the budget goes to.

    Attributes:
        modules: names of the linears that may move.
        scores: half-block -> damage for each of its numbers.
    """

    modules: frozenset[str]
    scores: dict[str, float]


def rank_modules(run: StageRun, skeleton: Skeleton, priority: Priority) -> Ranking:
    """Choose the half-blocks that are trained.

    Args:
        run: its base is the dense model, its tokens are what damage is measured on.
        skeleton: of the compressed model, without weights.
        priority: what is asked for.

    Raises:
        RarefyError: there is nothing to compare with.
    """
    if run.base is None:
        raise RarefyError(
            "priority needs a model that was compressed: put a stage before the tuner, "
            "or name the dense model with --teacher"
        )
    assert run.tokens is not None
    ids = run.tokens.ids[: priority.rows].to(run.device)
    halves = _halves(skeleton)
    sizes = {half: sum(_size(skeleton, name) for name in names) for half, names in halves.items()}
    if priority.by == "random":
        generator = torch.Generator().manual_seed(priority.seed)
        scores = dict(
            zip(halves, torch.rand(len(halves), generator=generator).tolist(), strict=True)
        )
    else:
        measure = _restoration if priority.by == "restoration" else _local
        damage = measure(run, skeleton, halves, ids)
        scores = {half: damage[half] / sizes[half] for half in halves}
    order = sorted(halves, key=lambda half: scores[half], reverse=not priority.least)
    count = max(1, round(priority.share * len(halves)))
    chosen = [half for half in order if scores[half] > 0 or priority.least][:count]
    return Ranking(frozenset(name for half in chosen for name in halves[half]), scores)


def _halves(skeleton: Skeleton) -> dict[str, list[str]]:
    """The linears of every block by the module that holds them: attention and MLP."""
    found: dict[str, list[str]] = {}
    for index in range(len(skeleton.blocks)):
        for node in skeleton.linears(index):
            name = skeleton.node_name(index, node)
            half = f"{skeleton.map.blocks}.{index}.{node.path.partition('.')[0]}"
            found.setdefault(half, []).append(name)
    return found


def _size(skeleton: Skeleton, name: str) -> int:
    rows, columns = skeleton.shape(name)
    return rows * columns


@torch.no_grad()
def _restoration(
    run: StageRun, skeleton: Skeleton, halves: dict[str, list[str]], ids: torch.Tensor
) -> dict[str, float]:
    """How much closer the model comes if a half-block is dense again."""
    assert run.base is not None
    body = Skeleton(run.source, run.device, factored=False)
    dense = Skeleton(run.base, run.device)
    found = {}
    with whole(dense):
        wanted = [_logits(dense, part) for part in _parts(ids)]
    with whole(body):
        before = _divergence(body, ids, wanted)
        for half, names in halves.items():
            kept: dict[str, Any] = {name: _linear(body, name).weight for name in _plain(names)}
            for name, weight in kept.items():
                value = dense.read(f"{name}.weight").to(run.device, torch.float32)
                if value.shape != weight.shape:
                    raise RarefyError(
                        f"{name} has another shape in the dense model, so that no half can be "
                        "restored; leave out priority after surgery"
                    )
                _linear(body, name).weight = torch.nn.Parameter(value, requires_grad=False)
            found[half] = before - _divergence(body, ids, wanted)
            for name, weight in kept.items():
                _linear(body, name).weight = weight
    return found


@torch.no_grad()
def _local(
    run: StageRun, skeleton: Skeleton, halves: dict[str, list[str]], ids: torch.Tensor
) -> dict[str, float]:
    """Relative squared error of the linears' outputs on what the dense model feeds them."""
    assert run.base is not None
    body = Skeleton(run.source, run.device, factored=False)
    dense = Skeleton(run.base, run.device)
    errors: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        matrix = matrix_of(_linear(body, name))

        def after(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            W = matrix_of(module)
            delta = F.linear(args[0], matrix - W)
            clean = F.linear(args[0], W)
            lost, total = errors.get(name, (0.0, 0.0))
            errors[name] = (
                lost + float(delta.square().sum()),
                total + float(clean.square().sum()),
            )

        return after

    with whole(body), whole(dense):
        handles = [
            _linear(dense, name).register_forward_hook(watch(name))
            for names in halves.values()
            for name in _plain(names)
        ]
        try:
            for part in _parts(ids):
                _logits(dense, part)
        finally:
            for handle in handles:
                handle.remove()
    return {
        half: sum(lost / total for lost, total in (errors[name] for name in _plain(names)))
        for half, names in halves.items()
    }


def _plain(names: list[str]) -> list[str]:
    """Matrices by their own names, where factorized ones are trained as two."""
    return [*dict.fromkeys(n.removesuffix(".first").removesuffix(".second") for n in names)]


def _linear(skeleton: Skeleton, name: str) -> nn.Module:
    module: nn.Module = skeleton.model.get_submodule(name)
    return module


def _parts(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(ids, max(1, _TOKENS // ids.shape[1]))


def _logits(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, V]."""
    logits: torch.Tensor = skeleton.model(input_ids=ids, use_cache=False).logits
    return logits.flatten(0, 1).float()


def _divergence(skeleton: Skeleton, ids: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    """Mean divergence of a loaded model from the dense one's logits."""
    distance = ForwardKL()
    total = sum(
        float(distance.per_token(Reading(_logits(skeleton, part)), Target(logits=dense)).sum())
        for part, dense in zip(_parts(ids), wanted, strict=True)
    )
    return total / ids.numel()


@torch.no_grad()
def mean_loss(policy: Policy, rows: Rows) -> float:
    """Mean cross entropy of a policy on the counted tokens of some rows."""
    return -float(policy.score(rows).mean())
