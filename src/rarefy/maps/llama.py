"""Llama and its look-alikes: pre-norm, rotary GQA attention, SwiGLU."""

from __future__ import annotations

from rarefy.maps.model_map import Edge, ModelMap, Node

LLAMA = ModelMap(
    family="llama",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    nodes=(
        Node("input_layernorm", "residual", ("attn_in",), kind="norm"),
        Node("self_attn.q_proj", "attn_in", ("query",)),
        Node("self_attn.k_proj", "attn_in", ("key",)),
        Node("self_attn.v_proj", "attn_in", ("value",)),
        Node("self_attn.o_proj", "value", ("residual",)),
        Node("post_attention_layernorm", "residual", ("mlp_in",), kind="norm"),
        Node("mlp.gate_proj", "mlp_in", ("gate",)),
        Node("mlp.up_proj", "mlp_in", ("mlp_inner",)),
        Node("mlp.down_proj", "mlp_inner", ("residual",)),
    ),
    edges=(
        Edge("residual", "hidden"),
        Edge("attn_in", "hidden", foldable=True),
        Edge("query", "heads"),
        Edge("key", "kv"),
        Edge("value", "kv", foldable=True, repeat=True),
        Edge("mlp_in", "hidden", foldable=True),
        Edge("gate", "intermediate"),
        Edge("mlp_inner", "intermediate", foldable=True),
    ),
)

MAPS = (LLAMA,)
"""The maps of this module."""
