"""GPT-2: Conv1D weights of shape [in, out], q, k, v in one matrix, GELU."""

from __future__ import annotations

from rarefy.maps.model_map import Edge, ModelMap, Node

GPT2 = ModelMap(
    family="gpt2",
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    nodes=(
        Node("ln_1", "residual", ("attn_in",), kind="norm"),
        Node("attn.c_attn", "attn_in", ("query", "key", "value"), kind="conv1d"),
        Node("attn.c_proj", "value", ("residual",), kind="conv1d"),
        Node("ln_2", "residual", ("mlp_in",), kind="norm"),
        Node("mlp.c_fc", "mlp_in", ("mlp_inner",), kind="conv1d"),
        Node("mlp.c_proj", "mlp_inner", ("residual",), kind="conv1d"),
    ),
    edges=(
        Edge("residual", "hidden"),
        Edge("attn_in", "hidden", foldable=True),
        Edge("query", "heads"),
        Edge("key", "kv"),
        Edge("value", "kv", foldable=True),
        Edge("mlp_in", "hidden", foldable=True),
        Edge("mlp_inner", "intermediate"),
    ),
    when=(("add_cross_attention", False),),
)

MAPS = (GPT2,)
"""The maps of this module."""
