from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, save_tiny, tiny, tiny_tokenizer
from torch import nn
from transformers import AutoTokenizer

from rarefy.errors import RarefyError
from rarefy.maps.catalogue import map_for, supported
from rarefy.maps.check import columns_of, left_alone, prove, rows_of
from rarefy.maps.discover import LINEARS, discover, discover_block, longest_block_list
from rarefy.maps.experts import SplitExperts, fuse_experts, split_experts
from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import Dims, Edge, Node, dims_of

torch.set_num_threads(1)
MOE = ("mixtral", "qwen3_moe")
IDS = torch.arange(40).view(2, 20)


def first_block(model, model_map):
    return model.get_submodule(model_map.blocks)[0]


def with_edge(model_map, edge: Edge):
    edges = tuple(edge if e.name == edge.name else e for e in model_map.edges)
    return replace(model_map, edges=edges)


def with_node(model_map, which: str, **changes):
    nodes = tuple(replace(n, **changes) if n.path == which else n for n in model_map.nodes)
    return replace(model_map, nodes=nodes)


# Maps against models


def test_every_tiny_family_has_a_map():
    assert set(supported()) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_proved_and_the_model_left_as_it_was(family):
    config, model = tiny(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model_map = map_for(config)
    full = model_map.expanded(dims_of(config))
    proofs = prove(model, model_map)
    foldable = [e.name for e in full.edges if e.foldable]
    assert [p.edge for p in proofs if p.block == 0] == foldable
    assert len(proofs) == len(foldable) * config.num_hidden_layers
    assert any(p.change > 0 for p in proofs), "a fold that changes no bit was not carried out"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_node_except_routers(family):
    config, model = tiny(family)
    model_map = map_for(config)
    block = first_block(model, model_map)
    if model_map.experts:
        split_experts(block, model_map.experts)
    full = model_map.expanded(dims_of(config))
    linears = {p for p, m in block.named_modules() if isinstance(m, LINEARS)}
    assert {n.path for n in full.linears} == linears
    assert left_alone(block, full) == (("mlp.gate",) if family in MOE else ())


@pytest.mark.parametrize(
    ("family", "overrides", "folds"),
    [
        ("opt", {"activation_function": "gelu"}, 6),
        ("opt", {"do_layer_norm_before": False}, 4),
        ("opt", {"word_embed_proj_dim": 32}, 8),
        ("opt", {"do_layer_norm_before": False, "activation_function": "gelu"}, None),
        ("gpt_neox", {"use_parallel_residual": False}, 6),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}, 8),
        ("gpt2", {"n_inner": None}, 6),
        ("qwen3_moe", {"mlp_only_layers": [0]}, None),
    ],
)
def test_variants_have_their_own_map_or_none(family, overrides, folds):
    config, model = tiny(family, **overrides)
    model_map = map_for(config)
    assert (model_map and len(prove(model, model_map))) == folds


def test_unknown_family_has_no_map():
    config, _ = tiny("llama")
    config.model_type = "never_heard_of"
    assert map_for(config) is None


# Negative controls: a wrong map is refused, and the sentence names the edge


def swapped_q_and_o():
    return with_node(with_node(LLAMA, "self_attn.q_proj", reads="value"), "self_attn.o_proj",
                     reads="attn_in")  # fmt: skip


def without_reader():
    return with_node(LLAMA, "mlp.gate_proj", reads="gate")


def router_forgotten():
    mixtral = map_for(tiny("mixtral")[0])
    return replace(mixtral, nodes=tuple(n for n in mixtral.nodes if n.kind != "router"))


def gate_and_up_swapped():
    return with_node(map_for(tiny("phi3")[0]), "mlp.gate_up_proj", writes=("mlp_inner", "gate"))


