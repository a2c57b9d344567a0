"""What is written opens elsewhere and computes the same, for every family.

Every tiny model is compressed here. One fresh process then opens all results: first those in
compressed-tensors' container, with stock transformers and rarefy not imported; then, after
``import rarefy``, the others. The logits are compared to the dense model with each compressed
matrix replaced by what its stored tensors decode to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from layers import as_opened
from safetensors.torch import load_file
from tiny import FAMILIES, save_tiny
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.state import read_state
from rarefy.engine.skeleton import Skeleton

IDS = (torch.arange(2 * 24) * 37 % 251).view(2, 24)
TOLERANCE = 1e-3
MOE = ("mixtral", "qwen3_moe")
# Conv1D and experts are not the weight of a plain linear, so stock loaders cannot hold them.
STOCK = tuple(f for f in FAMILIES if f not in (*MOE, "gpt2"))
FACTORS = ("first", "second")
_SRC = str(Path(rarefy.__file__).parents[1])

INT4 = {"format": "int", "bits": 4, "group": 32}
INT3 = {"format": "int", "bits": 3, "group": 40}
ROW8 = {"format": "int", "bits": 8}
EMBEDDING, HEAD = {"model.embed_tokens": ROW8}, {"lm_head": ROW8}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("gptq", {"*": INT4}),
    "int3": ("gptq", {"*": INT3}),
    "sym8": ("nearest", {"*": {**ROW8, "symmetric": True}}),
    "mixed": ("nearest", {"*.0.*": "keep", "*o_proj": ROW8, "*c_proj": ROW8, "*": INT4}),
    "head": ("nearest", HEAD),
    "embedding": ("nearest", EMBEDDING),
    "embedding and head": ("nearest", EMBEDDING | HEAD),
    "everything": ("gptq", EMBEDDING | HEAD | {"*": INT3}),
}
HALF = {"format": "sparse", "sparsity": 0.5, "scope": "matrix"}
PAIRS = {"format": "sparse", "kept": 2, "of": 4}
THIN = {"format": "low-rank", "ratio": 0.8}
STAGES: dict[str, list[dict[str, Any]]] = {
    which: [{"solver": solver, "schemes": table}] for which, (solver, table) in RECIPES.items()
} | {
    "sparse": [{"solver": "sparsegpt", "schemes": {"*": HALF}}],
    "2:4 int4": [
        {"solver": "wanda", "schemes": {"*": PAIRS}},
        {"solver": "gptq", "schemes": {"*": INT4}},
    ],
    "low-rank": [{"solver": "svd-llm", "schemes": {"*": THIN}}],
    "low-rank int4": [
        {"solver": "svd-llm", "schemes": {"*": THIN}},
        {"solver": "gptq", "schemes": {"*": {**INT4, "group": 8}}},
    ],
    "w8a8": [{"solver": "nearest", "schemes": {"*": {**ROW8, "input": {"format": "int"}}}}],
    "w8a4 static": [
        {
            "solver": "nearest",
            "schemes": {
                "*": {
                    **ROW8,
                    "input": {"format": "int", "bits": 4, "per": "tensor", "dynamic": False},
                }
            },
        }
    ],
}
OTHERS = [
    *(
        (family, which)
        for family in ("llama", "gpt2", "gpt_neox", "qwen3_moe")
        for which in ("sparse", "2:4 int4", "low-rank")
    ),
    *((family, "low-rank int4") for family in ("llama", "gpt2", "qwen2")),
    *((family, which) for family in ("llama", "phi3") for which in ("w8a8", "w8a4 static")),
]
TIED = [
    (family, which)
    for family in ("qwen2", "qwen3")
    for which in ("head", "embedding", "embedding and head", "everything")
]
UNTIED = [("llama", "head"), ("llama", "everything")]
SCALED = [
    (family, which) for family in ("gemma2", "gemma3_text") for which in ("embedding", "everything")
]
CASES = [
    *((family, which) for which in ("int4", "int3") for family in FAMILIES),
    *((family, "mixed") for family in ("llama", "gpt2", "qwen3_moe")),
    *((family, "sym8") for family in ("llama", "gpt_neox")),
    *TIED,
    *UNTIED,
    *SCALED,
    *OTHERS,
]

READER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
jobs = json.load(open(sys.argv[1]))
ids = torch.tensor(jobs["ids"])
found, keys = {}, {}

def read(name):
    model, info = AutoModelForCausalLM.from_pretrained(
        jobs["folders"][name], dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    keys[name] = {k: sorted(map(str, v)) for k, v in info.items() if k.endswith("_keys")}
    with torch.no_grad():
        found[name] = model(ids).logits.contiguous()
        for cached in (True, False):
            tokens = model.generate(
                ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=5,
                min_new_tokens=5, do_sample=False, use_cache=cached,
            )
            found[f"{name} cache={cached}"] = tokens.contiguous()
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    keys[name]["modules"] = [type(m).__name__ for m in heads]

for name in jobs["stock"]:
    read(name)
assert not [m for m in sys.modules if m.split(".")[0] == "rarefy"], "rarefy was imported"
import rarefy
for name in jobs["ours"]:
    read(name)
save_file(found, sys.argv[2])
json.dump(keys, open(sys.argv[2] + ".json", "w"))
"""


