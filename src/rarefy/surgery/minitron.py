"""Minitron: units that hand on little are cut; forward passes only.

Paper: Muralidharan et al., *Compact Language Models via Pruning and Knowledge Distillation*,
NeurIPS 2024, arXiv 2407.14679; Sreenivas et al., *LLM Pruning and Distillation in Practice: The
Minitron Approach*, arXiv 2408.11796.

    head:    ||Attn_h(x)||_2, the norm of what the head hands to the output projection
    neuron:  |a_j(x)|, the activation that the neuron hands to the down projection

Symbols: x the tokens of the calibration text, Attn_h output channels of head h, a_j channel j of
the MLP's inner space.

Where we differ, and why:
 * norms are aggregated over tokens by the root mean square, sizes by the mean: additive over
   batches, where the paper mixes an L2 norm over samples with a mean over positions;
 * a key/value group with all of its query heads is the unit under grouped-query attention, because
   only whole groups can be cut and stored;
 * the hidden width stays: the norms average over it, so slicing it changes what the rest computes;
   depth is the business of the depth surgeries;
 * the distillation that the paper ends with is a stage of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.surgery.base import SURGERIES, Units, WidthSurgery

if TYPE_CHECKING:
    import torch


@SURGERIES.register(
    "minitron",
    family="pruning",
    paper="Muralidharan et al., Minitron, NeurIPS 2024",
    arxiv="2407.14679",
)
@dataclass(frozen=True)
class Minitron(WidthSurgery):
    """Importance by activations.

    Attributes:
        heads: share of the key/value groups to remove. neurons: share of the neurons.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"outputs"})

    heads: float = 0.25
    neurons: float = 0.25

    def score(self, units: Units) -> torch.Tensor:
        """Norm of a head's output, mean size of a neuron's activation."""
        assert units.outputs is not None
        return units.outputs.norm if units.kind == "heads" else units.outputs.size
