"""OPT: biases everywhere, LayerNorm, and an MLP of two matrices.

ReLU is positively homogeneous, so fc1 folds into fc2; the same graph with another activation
(Galactica) keeps everything but that. OPT-350m normalizes after attention and the MLP: there the
norms write the residual stream itself, and no norm can be folded.
"""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.model_map import Edge, ModelMap, Node

_AFFINE = ("layer_norm_elementwise_affine", True)

OPT = ModelMap(
    family="opt",
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    nodes=(
        Node("self_attn_layer_norm", "residual", ("attn_in",), kind="norm"),
        Node("self_attn.q_proj", "attn_in", ("query",)),
        Node("self_attn.k_proj", "attn_in", ("key",)),
        Node("self_attn.v_proj", "attn_in", ("value",)),
        Node("self_attn.out_proj", "value", ("residual",)),
        Node("final_layer_norm", "residual", ("mlp_in",), kind="norm"),
        Node("fc1", "mlp_in", ("mlp_inner",)),
        Node("fc2", "mlp_inner", ("residual",)),
    ),
    edges=(
        Edge("residual", "hidden"),
        Edge("attn_in", "hidden", foldable=True),
        Edge("query", "heads"),
        Edge("key", "kv"),
        Edge("value", "kv", foldable=True),
        Edge("mlp_in", "hidden", foldable=True),
        Edge("mlp_inner", "intermediate", foldable=True),
    ),
    when=(_AFFINE, ("do_layer_norm_before", True), ("activation_function", "relu")),
)

GALACTICA = replace(
    OPT,
    edges=(*OPT.edges[:-1], Edge("mlp_inner", "intermediate")),
    when=(_AFFINE, ("do_layer_norm_before", True)),
)

OPT_POST_NORM = replace(
    OPT,
    final_norm="",
    nodes=(
        Node("self_attn.q_proj", "residual", ("query",)),
        Node("self_attn.k_proj", "residual", ("key",)),
        Node("self_attn.v_proj", "residual", ("value",)),
        Node("self_attn.out_proj", "value", ("attn_sum",)),
        Node("self_attn_layer_norm", "attn_sum", ("mlp_in",), kind="norm"),
        Node("fc1", "mlp_in", ("mlp_inner",)),
        Node("fc2", "mlp_inner", ("mlp_sum",)),
        Node("final_layer_norm", "mlp_sum", ("residual",), kind="norm"),
    ),
    edges=(
        Edge("residual", "hidden"),
        Edge("query", "heads"),
        Edge("key", "kv"),
        Edge("value", "kv", foldable=True),
        Edge("attn_sum", "hidden"),
        Edge("mlp_in", "hidden"),
        Edge("mlp_inner", "intermediate", foldable=True),
        Edge("mlp_sum", "hidden"),
    ),
    when=(_AFFINE, ("do_layer_norm_before", False), ("activation_function", "relu")),
)

MAPS = (OPT, GALACTICA, OPT_POST_NORM)
"""The maps of this module, the first whose conditions hold describes a model."""