@dataclass
class Opened:
    """Every compressed folder, and what the fresh process read from it."""

    dense: dict[str, Path]
    folders: dict[str, Path]
    found: dict[str, torch.Tensor]
    keys: dict[str, Any]


def case_name(family: str, which: str) -> str:
    return f"{family} {which}"


def method(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return str(config["quantization_config"]["quant_method"])


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    root = tmp_path_factory.mktemp("reload")
    g = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (2000,), generator=g).tolist()
    text = root / "text.txt"
    text.write_text("".join(" " if i % 6 == 5 else chr(c) for i, c in enumerate(letters)))
    calibration = rarefy.Calibration(str(text), sequences=4, length=32)
    recipes = {}
    for which, stages in STAGES.items():
        recipes[which] = root / f"{which}.yaml"
        recipes[which].write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    dense = {family: save_tiny(family, root / family / "dense") for family in FAMILIES}
    folders = {
        case_name(family, which): rarefy.compress(
            dense[family], recipes[which], root / family / which, calibration=calibration
        ).path
        for family, which in CASES
    }
    return Opened(dense, folders, *open_all(folders, root))


def open_all(
    folders: dict[str, Path], root: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits and tokens that a fresh process gets, and the keys that it missed."""
    by_method = {name: method(folder) for name, folder in folders.items()}
    jobs = {
        "ids": IDS.tolist(),
        "folders": {name: str(folder) for name, folder in folders.items()},
        "stock": [name for name, how in by_method.items() if how == "compressed-tensors"],
        "ours": [name for name, how in by_method.items() if how == "rarefy"],
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-c", READER, root / "jobs.json", root / "found.safetensors"],
        # Integer kernels leave out a rounding to 16 bits; their own tests say by how much.
        env=os.environ | {"PYTHONPATH": _SRC, "RAREFY_KERNELS": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    keys = json.loads((root / "found.safetensors.json").read_text())
    return load_file(root / "found.safetensors"), keys


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Module-side name -> [out, in] matrix, of every compressed matrix of a folder, as opened."""
    skeleton = Skeleton(Checkpoint(folder), torch.device("cpu"), factored=False)
    names = [n for n in read_state(folder).formats if n.rpartition(".")[2] not in FACTORS]
    found = {}
    for name in names:
        packed = skeleton.packed(name)
        found[name] = as_opened(folder, packed, read_state(folder).formats[name].decode(packed))
    return found


def rounded_inputs(model: Any, folder: Path) -> None:
    """Round the inputs of a dense model's linears by hand, as the folder's state says."""
    checkpoint = Checkpoint(folder)
    for name, rounding in read_state(folder).inputs.items():
        scale = checkpoint.read(f"{name}.input_scale") if rounding.static else None
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, rounding=rounding, scale=scale: (rounding.round(args[0], scale),)
        )


def put(model: Any, name: str, matrix: torch.Tensor) -> None:
    """Replace one matrix of a stock dense model, which keeps experts fused."""
    prefix, fused, rest = name.partition(".experts.")
    if fused:
        number, leaf = rest.split(".")
        experts = model.get_submodule(f"{prefix}.experts")
        half = experts.gate_up_proj.shape[1] // 2
        {
            "gate_proj": experts.gate_up_proj.data[int(number), :half],
            "up_proj": experts.gate_up_proj.data[int(number), half:],
            "down_proj": experts.down_proj.data[int(number)],
        }[leaf].copy_(matrix)
        return
    module = model.get_submodule(name)
    value = matrix.T if isinstance(module, Conv1D) else matrix
    assert module.weight.shape == value.shape
    module.weight = torch.nn.Parameter(value.contiguous())