@pytest.mark.parametrize(
    ("family", "make", "named"),
    [
        ("gpt2", lambda m: with_edge(m, Edge("mlp_inner", "intermediate", foldable=True)),
         "edge 'mlp_inner'"),
        ("llama", lambda m: with_edge(m, Edge("residual", "hidden", foldable=True)),
         "edge 'residual'"),
        ("llama", lambda m: with_edge(m, Edge("value", "kv", foldable=True)), "edge 'value'"),
        ("llama", lambda _: swapped_q_and_o(), "edge 'attn_in'"),
        ("llama", lambda _: without_reader(), "edge 'mlp_in'"),
        ("llama", lambda m: with_node(m, "input_layernorm", offset=1.0), "edge 'attn_in'"),
        ("gemma2", lambda m: with_node(m, "input_layernorm", offset=0.0), "edge 'attn_in'"),
        ("gemma2", lambda m: with_edge(m, Edge("mlp_out", "hidden", foldable=True)),
         "edge 'mlp_out'"),
        ("gpt_neox", lambda m: with_node(m, "attention.query_key_value", layout="concat"),
         "edge 'value'"),
        ("phi3", lambda _: gate_and_up_swapped(), "edge 'mlp_inner'"),
        ("mixtral", lambda _: router_forgotten(), "edge 'mlp_in'"),
        ("llama", lambda m: replace(m, nodes=m.nodes[:3] + m.nodes[4:]), "self_attn.v_proj"),
        ("llama", lambda m: replace(m, nodes=(*m.nodes[:4], m.nodes[8], *m.nodes[4:8])),
         "edge 'mlp_inner'"),
        ("llama", lambda m: with_node(m, "mlp.up_proj", kind="conv1d"), "mlp.up_proj"),
        ("llama", lambda m: with_node(m, "mlp.up_proj", path="mlp.upp"), "mlp.upp"),
    ],
)  # fmt: skip
def test_a_wrong_map_is_refused(family, make, named):
    config, model = tiny(family)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RarefyError, match=re.escape(named)) as caught:
        prove(model, make(map_for(config)))
    assert family in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Rows, columns, widths


def test_rows_and_columns_by_hand():
    dims = Dims(hidden=8, heads=4, kv=2, head_dim=2, intermediate=6)
    value = LLAMA.edge("value")
    assert columns_of(value, dims).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert columns_of(replace(value, repeat=False), dims).tolist() == [0, 1, 2, 3]
    fused = Node("qkv", "attn_in", ("query", "key", "value"))
    assert rows_of(fused, value, LLAMA, dims).tolist() == [12, 13, 14, 15]
    mha = replace(dims, kv=4)
    per_head = replace(fused, layout="per_head")
    assert rows_of(per_head, value, LLAMA, mha).tolist() == [4, 5, 10, 11, 16, 17, 22, 23]


def test_dims_of():
    assert dims_of(tiny("gpt2", n_inner=None)[0]) == Dims(64, 4, 4, 16, 256)
    assert dims_of(tiny("opt")[0]) == Dims(64, 4, 4, 16, 96)
    assert dims_of(tiny("gemma3_text")[0]) == Dims(64, 4, 2, 32, 96)
    assert dims_of(tiny("qwen3_moe")[0]) == Dims(64, 4, 2, 32, 96, experts=4)
    with pytest.raises(RarefyError, match="'odd'"):
        dims_of(type("Config", (), {"model_type": "odd"})())


def test_expanded_writes_every_expert_out_in_order():
    config, _ = tiny("mixtral")
    full = map_for(config).expanded(dims_of(config))
    paths = [n.path for n in full.nodes if "experts" in n.path]
    assert paths == [f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")]
    assert not any("{e}" in text for n in full.nodes for text in (n.path, n.reads, *n.writes))
    assert [n.path for n in full.readers("mlp_in")][:2] == ["mlp.gate", "mlp.experts.0.gate_proj"]
    assert len(full.readers("mlp_in")) == 9
    assert [n.path for n in full.shared_inputs[2]] == [
        "mlp.experts.0.gate_proj", "mlp.experts.0.up_proj",
    ]  # fmt: skip
    assert LLAMA.expanded(dims_of(config)) is LLAMA


# Experts


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_split_experts_compute_what_the_fused_ones_do(family, implementation):
    config, model = tiny(family)
    model.set_experts_implementation(implementation)
    experts = map_for(config).experts
    block = model.model.layers[0]
    ran: list[int] = []
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fused = block.mlp.experts
    with torch.no_grad():
        expected = model(IDS).logits
        split_experts(block, experts)
        assert len(block.mlp.experts) == 4
        for e in range(4):
            module = block.get_submodule(experts.gate.format(e=e))
            module.register_forward_hook(lambda *_, e=e: ran.append(e))
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)
        assert ran == sorted(ran) and len(ran) > 1
        fuse_experts(block, experts)
        assert block.mlp.experts is fused
        assert torch.equal(model(IDS).logits, expected)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_an_expert_without_tokens_does_not_run():
    config, model = tiny("mixtral")
    block = model.model.layers[0]
    split_experts(block, map_for(config).experts)
    split, ran = block.mlp.experts, []
    for e, expert in enumerate(split):
        expert.register_forward_hook(lambda *_, e=e: ran.append(e))
    x, weights = torch.randn(3, 64), torch.tensor([[0.75, 0.25]] * 3)
    y = split(x, torch.tensor([[3, 1]] * 3), weights)
    assert ran == [1, 3]
    torch.testing.assert_close(y, 0.75 * split[3](x) + 0.25 * split[1](x))


