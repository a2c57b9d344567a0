"""Phi 3 and 4: Llama's graph with q, k, v in one matrix and gate, up in another."""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import Node

PHI3 = replace(
    LLAMA,
    family="phi3",
    nodes=(
        Node("input_layernorm", "residual", ("attn_in",), kind="norm"),
        Node("self_attn.qkv_proj", "attn_in", ("query", "key", "value")),
        Node("self_attn.o_proj", "value", ("residual",)),
        Node("post_attention_layernorm", "residual", ("mlp_in",), kind="norm"),
        Node("mlp.gate_up_proj", "mlp_in", ("gate", "mlp_inner")),
        Node("mlp.down_proj", "mlp_inner", ("residual",)),
    ),
)

MAPS = (PHI3,)
"""The maps of this module."""
