"""Surgery on tiny models: run a stage by itself, and silence units of the dense model by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tiny import VOCAB
from transformers import AutoModelForCausalLM

from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.writer import Writer
from rarefy.data.tokens import TokenSet
from rarefy.engine.operate import run_surgery
from rarefy.engine.stage import StageRun, Watcher
from rarefy.stages import Stage

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
# SmolLM2's shape in small: 9 query heads share 3 key/value heads.
NINE = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
}
# Where the blocks are, what reads the heads, what reads the neurons.
PLACES = {
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
}
LLAMA_PLACES = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
# Heads of these families are as wide as hidden size / number of heads, whatever the config says.
FIXED_HEADS = tuple(PLACES)


def rows(count: int = 6, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def operate(
    source: Path, method: Any, out: Path, ids: torch.Tensor | None = None, **watcher: Any
) -> Path:
    """Run one surgery stage on a folder; return the folder of the result."""
    ids = rows() if ids is None else ids
    tokens = TokenSet(ids, torch.zeros(len(ids), dtype=torch.int64), "random", "", "")
    run = StageRun(
        Checkpoint(source), Stage(method), tokens, Writer(out, "key"), Watcher(**watcher), CPU
    )
    run_surgery(run, {"key": "key"})
    return out


def record(folder: Path) -> dict[str, Any]:
    """What the manifest says of the last stage."""
    entry: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["history"][-1]
    return entry


def opened(folder: Path) -> Any:
    """The folder as transformers opens it by itself; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=rows() if ids is None else ids, use_cache=False).logits
    return out


def silence(folder: Path, removed: dict[str, list[list[int]]]) -> Any:
    """The dense model with the removed units' columns of their readers set to zero."""
    model = opened(folder)
    config = model.config
    blocks, attention, mlp = PLACES.get(config.model_type, LLAMA_PLACES)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for kind, path, span in (("heads", attention, heads // groups * width), ("neurons", mlp, 1)):
        for block, units in zip(model.get_submodule(blocks), removed.get(kind, []), strict=False):
            weight = block.get_submodule(path).weight.data
            columns = weight if config.model_type == "gpt2" else weight.T
            for unit in units:
                columns[unit * span : (unit + 1) * span] = 0
    return model


def bypass(folder: Path, removed: list[int]) -> Any:
    """The dense model with some blocks that hand on what they receive."""
    model = opened(folder)
    blocks = PLACES.get(model.config.model_type, LLAMA_PLACES)[0]

    def identity(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for index in removed:
        model.get_submodule(blocks)[index].register_forward_hook(identity, with_kwargs=True)
    return model


def close_to(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding, relative to the largest value."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())