def test_changed_experts_survive_fusing_and_meta_stays_meta():
    config, model = tiny("mixtral")
    experts = map_for(config).experts
    block, other = model.model.layers
    split_experts(block, experts)
    with torch.no_grad():
        block.mlp.experts[2].up_proj.weight.fill_(7.0)
    fuse_experts(block, experts)
    assert (block.mlp.experts.gate_up_proj == 7.0).nonzero()[:, :2].unique(dim=0).tolist() == [
        [2, row] for row in range(96, 192)
    ]
    other.to("meta")
    split_experts(other, experts)
    assert all(p.is_meta for p in other.mlp.experts.parameters())
    fuse_experts(other, experts)
    assert other.mlp.experts.gate_up_proj.is_meta
    assert other.mlp.experts.gate_up_proj.shape == (4, 192, 64)


def test_experts_refuse_what_they_cannot_split():
    config, model = tiny("mixtral")
    experts, block = map_for(config).experts, model.model.layers[0]
    with pytest.raises(RarefyError, match="not split"):
        fuse_experts(block, experts)
    block.mlp.experts.has_bias = True
    with pytest.raises(RarefyError, match="has_bias"):
        split_experts(block, experts)
    block.mlp.experts.has_bias = False
    split_experts(block, experts)
    assert isinstance(block.mlp.experts, SplitExperts)
    with pytest.raises(RarefyError, match="already"):
        split_experts(block, experts)


# Discovery


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE])
def test_discovery_finds_the_groups_of_the_written_map(family):
    config, model = tiny(family)
    written, found = map_for(config), discover(model, IDS)
    assert not found.proved
    assert not any(e.foldable for e in found.edges)
    for field in ("blocks", "embedding", "final_norm", "head", "family"):
        assert getattr(found, field) == getattr(written, field)
    assert [(n.path, n.kind) for n in found.linears] == [(n.path, n.kind) for n in written.linears]
    assert [[n.path for n in group] for group in found.shared_inputs] == [
        [n.path for n in group] for group in written.shared_inputs
    ]


def test_discovery_needs_only_the_first_block():
    _, model = tiny("llama")
    for block in model.model.layers[1:]:
        block.to("meta")
    assert len(discover(model, IDS).linears) == 7


def test_equal_values_in_different_tensors_are_no_shared_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.a, self.b, self.idle = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return self.late(self.a(x) + self.b(x.clone()))

    block = Block()
    nodes, edges = discover_block(block, lambda: block(torch.ones(2, 4)))
    assert [(n.path, n.reads) for n in nodes] == [("a", "in0"), ("b", "in1"), ("late", "in2")]
    assert [e.name for e in edges] == ["in0", "in1", "in2"]
    with pytest.raises(RarefyError, match="Block"):
        discover_block(block, lambda: None)


def test_block_list_is_the_outermost_one():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    model = nn.Module()
    model.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(20))
    model.layers = nn.ModuleList(Layer() for _ in range(3))
    assert longest_block_list(model) == "layers"
    with pytest.raises(RarefyError, match="Linear"):
        longest_block_list(nn.Linear(2, 2))


# Checkpoints of tiny models


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_names_are_those_that_transformers_writes(family, tmp_path):
    folder = save_tiny(family, tmp_path / family, dtype=torch.bfloat16)
    config, model = tiny(family)
    model_map = map_for(config)
    blocks = model.get_submodule(model_map.blocks)
    expected = set()
    for i, block in enumerate(blocks):
        if model_map.experts:
            split_experts(block, model_map.experts)
        expected |= {
            f"{model_map.blocks}.{i}.{model_map.checkpoint_name(name)}"
            for name, _ in block.named_parameters()
        }
    expected |= {
        model_map.checkpoint_name(name)
        for name, _ in model.named_parameters()
        if not name.startswith(model_map.blocks)
    }
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == expected
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_of_a_saved_folder_round_trips(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "One plus one is two; größer!"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == tiny_tokenizer()(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
