"""Synthetic layers whose inputs resemble a language model's, and what runs of the engine need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tiny import tiny
from transformers import AutoModelForCausalLM

from rarefy import Calibration
from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.skeleton import Skeleton, set_matrix
from rarefy.maps.experts import split_experts
from rarefy.solvers.base import Problem
from rarefy.statistics import MomentSums

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.formats.base import Packed
    from rarefy.statistics import Moments

CPU = torch.device("cpu")
IDS = (torch.arange(2 * 24) * 37 % 251).view(2, 24)


def inputs(columns: int, seed: int, tokens: int = 0) -> torch.Tensor:
    """Activations [tokens, columns]: correlated, of unequal sizes, some channels off centre."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    spectrum = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    X = torch.randn(tokens or 4 * columns, columns, generator=g, dtype=torch.float64)
    X = X * spectrum @ mix + torch.randn(columns, generator=g, dtype=torch.float64)
    return X * torch.logspace(0, -1.2, columns)[torch.randperm(columns, generator=g)]


def moments_of(X: torch.Tensor) -> Moments:
    sums = MomentSums(X.shape[1], CPU)
    sums.add(X)
    return sums.moments()


def layer(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """A random matrix with both statistics of its inputs."""
    X = inputs(columns, seed)
    g = torch.Generator().manual_seed(seed + 1000)
    W = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    gram = (X.T @ X / len(X)).to(dtype)
    return Problem("layer", W.to(dtype), gram, moments_of(X))


def recipe(folder: Path, *stages: dict[str, Any], name: str = "recipe") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"stages": list(stages)}, sort_keys=False))
    return file


def words(folder: Path) -> Calibration:
    """Four rows of pseudo-random words."""
    g = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=g).tolist()
    text = "".join(" " if i % 6 == 5 else chr(c) for i, c in enumerate(letters))
    (folder / "calibration.txt").write_text(text)
    return Calibration(str(folder / "calibration.txt"), sequences=4, length=32)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def supports(folder: Path) -> dict[str, torch.Tensor]:
    """Stored support of every sparse matrix of a folder."""
    skeleton = Skeleton(Checkpoint(folder), CPU)
    found = {name: skeleton.support(name) for name in skeleton.earlier}
    return {name: support for name, support in found.items() if support is not None}


@torch.no_grad()
def reloaded_logits(folder: Path) -> torch.Tensor:
    """What transformers computes from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=IDS, use_cache=False).logits


def as_opened(folder: Path, packed: Packed, matrix: torch.Tensor) -> torch.Tensor:
    """A decoded matrix as transformers opens it: compressed-tensors multiplies in 16 bits."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "compressed-tensors":
        return matrix
    return matrix.to(packed["weight_scale"].dtype).float()


@torch.no_grad()
def decoded_logits(family: str, folder: Path, **overrides: Any) -> torch.Tensor:
    """What the dense architecture computes with each compressed matrix decoded."""
    skeleton = Skeleton(Checkpoint(folder), CPU, factored=False)
    _, model = tiny(family, **overrides)
    for block in model.get_submodule(skeleton.map.blocks) if skeleton.map.experts else ():
        split_experts(block, skeleton.map.experts)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module in skeleton.earlier:
            packed = skeleton.packed(module)
            matrix = skeleton.earlier[module].decode(packed)
            set_matrix(model.get_submodule(module), as_opened(folder, packed, matrix))
        else:
            parameter.copy_(skeleton.read(name).float())
    return model(input_ids=IDS, use_cache=False).logits
