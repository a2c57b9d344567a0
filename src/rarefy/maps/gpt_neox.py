"""GPT-NeoX and Pythia: q, k, v of each head side by side in one matrix, parallel residual, GELU.

With the parallel residual both norms read the block's input; without it the second reads the sum
after attention. The residual edge cannot be folded, so one map serves both.
"""

from __future__ import annotations

from rarefy.maps.model_map import Edge, ModelMap, Node

GPT_NEOX = ModelMap(
    family="gpt_neox",
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    nodes=(
        Node("input_layernorm", "residual", ("attn_in",), kind="norm"),
        Node("attention.query_key_value", "attn_in", ("query", "key", "value"), layout="per_head"),
        Node("attention.dense", "value", ("residual",)),
        Node("post_attention_layernorm", "residual", ("mlp_in",), kind="norm"),
        Node("mlp.dense_h_to_4h", "mlp_in", ("mlp_inner",)),
        Node("mlp.dense_4h_to_h", "mlp_inner", ("residual",)),
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
    renames=((r"^lm_head\.", "embed_out."),),
)

MAPS = (GPT_NEOX,)
"""The maps of this module."""
