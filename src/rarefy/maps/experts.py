"""Split a fused mixture of experts into one linear per matrix, and fuse it again.

transformers 5 keeps all experts of a block in two 3-D parameters, ``gate_up_proj`` [E, 2I, H] and
``down_proj`` [E, H, I]. Hooks and solvers see linears only, so the engine works on the split form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.maps.model_map import Experts

# What the decorator of fused containers declares, and the values that the split form computes.
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [T, H] to [T, H]."""
        return cast("Tensor", self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class SplitExperts(nn.ModuleList):
    """The experts of a block as a list; takes the place of the fused container.

    Args:
        fused: a transformers 5 experts container; it is kept, emptied, for ``fuse_experts``.
    """

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        act_fn = cast("Callable[[Tensor], Tensor]", fused.act_fn)
        super().__init__(Expert(g, d, act_fn) for g, d in zip(gate_up, down, strict=True))
        fused.register_parameter("gate_up_proj", None)
        fused.register_parameter("down_proj", None)
        # Inside a tuple the container is no submodule: it must not count as an expert.
        self.emptied = (fused,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up the weighted outputs of each token's experts, expert by expert.

        Args:
            hidden_states: tokens [T, H].
            top_k_index: the experts of each token [T, K].
            top_k_weights: their weights [T, K].

        Returns:
            [T, H]. Experts without tokens do not run.
        """
        out = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self):
            token, slot = torch.where(top_k_index == e)
            if token.numel() == 0:
                continue
            y = expert(hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def split_experts(block: nn.Module, experts: Experts) -> None:
    """Replace the fused container of a block in place; meta parameters stay meta.

    Raises:
        RarefyError: the container's experts are not plain gated ones (biases, transposed or
            interleaved weights), or have been split already.
    """
    fused = block.get_submodule(experts.container)
    if isinstance(fused, SplitExperts):
        raise RarefyError(f"the experts at {experts.container!r} have been split already")
    odd = [k for k, plain in _PLAIN.items() if getattr(fused, k, plain) != plain]
    if odd:
        raise RarefyError(
            f"the experts at {experts.container!r} ({type(fused).__name__}) differ from plain "
            f"gated experts in {', '.join(odd)}; this layout cannot be split"
        )
    block.set_submodule(experts.container, SplitExperts(fused))


def fuse_experts(block: nn.Module, experts: Experts) -> None:
    """Put the fused container back in place, with the experts' present weights.

    Raises:
        RarefyError: the experts are not split.
    """
    split = block.get_submodule(experts.container)
    if not isinstance(split, SplitExperts):
        raise RarefyError(f"the experts at {experts.container!r} are not split; nothing to fuse")
    members = [cast("Expert", e) for e in split]
    gate_up = torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in members])
    down = torch.stack([e.down_proj.weight for e in members])
    (fused,) = split.emptied
    trainable = members[0].down_proj.weight.requires_grad
    fused.gate_up_proj = nn.Parameter(gate_up.detach(), requires_grad=trainable)
    fused.down_proj = nn.Parameter(down.detach(), requires_grad=trainable)
    block.set_submodule(experts.container, fused)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear that owns a copy: views of one 3-D tensor could not be written or freed singly."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear
