"""Surgery: the engine's statistics against plain transformers, and each paper's own claims."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from operating import (
    CPU,
    NINE,
    bypass,
    close_to,
    logits,
    opened,
    operate,
    record,
    rows,
    silence,
)
from tiny import VOCAB, save_tiny, tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, StableLmConfig

from rarefy.checkpoint.reader import Checkpoint, parameters
from rarefy.checkpoint.state import State, read_state
from rarefy.engine.importance import gradients, score_widths
from rarefy.engine.redundancy import choose_blocks
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.formats.integer import Int
from rarefy.maps.check import fold
from rarefy.maps.llama import LLAMA
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import parts_of
from rarefy.recipe import load_recipe, parse_recipe
from rarefy.surgery.base import Member, Outputs, Removal, Stack, Units
from rarefy.surgery.deeper_layers import DeeperLayers
from rarefy.surgery.llm_pruner import LLMPruner
from rarefy.surgery.magnitude import L2
from rarefy.surgery.minitron import Minitron
from rarefy.surgery.random import Random
from rarefy.surgery.shortened_llama import ShortenedLlama
from rarefy.surgery.shortgpt import ShortGPT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rarefy.surgery.base import DepthSurgery

TAYLOR = LLMPruner(heads=0.34, neurons=0.25, samples=4, length=16)


def planted(
    folder: Path, plant: Callable[[Any], None], family: str = "llama", **overrides: Any
) -> Path:
    """A tiny checkpoint whose weights were changed by ``plant(blocks)``."""
    path = save_tiny(family, folder, **{**NINE, **overrides})
    model = opened(path)
    with torch.no_grad():
        plant(model.model.layers)
    model.save_pretrained(path)
    return path


def scores_of(path: Path, method: Any, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    skeleton = Skeleton(Checkpoint(path), CPU)
    kinds = [kind for kind in ("heads", "neurons") if getattr(method, kind)]
    found = score_widths(skeleton, method, kinds, rows(4, 16) if ids is None else ids)
    return {str(kind): scores for kind, scores in found.items()}


def llama_parameters(config: Any, heads: int, groups: int, neurons: int, blocks: int) -> int:
    """The count of an untied Llama, by hand."""
    d, h = config.hidden_size, config.head_dim
    block = 2 * d * heads * h + 2 * d * groups * h + 3 * d * neurons + 2 * d
    return 2 * config.vocab_size * d + d + blocks * block


# The engine


@pytest.mark.parametrize(
    ("method", "heads", "groups", "neurons", "blocks"),
    [
        (LLMPruner(0.34, 0.25, samples=2, length=8), 6, 2, 72, 4),
        (L2(0, 0.5), 9, 3, 48, 4),
        (L2(0.67, 0), 3, 1, 96, 4),
        (ShortGPT(2), 9, 3, 96, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_bytes_equal_the_formula(
    method: Any,
    heads: int,
    groups: int,
    neurons: int,
    blocks: int,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    dense = save_tiny("llama", tmp_path / "dense", dtype, **NINE)
    out = operate(dense, method, tmp_path / "out")
    config = opened(out).config
    count = llama_parameters(config, heads, groups, neurons, blocks)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, groups)
    assert (config.intermediate_size, config.num_hidden_layers) == (neurons, blocks)
    assert config.head_dim == 8
    entries = Checkpoint(out).entries
    assert parameters(entries) == count == record(out)["parameters_after"]
    assert record(out)["parameters_before"] == llama_parameters(config, 9, 3, 96, 4)
    assert sum(entry.size for entry in entries.values()) == count * dtype.itemsize
    file = (out / "model.safetensors").stat().st_size
    assert count * dtype.itemsize < file < count * dtype.itemsize + 10_000
    assert {entry.dtype for entry in entries.values()} == {
        "F32" if dtype == torch.float32 else "BF16"
    }


def test_what_stays_is_copied_to_the_bit(tmp_path: Path) -> None:
    dense = save_tiny("qwen2", tmp_path / "dense", torch.bfloat16, **NINE)
    out = operate(dense, L2(0.34, 0.25), tmp_path / "out")
    removed = record(out)["removed"]
    before, after = Checkpoint(dense), Checkpoint(out)
    for block in range(4):
        [group] = removed["heads"][block]
        neurons = [j for j in range(96) if j not in removed["neurons"][block]]
        heads = [i for i in range(9) if i // 3 != group]
        query = [i * 8 + c for i in heads for c in range(8)]
        value = [g * 8 + c for g in range(3) if g != group for c in range(8)]
        at = f"model.layers.{block}."
        for name, rows_left in (
            ("self_attn.q_proj.weight", query),
            ("self_attn.q_proj.bias", query),
            ("self_attn.k_proj.weight", value),
            ("self_attn.v_proj.bias", value),
            ("mlp.gate_proj.weight", neurons),
            ("mlp.up_proj.weight", neurons),
        ):
            assert torch.equal(after.read(at + name), before.read(at + name)[rows_left])
        for name, columns in (
            ("self_attn.o_proj.weight", query),
            ("mlp.down_proj.weight", neurons),
        ):
            assert torch.equal(after.read(at + name), before.read(at + name)[:, columns])
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(after.read(name), before.read(name))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    dense = save_tiny("qwen2", tmp_path / "dense", **NINE)
    out = operate(dense, L2(0.34, 0.25), tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint(out).entries
    model = opened(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("method", [TAYLOR, ShortGPT(2)])
def test_the_result_is_saved_and_opened_again_unchanged(method: Any, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    small = opened(operate(dense, method, tmp_path / "out"))
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(small))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert read_state(tmp_path / "out") == State(Checkpoint(dense).fingerprint())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("method", [ShortGPT(2), ShortenedLlama(1, samples=2), TAYLOR])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_with_a_cache_equals_generation_without(
    method: Any, family: str, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / "dense", num_hidden_layers=4)
    if method is TAYLOR:
        method = LLMPruner(0.5, 0.25, samples=2, length=16)
    small = opened(operate(dense, method, tmp_path / "out", rows(6, 128)))
    with_cache, without = (
        small.generate(
            rows(2, 20), max_new_tokens=30, do_sample=False, use_cache=cache, eos_token_id=None
        )
        for cache in (True, False)
    )
    assert with_cache.shape == (2, 50)
    assert torch.equal(with_cache, without)


def test_layer_types_follow_their_blocks(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    dense = save_tiny("gemma2", tmp_path / "dense", num_hidden_layers=4, layer_types=types)
    out = operate(dense, DeeperLayers(2, protect=0), tmp_path / "out")
    removed = record(out)["removed"]
    left = [kind for i, kind in enumerate(types) if i not in removed]
    assert opened(out).config.layer_types == left
    assert close_to(logits(opened(out)), logits(bypass(dense, removed)))


def test_layer_types_that_the_config_leaves_to_transformers_are_written_down(
    tmp_path: Path,
) -> None:
    # By default every second block is local: once one block is gone, the numbers would shift.
    dense = save_tiny("gemma2", tmp_path / "dense", num_hidden_layers=4)
    file = dense / "config.json"
    config = json.loads(file.read_text())
    types = config.pop("layer_types")
    file.write_text(json.dumps(config))
    out = operate(dense, ShortGPT(1), tmp_path / "out")
    [gone] = record(out)["removed"]
    assert opened(out).config.layer_types == types[:gone] + types[gone + 1 :]
    assert close_to(logits(opened(out)), logits(bypass(dense, [gone])))


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("method", [TAYLOR, ShortGPT(1)])
def test_an_interrupted_surgery_goes_on_without_scoring_again(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    straight = operate(dense, method, tmp_path / "straight")

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        operate(dense, method, tmp_path / "out", step=kill)
    assert not (tmp_path / "out").exists()
    for name in ("score", "choose"):
        monkeypatch.delattr(type(method), name, raising=False)
    resumed = operate(dense, method, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "manifest.json", "state.json"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_surgeries_compose(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    narrow = operate(dense, L2(0.34, 0.25), tmp_path / "narrow")
    short = operate(narrow, ShortGPT(1), tmp_path / "short")
    config = opened(short).config
    assert (config.num_attention_heads, config.intermediate_size) == (6, 72)
    assert config.num_hidden_layers == 3
    assert read_state(short).base == Checkpoint(dense).fingerprint()
    history = json.loads((short / "manifest.json").read_text())["history"]
    assert [entry["name"] for entry in history] == ["l2", "shortgpt"]


# Refusals


REFUSED: list[Any] = [
    ("mixtral", {}, L2(0, 0.5), "mixture of experts"),
    ("gpt2", {}, L2(0.5, 0), "leave heads at 0"),
    ("opt", {}, L2(0.5, 0.5), "leave heads at 0"),
    ("gpt_neox", {}, L2(0.5, 0), "leave heads at 0"),
    (
        "llama",
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8},
        L2(0.4, 0),
        "transformers refuses a llama model of .* 5 key/value groups",
    ),
    ("llama", {}, L2(0.4, 0), "heads: a share of 0.4 of 2 is less than one; ask for at least 0.5"),
    ("llama", {}, ShortGPT(2), "no more than 1 may go"),
    ("llama", {}, DeeperLayers(3, protect=0), "would remove every block"),
    ("llama", {}, LLMPruner(0.5, 0.5, samples=99), "reads 99 rows of 64 tokens"),
]


@pytest.mark.parametrize(("family", "overrides", "method", "sentence"), REFUSED)
def test_refusals(
    family: str, overrides: dict[str, Any], method: Any, sentence: str, tmp_path: Path
) -> None:
    dense = save_tiny(family, tmp_path / "dense", **overrides)
    with pytest.raises(RarefyError, match=sentence):
        operate(dense, method, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_without_a_map_is_refused(tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(RarefyError, match="'stablelm' has no proved map"):
        operate(tmp_path / "dense", L2(0, 0.5), tmp_path / "out")


def test_a_compressed_model_is_refused(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    State("base", {"model.layers.0.mlp.up_proj": Int(4)}).write(dense)
    with pytest.raises(RarefyError, match=r"stored as .* already, and l2 cuts dense weights"):
        operate(dense, L2(0.5, 0.5), tmp_path / "out")


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({"surgery": "l2", "heads": 1.0}, "heads must be a share"),
        ({"surgery": "l2", "heads": 0, "neurons": 0}, "nothing would be removed"),
        ({"surgery": "l2", "shares": 0.5}, "'shares' is not an option"),
        ({"surgery": "llm-pruner", "criterion": "third"}, "'third' is none of first, second"),
        ({"surgery": "llm-pruner", "samples": 0}, "samples must be at least 1"),
        ({"surgery": "shortgpt", "blocks": 0}, "blocks must be at least 1"),
        ({"surgery": "shortened-llama", "protect": -1}, "protect must not be negative"),
    ],
)
def test_options_are_checked_before_anything_runs(stage: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RarefyError, match=sentence):
        parse_recipe({"stages": [stage]}, "wrong")


@pytest.mark.parametrize("name", ["llm-pruner-20", "minitron-25", "shortgpt-6"])
def test_presets_give_the_default_models_shape_legal_widths(name: str, tmp_path: Path) -> None:
    # The shape of SmolLM2-135M at an eighth of its width.
    [stage] = load_recipe(name).stages
    shape = {**NINE, "intermediate_size": 192, "num_hidden_layers": 30}
    dense = save_tiny("llama", tmp_path / "dense", **shape)
    out = operate(dense, stage.method, tmp_path / "out", rows(10, 64))
    config = opened(out).config
    if name == "shortgpt-6":
        assert config.num_hidden_layers == 24
    else:
        assert (config.num_attention_heads, config.num_key_value_heads) == (6, 2)
        assert config.intermediate_size == 144


# LLM-Pruner


def test_llm_pruner_groups_belong_together() -> None:
    config, _ = tiny("llama", **NINE)
    dims = dims_of(config)
    found = {
        (part.node.path, part.axis): part.index[1].flatten().tolist()
        for part in parts_of(LLAMA, dims, "heads")
    }
    assert found == {
        ("self_attn.q_proj", 0): list(range(24, 48)),
        ("self_attn.k_proj", 0): list(range(8, 16)),
        ("self_attn.v_proj", 0): list(range(8, 16)),
        ("self_attn.o_proj", 1): list(range(24, 48)),
    }
    neuron = {part.node.path: part.index[5].tolist() for part in parts_of(LLAMA, dims, "neurons")}
    assert neuron == {f"mlp.{name}_proj": [[5]] for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_llm_pruner_gradients_are_those_of_the_models_own_loss(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    path = "attn.c_attn" if family == "gpt2" else "self_attn.v_proj"
    ids = rows(3, 12)
    skeleton = Skeleton(Checkpoint(dense), CPU)
    found = gradients(skeleton, [path], ids)
    model = opened(dense)
    for name, (first, second) in found.items():
        each = []
        for row in ids:
            model.zero_grad()
            model(input_ids=row[None], labels=row[None]).loss.backward()
            each.append(model.get_submodule(name).weight.grad.clone())
        assert close_to(first, torch.stack(each).mean(0))
        assert close_to(second, torch.stack(each).square().mean(0))
        assert not close_to(second, first.square(), 0.1)
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())


def test_llm_pruner_formulas() -> None:
    g = torch.Generator().manual_seed(0)

    def member(copies: int, k: int) -> Member:
        w, first = (torch.randn(2, copies, 3, k, generator=g) for _ in range(2))
        return Member("node", "edge", w, first, torch.rand(2, copies, 3, k, generator=g))

    members = (member(2, 5), member(1, 4))
    units = Units("heads", 0, members)

    def by_hand(criterion: str, unit: int) -> list[list[float]]:
        """Score of each member in each channel of a unit."""
        out = []
        for m in members:
            assert m.first is not None
            assert m.second is not None
            channels = [0.0] * 3
            for copy in range(m.weight.shape[1]):
                for c in range(3):
                    w, first, second = (
                        t[unit, copy, c].tolist() for t in (m.weight, m.first, m.second)
                    )
                    entries = list(zip(w, first, second, strict=True))
                    channels[c] += {
                        "first": sum(abs(a * b) for a, b, _ in entries),
                        "second": sum(a * a * f for a, _, f in entries),
                        "mix": sum(abs(a * b - a * a * f / 2) for a, b, f in entries),
                        "vectorize": abs(sum(a * b for a, b, _ in entries)),
                    }[criterion]
            out.append(channels)
        return out

    reduce: dict[str, Callable[[float, float], float]] = {
        "sum": lambda a, b: a + b,
        "mean": lambda a, b: (a + b) / 2,
        "max": max,
        "prod": lambda a, b: a * b,
        "first": lambda a, b: a,
    }
    for criterion in ("first", "second", "mix", "vectorize"):
        for reduction, join in reduce.items():
            method = LLMPruner(criterion=criterion, reduction=reduction)
            expected = [
                sum(join(a, b) for a, b in zip(*by_hand(criterion, unit), strict=True))
                for unit in range(2)
            ]
            assert method.score(units).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("criterion", ["first", "second", "mix", "vectorize"])
def test_llm_pruner_a_useless_group_goes_first(criterion: str, tmp_path: Path) -> None:
    useless = [2, 0, 1, 2]

    def plant(blocks: Any) -> None:
        for block, group in zip(blocks, useless, strict=True):
            block.self_attn.o_proj.weight[:, group * 24 : (group + 1) * 24] = 0
            block.mlp.down_proj.weight[:, 10 + group] = 0

    dense = planted(tmp_path / "dense", plant)
    method = LLMPruner(0.34, 0.011, criterion, samples=4, length=16)
    out = operate(dense, method, tmp_path / "out")
    removed = record(out)["removed"]
    assert removed["heads"] == [[group] for group in useless]
    assert removed["neurons"] == [[10 + group] for group in useless]
    assert close_to(logits(opened(out)), logits(opened(dense)))
    assert record(out)["lost"] == {"heads": [0.0] * 4, "neurons": [0.0] * 4}


def test_llm_pruner_query_head_1_is_credited_to_key_value_head_0(tmp_path: Path) -> None:
    # Three query heads share a key/value head: head 1 belongs to 1 // 3 = 0, not to 1 mod 3.
    def plant(blocks: Any) -> None:
        for block in blocks:
            kept = block.self_attn.o_proj.weight[:, 8:16].clone()
            block.self_attn.o_proj.weight.zero_()
            block.self_attn.o_proj.weight[:, 8:16] = kept

    dense = planted(tmp_path / "dense", plant)
    heads = scores_of(dense, LLMPruner(0.34, 0))["heads"]
    assert bool((heads[:, 0] > 0).all())
    assert torch.equal(heads[:, 1:], torch.zeros(4, 2))


def chain(count: int, length: int, seed: int) -> torch.Tensor:
    """Rows of a Markov chain on 64 tokens, each followed by one of four with unequal odds."""
    g = torch.Generator().manual_seed(0)
    following = torch.randint(0, 64, (64, 64, 4), generator=g)
    g = torch.Generator().manual_seed(seed)
    odds = torch.tensor([0.7, 0.15, 0.1, 0.05])
    ids = torch.randint(0, 64, (count, length), generator=g)
    choice = torch.multinomial(odds, count * length, replacement=True, generator=g)
    choice = choice.view(count, length)
    for t in range(2, length):
        ids[:, t] = following[ids[:, t - 1], ids[:, t - 2] % 2, choice[:, t]]
    return ids


def loss_on(model: Any, ids: torch.Tensor) -> float:
    out = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(cross_entropy(out, ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learnt a Markov chain."""
    path = tmp_path_factory.mktemp("trained") / "dense"
    save_tiny("llama", path, **{**NINE, "num_hidden_layers": 3, "intermediate_size": 192})
    model = opened(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        ids = chain(16, 32, 100 + step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path


def loss_added(
    source: Path, method: Any, out: Path, text: torch.Tensor, held_out: torch.Tensor
) -> float:
    small = opened(operate(source, method, out, text))
    return loss_on(small, held_out) - loss_on(opened(source), held_out)


def test_llm_pruner_taylor_beats_random(trained: Path, tmp_path: Path) -> None:
    text, held_out = chain(20, 32, 1), chain(64, 32, 2)
    assert loss_on(opened(trained), held_out) < 0.5 * math.log(64)
    methods: dict[str, Any] = {
        "taylor": LLMPruner(0.34, 0.25, length=32),
        "minitron": Minitron(0.34, 0.25),
        **{f"lot {seed}": Random(0.34, 0.25, seed) for seed in range(5)},
    }
    added = {
        name: loss_added(trained, method, tmp_path / name, text, held_out)
        for name, method in methods.items()
    }
    lots = [loss for name, loss in added.items() if name.startswith("lot")]
    assert 0 < added["taylor"] < min(lots)
    assert added["minitron"] < sum(lots) / len(lots)


def test_llm_pruner_taylor_beats_magnitude_where_scale_means_nothing(
    trained: Path, tmp_path: Path
) -> None:
    # Scaling a neuron's up row and unscaling its down column changes norms and nothing else.
    model = opened(trained)
    dims = dims_of(model.config)
    g = torch.Generator().manual_seed(5)
    for block in model.model.layers:
        scale = torch.exp(3 * torch.randn(dims.intermediate, generator=g))
        fold(block, LLAMA, LLAMA.edge("mlp_inner"), scale, dims)
    model.save_pretrained(tmp_path / "folded")
    text, held_out = chain(20, 32, 1), chain(64, 32, 2)
    taylor, magnitude = LLMPruner(0, 0.25, length=32), L2(0, 0.25)
    before = scores_of(trained, taylor, text[:10])["neurons"]
    after = scores_of(tmp_path / "folded", taylor, text[:10])["neurons"]
    assert torch.allclose(before, after, rtol=1e-3)
    added = [
        loss_added(tmp_path / "folded", method, tmp_path / f"{i}", text, held_out)
        for i, method in enumerate((taylor, magnitude))
    ]
    assert added[0] < 0.8 * added[1]


# Magnitude and random


def test_l2_is_the_norm_of_everything_a_unit_owns(tmp_path: Path) -> None:
    dense = save_tiny("phi3", tmp_path / "dense", **NINE)
    found = scores_of(dense, L2())
    read = Checkpoint(dense).read
    for block in range(4):
        at = f"model.layers.{block}."
        qkv, o = read(f"{at}self_attn.qkv_proj.weight"), read(f"{at}self_attn.o_proj.weight")
        query, key, value = qkv[:72], qkv[72:96], qkv[96:]
        for g in range(3):
            own, three = slice(g * 8, g * 8 + 8), slice(g * 24, g * 24 + 24)
            whole = [query[three], key[own], value[own], o[:, three]]
            expected = torch.cat([w.flatten() for w in whole]).norm()
            assert float(found["heads"][block, g]) == pytest.approx(float(expected), rel=1e-5)
        fused, down = read(f"{at}mlp.gate_up_proj.weight"), read(f"{at}mlp.down_proj.weight")
        neurons = torch.stack([torch.cat([fused[j], fused[96 + j], down[:, j]]) for j in range(96)])
        assert torch.allclose(found["neurons"][block], neurons.norm(dim=1), rtol=1e-5)


def test_random_draws_anew_for_every_block_and_kind_from_one_seed(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", **NINE)
    first, again, other = (scores_of(dense, Random(seed=s)) for s in (0, 0, 1))
    assert torch.equal(first["neurons"], again["neurons"])
    assert not torch.equal(first["neurons"], other["neurons"])
    assert len({tuple(row) for row in first["neurons"].tolist()}) == 4
    assert not torch.equal(first["neurons"][:, :3], first["heads"])


# Minitron


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_minitron_importance_is_measured_before_the_readers(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense", num_hidden_layers=2)
    ids = rows(5, 20)
    skeleton = Skeleton(Checkpoint(dense), CPU)
    found = score_widths(skeleton, Minitron(), ["heads", "neurons"], ids)
    model = opened(dense)
    blocks, attention, mlp = (
        ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h")
        if family == "gpt_neox"
        else ("model.layers", "self_attn.o_proj", "mlp.down_proj")
    )
    seen: list[torch.Tensor] = []
    for block in model.get_submodule(blocks):
        for path in (attention, mlp):
            block.get_submodule(path).register_forward_pre_hook(
                lambda _, args: seen.append(args[0].flatten(0, 1))
            )
    logits(model, ids)
    for block in range(2):
        values, inner = seen[2 * block : 2 * block + 2]
        groups = values.view(len(values), found["heads"].shape[1], -1)
        assert torch.allclose(found["heads"][block], groups.square().mean((0, 2)).sqrt())
        assert torch.allclose(found["neurons"][block], inner.abs().mean(0))


def test_minitron_silent_units_go_first(tmp_path: Path) -> None:
    def plant(blocks: Any) -> None:
        for i, block in enumerate(blocks):
            block.self_attn.v_proj.weight[(i % 3) * 8 : (i % 3 + 1) * 8] = 0
            block.mlp.up_proj.weight[7 * i] = 0

    dense = planted(tmp_path / "dense", plant)
    out = operate(dense, Minitron(0.34, 0.011), tmp_path / "out")
    assert record(out)["removed"] == {
        "heads": [[0], [1], [2], [0]],
        "neurons": [[0], [7], [14], [21]],
    }
    assert close_to(logits(opened(out)), logits(opened(dense)))


def test_minitron_judges_heads_by_norm_and_neurons_by_size() -> None:
    outputs = Outputs(norm=torch.tensor([1.0, 2.0]), size=torch.tensor([4.0, 3.0]))
    member = Member("node", "edge", torch.zeros(2, 1, 1, 1))
    heads, neurons = (Units(kind, 0, (member,), outputs) for kind in ("heads", "neurons"))
    assert Minitron().score(heads).tolist() == [1.0, 2.0]
    assert Minitron().score(neurons).tolist() == [4.0, 3.0]


# Depth


def states(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states before each block and after the last, from the model itself."""
    model = opened(folder)
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layers[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    logits(model, ids)
    return seen


def removal(folder: Path, method: DepthSurgery, ids: torch.Tensor) -> Removal:
    return choose_blocks(Skeleton(Checkpoint(folder), CPU), method, ids)


def identity(*indices: int) -> Callable[[Any], None]:
    """Blocks that add nothing to the residual stream."""

    def plant(blocks: Any) -> None:
        for i in indices:
            blocks[i].self_attn.o_proj.weight.zero_()
            blocks[i].mlp.down_proj.weight.zero_()

    return plant


def test_shortgpt_influence_is_one_minus_the_mean_cosine(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=5)
    ids = rows(6, 20)
    path = states(dense, ids)
    expected = [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(path)]
    found = removal(dense, ShortGPT(2, protect=0), ids)
    assert found.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert list(found.blocks) == sorted(range(5), key=expected.__getitem__)[:2]


def test_shortgpt_order_is_that_of_influence_not_of_position(tmp_path: Path) -> None:
    strength = [1.0, 0.5, 0.05, 1.0, 0.2, 1.0]

    def plant(blocks: Any) -> None:
        for factor, block in zip(strength, blocks, strict=True):
            block.self_attn.o_proj.weight.mul_(factor)
            block.mlp.down_proj.weight.mul_(factor)

    dense = planted(tmp_path / "dense", plant, num_hidden_layers=6)
    assert removal(dense, ShortGPT(3), rows()).blocks == (2, 4, 1)


@pytest.mark.parametrize("method", [ShortGPT(1), DeeperLayers(1)])
def test_an_identity_block_goes_first(method: Any, tmp_path: Path) -> None:
    dense = planted(tmp_path / "dense", identity(2), num_hidden_layers=5)
    ids = rows(10, 24)
    found = removal(dense, method, ids)
    assert found.blocks == (2,)
    # The cosine of equal vectors is 1 but for rounding, which arccos turns into its square root.
    assert abs(float(found.scores[2])) < (1e-6 if isinstance(method, ShortGPT) else 1e-3)
    assert float(found.scores.sort().values[1]) > 1e-2
    out = operate(dense, method, tmp_path / "out", ids)
    assert torch.equal(logits(opened(out)), logits(opened(dense)))


def test_first_and_last_blocks_are_protected_by_default(tmp_path: Path) -> None:
    dense = planted(tmp_path / "dense", identity(0, 4), num_hidden_layers=5)
    for method in (ShortGPT, DeeperLayers):
        assert removal(dense, method(1, protect=0), rows()).blocks[0] in (0, 4)
        assert removal(dense, method(1), rows()).blocks[0] in (1, 2, 3)
    stack = Stack(5, losses=lambda left: torch.tensor([0.0, 3, 2, 1, 0])[list(left)])
    assert ShortenedLlama(3, protect=0).choose(stack).blocks == (0, 4, 3)
    assert ShortenedLlama(3).choose(stack).blocks == (3, 2, 1)


def test_deeper_layers_distance_is_the_angle_of_the_last_token(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=6)
    ids = rows(7, 20)
    last = [state[:, -1].double() for state in states(dense, ids)]
    found = removal(dense, DeeperLayers(2), ids)
    expected = [
        float((torch.cosine_similarity(last[i], last[i + 2], dim=-1).arccos() / math.pi).mean())
        for i in range(5)
    ]
    assert found.scores.tolist() == pytest.approx(expected, abs=1e-5)
    best = min((1, 2, 3), key=expected.__getitem__)
    assert found.blocks == (best, best + 1)


def test_deeper_layers_takes_a_run_and_reaches_up_to_the_protected_end() -> None:
    angle = torch.tensor([0.0, 1.0, 1.5, 2.0, 2.1, 2.15, 3.0])
    last = torch.stack([angle.cos(), angle.sin()], -1)[None]
    found = DeeperLayers(2).choose(Stack(6, last=last))
    assert found.blocks == (3, 4)
    assert found.scores.tolist() == pytest.approx(
        [1.5 / math.pi, 1 / math.pi, 0.6 / math.pi, 0.15 / math.pi, 0.9 / math.pi], abs=1e-6
    )
    assert DeeperLayers(4).choose(Stack(6, last=last)).blocks == (1, 2, 3, 4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_shortened_llama_is_the_greedy_search_by_perplexity(family: str, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense", num_hidden_layers=5)
    # More tokens than one pass takes, the last pass being smaller.
    ids = rows(9, 250)

    def perplexity(removed: list[int]) -> float:
        return math.exp(loss_on(bypass(dense, removed), ids))

    found = removal(dense, ShortenedLlama(2, protect=0, samples=9, length=250), ids)
    first = min(range(5), key=lambda i: perplexity([i]))
    second = min((i for i in range(5) if i != first), key=lambda i: perplexity([first, i]))
    assert found.blocks == (first, second)
    expected = [perplexity([first]), perplexity([first, second])]
    assert found.scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_shortened_llama_an_identity_block_goes_first(trained: Path, tmp_path: Path) -> None:
    model = opened(trained)
    with torch.no_grad():
        identity(1)(model.model.layers)
    model.save_pretrained(tmp_path / "dense")
    found = removal(tmp_path / "dense", ShortenedLlama(1, protect=0, length=32), chain(10, 32, 3))
    assert found.blocks == (1,)
    dense = loss_on(model, chain(10, 32, 3))
    assert found.scores.tolist() == pytest.approx([math.exp(dense)], rel=1e-5)


def test_shortened_llama_scores_anew_after_each_removal() -> None:
    """Blocks 1 and 2 do the same work: each is dispensable, but not both."""

    def losses(left: Any) -> torch.Tensor:
        def without(i: int) -> float:
            gone = set(range(5)) - set(left) | {i}
            return {1: 0.1, 2: 0.2, 3: 0.5}.get(i, 9.0) + (5.0 if {1, 2} <= gone else 0.0)

        return torch.tensor([without(i) for i in left])

    found = ShortenedLlama(2).choose(Stack(5, losses=losses))
    assert found.blocks == (1, 3)
    assert found.scores.tolist() == pytest.approx([math.exp(0.1), math.exp(0.5)])


def test_width_and_mask_agree_on_a_trained_model(trained: Path, tmp_path: Path) -> None:
    out = operate(trained, LLMPruner(0.34, 0.25, length=32), tmp_path / "out", chain(20, 32, 1))
    masked = silence(trained, record(out)["removed"])
    ids = chain(8, 32, 2)
    assert close_to(logits(opened(out), ids), logits(masked, ids))
