"""What width surgeries ask about a model: its units' weights, gradients and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from rarefy.engine.capture import capture_all
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import is_transposed, matrix_of
from rarefy.engine.whole import next_token_loss, whole
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import parts_of
from rarefy.surgery.base import Member, Outputs, Units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from rarefy.engine.capture import Batch
    from rarefy.engine.skeleton import Skeleton
    from rarefy.maps.units import Part
    from rarefy.surgery.base import Kind, WidthSurgery

Gradients = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Full path of a matrix -> mean gradient and mean squared gradient, as the module stores it."""


def score_widths(
    skeleton: Skeleton, method: WidthSurgery, kinds: Sequence[Kind], ids: torch.Tensor | None
) -> dict[Kind, torch.Tensor]:
    """Score all units of the dense model.

    Args:
        skeleton: the source. method: gives the scores. kinds: what is to be cut.
        ids: token rows [N, L]; None for a method without needs.

    Returns:
        Kind -> scores [blocks, units].
    """
    dims = dims_of(skeleton.model.config)
    parts = {kind: parts_of(skeleton.map, dims, kind) for kind in kinds}
    paths = sorted({part.node.path for owned in parts.values() for part in owned})
    grads: Gradients = {}
    batches: list[Batch] = []
    if ids is not None and "gradients" in method.needs:
        grads = gradients(skeleton, paths, ids)
    if ids is not None and "outputs" in method.needs:
        batches = capture_all(skeleton, ids)
    scores: dict[Kind, list[torch.Tensor]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        for index in range(len(skeleton.blocks)):
            prefix = f"{skeleton.map.blocks}.{index}"
            with skeleton.block(index) as module:
                outputs = _outputs(module, index, parts, batches) if batches else {}
                for kind, owned in parts.items():
                    members = tuple(_member(module, prefix, part, grads) for part in owned)
                    units = Units(kind, index, members, outputs.get(kind))
                    scores[kind].append(method.score(units).float().cpu())
    return {kind: torch.stack(rows) for kind, rows in scores.items()}


def _member(module: nn.Module, prefix: str, part: Part, grads: Gradients) -> Member:
    path = part.node.path
    linear = module.get_submodule(path)
    weight = part.take(matrix_of(linear))
    if not grads:
        return Member(path, part.edge, weight)
    first, second = (
        part.take(g.T if is_transposed(linear) else g) for g in grads[f"{prefix}.{path}"]
    )
    return Member(path, part.edge, weight, first, second)


def _outputs(
    module: nn.Module, index: int, parts: dict[Kind, tuple[Part, ...]], batches: list[Batch]
) -> dict[Kind, Outputs]:
    """Move the batches through a block; what its units hand to their readers on the way."""
    readers = {kind: next(p for p in owned if p.axis == 1) for kind, owned in parts.items()}
    watched = {part.node.path: part.node.path for part in readers.values()}
    seen = observe(module, index, batches, watched, frozenset({"moments"}))
    found: dict[Kind, Outputs] = {}
    for kind, part in readers.items():
        moments = seen[part.node.path].result()[1]
        assert moments is not None
        columns = part.index.flatten(1).to(moments.square.device)
        square, size = (m[columns].mean(1) for m in (moments.square, moments.size))
        found[kind] = Outputs(square.sqrt(), size)
    return found


def gradients(skeleton: Skeleton, paths: Sequence[str], ids: torch.Tensor) -> Gradients:
    """Gradients of the loss of the next token, by one backward pass for every row.

    Args:
        skeleton: the source. paths: of matrices, below every block. ids: token rows [N, L].
    """
    names = [f"{skeleton.map.blocks}.{i}.{p}" for i in range(len(skeleton.blocks)) for p in paths]
    with whole(skeleton):
        weights = [skeleton.model.get_submodule(name).weight.requires_grad_() for name in names]
        first = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        second = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        for row in torch.split(ids.to(skeleton.device), 1):
            loss = next_token_loss(skeleton, row) / (row.numel() - 1)
            grads = torch.autograd.grad(loss, weights)
            for total, squares, g in zip(first, second, grads, strict=True):
                total.add_(g, alpha=1 / len(ids))
                squares.addcmul_(g, g, value=1 / len(ids))
    return dict(zip(names, zip(first, second, strict=True), strict=True))


def fisher(skeleton: Skeleton, names: Sequence[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information of matrices, the mean over tokens.

    One backward pass for every row: scores of different tokens are independent, so that the square
    of their sum is on average the sum of their squares.

    Args:
        skeleton: the model. names: full paths of the matrices. ids: token rows [N, L].

    Returns:
        Full path -> mean squared gradient of log p(y) by each weight, [out, in], where y is drawn
        from the model's own distribution after each token.
    """
    generator = torch.Generator(skeleton.device).manual_seed(0)
    with whole(skeleton):
        modules = [skeleton.model.get_submodule(name) for name in names]
        weights = [module.weight.requires_grad_() for module in modules]
        sums = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        for row in torch.split(ids.to(skeleton.device), 1):
            logits = skeleton.model(input_ids=row, use_cache=False).logits.flatten(0, 1).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            score = -cross_entropy(logits, drawn.squeeze(-1), reduction="sum")
            for total, g in zip(sums, torch.autograd.grad(score, weights), strict=True):
                total.addcmul_(g, g, value=1 / ids.numel())
        found = [
            total.T if is_transposed(module) else total
            for total, module in zip(sums, modules, strict=True)
        ]
    return dict(zip(names, found, strict=True))