def expected(dense: Path, folder: Path) -> torch.Tensor:
    """Logits of the dense model with the stored matrices in place."""
    matrices = decoded(folder)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    embedding = model.get_input_embeddings()
    packed_embedding = any(model.get_submodule(n) is embedding for n in matrices if "emb" in n)
    for name, matrix in matrices.items():
        put(model, name, matrix)
    rounded_inputs(model, folder)
    if model.config.tie_word_embeddings and packed_embedding:
        model.lm_head.weight = model.get_input_embeddings().weight
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("family", "which"), CASES, ids=[case_name(*c) for c in CASES])
def test_a_fresh_process_computes_the_same(family: str, which: str, opened: Opened) -> None:
    name = case_name(family, which)
    logits = opened.found[name]
    should = expected(opened.dense[family], opened.folders[name])
    assert (logits - should).abs().max() <= TOLERANCE
    # The tolerance is far below what the compression itself changed.
    model = AutoModelForCausalLM.from_pretrained(opened.dense[family], dtype=torch.float32).eval()
    with torch.no_grad():
        assert (logits - model(IDS).logits).abs().max() > 3 * TOLERANCE


@pytest.mark.parametrize(("family", "which"), CASES, ids=[case_name(*c) for c in CASES])
def test_every_key_is_used_and_none_is_missing(family: str, which: str, opened: Opened) -> None:
    keys = opened.keys[case_name(family, which)]
    assert {k: v for k, v in keys.items() if k.endswith("_keys") and v} == {}


@pytest.mark.parametrize(("family", "which"), CASES, ids=[case_name(*c) for c in CASES])
def test_generation_does_not_depend_on_the_cache(family: str, which: str, opened: Opened) -> None:
    name = case_name(family, which)
    cached, plain = (opened.found[f"{name} cache={c}"] for c in (True, False))
    assert cached.shape == (1, IDS.shape[1] + 5)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_containers_where_they_can_hold_it(family: str, opened: Opened) -> None:
    stock = method(opened.folders[case_name(family, "int4")])
    assert stock == ("compressed-tensors" if family in STOCK else "rarefy")
    assert method(opened.folders[case_name(family, "int3")]) == "rarefy"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_is_stored_packed(family: str, opened: Opened) -> None:
    folder = opened.folders[case_name(family, "int3")]
    skeleton = Skeleton(Checkpoint(folder), torch.device("cpu"))
    names = {
        skeleton.node_name(i, node)
        for i in range(len(skeleton.blocks))
        for node in skeleton.map.linears
    }
    assert read_state(folder).formats.keys() == names
    stored = Checkpoint(folder).entries
    assert not [n for n in names if f"{skeleton.stored_name(n)}.weight" in stored]
    assert sum(key.endswith(".weight_packed") for key in stored) == len(names)


@pytest.mark.parametrize("family", MOE)
def test_tokens_of_each_expert_are_counted(family: str, opened: Opened) -> None:
    manifest = json.loads((opened.folders[case_name(family, "int4")] / "manifest.json").read_text())
    for block in (0, 1):
        counts = {
            node["name"].rpartition(".experts.")[2]: node["tokens"]
            for node in manifest["nodes"]
            if f"layers.{block}." in node["name"] and ".experts." in node["name"]
        }
        for e in range(4):
            of_expert = {counts[f"{e}.{leaf}_proj"] for leaf in ("gate", "up", "down")}
            assert len(of_expert) == 1
        # Every token goes to two experts.
        assert sum(counts[f"{e}.down_proj"] for e in range(4)) == 2 * 4 * 32
    idle = {node["name"] for node in manifest["nodes"] if node["tokens"] == 0}
    assert {f["node"] for f in manifest["fallbacks"] if "no calibration" in f["what"]} == idle


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("which", "tied", "packed", "modules"),
    [
        ("head", False, {"lm_head"}, ["Embedding", "PackedLinear"]),
        ("embedding", True, {"model.embed_tokens"}, ["PackedEmbedding", "TiedHead"]),
        ("embedding and head", True, {"model.embed_tokens"}, ["PackedEmbedding", "TiedHead"]),
    ],
)
def test_tied_embeddings(
    family: str, which: str, tied: bool, packed: set[str], modules: list[str], opened: Opened
) -> None:
    name = case_name(family, which)
    config = json.loads((opened.folders[name] / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    stored = Checkpoint(opened.folders[name]).entries
    suffix = ".weight_packed"
    assert {k.removesuffix(suffix) for k in stored if k.endswith(suffix)} == packed
    assert ("model.embed_tokens.weight" in stored) == (which == "head")
    assert "lm_head.weight" not in stored
    if method(opened.folders[name]) == "rarefy":
        assert opened.keys[name]["modules"] == modules


def test_tokenizer_and_generation_config_travel(opened: Opened) -> None:
    source, out = opened.dense["llama"], opened.folders[case_name("llama", "int3")]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
