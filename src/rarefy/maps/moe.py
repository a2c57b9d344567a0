"""Mixtral and Qwen 3 MoE: Llama's attention, then a router and gated experts.

Every expert sees its own share of the tokens: ``expert_in.{e}`` has statistics of its own, but its
channels are those of ``mlp_in``, which the router reads too. A fold of ``mlp_in`` therefore
divides the columns of the router and of all experts.
"""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import Edge, Experts, Node

_ATTENTION = tuple(n for n in LLAMA.nodes if not n.path.startswith("mlp."))
_OUTSIDE = tuple(e for e in LLAMA.edges if e.name not in ("gate", "mlp_inner"))

MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    nodes=(
        *_ATTENTION,
        Node("mlp.gate", "mlp_in", (), kind="router"),
        Node("mlp.experts.{e}.gate_proj", "expert_in.{e}", ("gate.{e}",)),
        Node("mlp.experts.{e}.up_proj", "expert_in.{e}", ("mlp_inner.{e}",)),
        Node("mlp.experts.{e}.down_proj", "mlp_inner.{e}", ("residual",)),
    ),
    edges=(
        *_OUTSIDE,
        Edge("expert_in.{e}", "hidden", part_of="mlp_in"),
        Edge("gate.{e}", "expert"),
        Edge("mlp_inner.{e}", "expert", foldable=True),
    ),
    experts=Experts(
        container="mlp.experts",
        count="num_local_experts",
        gate="mlp.experts.{e}.gate_proj",
        up="mlp.experts.{e}.up_proj",
        down="mlp.experts.{e}.down_proj",
    ),
    renames=(
        (r"^mlp\.experts\.(\d+)\.gate_proj\.", r"block_sparse_moe.experts.\1.w1."),
        (r"^mlp\.experts\.(\d+)\.down_proj\.", r"block_sparse_moe.experts.\1.w2."),
        (r"^mlp\.experts\.(\d+)\.up_proj\.", r"block_sparse_moe.experts.\1.w3."),
        (r"^mlp\.gate\.", "block_sparse_moe.gate."),
    ),
)

assert MIXTRAL.experts is not None
QWEN3_MOE = replace(
    MIXTRAL,
    family="qwen3_moe",
    experts=replace(MIXTRAL.experts, count="num_experts"),
    renames=(),
    # Blocks with a dense MLP in between need a second graph, which one map does not hold.
    when=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
)

MAPS = (MIXTRAL, QWEN3_MOE)
"""The maps of this module."""
