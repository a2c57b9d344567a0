"""Gemma 2 and 3 (text): norms of ``1 + weight`` before and after attention and the MLP.

The norms that follow attention and the MLP (the sandwich) read a channel together with all
others, so that ``attn_out`` and ``mlp_out`` cannot be folded.
"""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import Edge, Node

GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    nodes=(
        Node("input_layernorm", "residual", ("attn_in",), kind="norm", offset=1.0),
        Node("self_attn.q_proj", "attn_in", ("query",)),
        Node("self_attn.k_proj", "attn_in", ("key",)),
        Node("self_attn.v_proj", "attn_in", ("value",)),
        Node("self_attn.o_proj", "value", ("attn_out",)),
        Node("post_attention_layernorm", "attn_out", ("residual",), kind="norm", offset=1.0),
        Node("pre_feedforward_layernorm", "residual", ("mlp_in",), kind="norm", offset=1.0),
        Node("mlp.gate_proj", "mlp_in", ("gate",)),
        Node("mlp.up_proj", "mlp_in", ("mlp_inner",)),
        Node("mlp.down_proj", "mlp_inner", ("mlp_out",)),
        Node("post_feedforward_layernorm", "mlp_out", ("residual",), kind="norm", offset=1.0),
    ),
    edges=(*LLAMA.edges, Edge("attn_out", "hidden"), Edge("mlp_out", "hidden")),
)
GEMMA3 = replace(GEMMA2, family="gemma3_text")

MAPS = (GEMMA2, GEMMA3)
"""The maps of this module."""
