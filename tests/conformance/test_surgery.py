"""The contract of a surgery: cutting is silencing, and map, config and weights still agree.

A new surgery adds instances to ``SAMPLES``; the suite itself stays as it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from operating import FIXED_HEADS, bypass, close_to, logits, opened, operate, record, silence
from tiny import save_tiny

from rarefy.maps.catalogue import map_for
from rarefy.maps.check import prove
from rarefy.surgery.base import SURGERIES
from rarefy.surgery.deeper_layers import DeeperLayers
from rarefy.surgery.llm_pruner import LLMPruner
from rarefy.surgery.magnitude import L2
from rarefy.surgery.minitron import Minitron
from rarefy.surgery.random import Random
from rarefy.surgery.shortened_llama import ShortenedLlama
from rarefy.surgery.shortgpt import ShortGPT
from rarefy.surgery.truncate import Truncate

if TYPE_CHECKING:
    from pathlib import Path

_TAYLOR = LLMPruner(heads=0.5, neurons=0.3, samples=3, length=16)

SAMPLES: dict[str, list[Any]] = {
    "deeper-layers": [DeeperLayers(blocks=2, protect=0), DeeperLayers(blocks=1)],
    "l2": [L2(0.5, 0.25), L2(heads=0, neurons=0.5), L2(heads=0.5, neurons=0)],
    "llm-pruner": [
        _TAYLOR,
        replace(_TAYLOR, criterion="second", reduction="mean"),
        replace(_TAYLOR, criterion="mix", reduction="max"),
        replace(_TAYLOR, criterion="vectorize", reduction="prod"),
        replace(_TAYLOR, reduction="first"),
    ],
    "minitron": [Minitron(0.5, 0.25)],
    "random": [Random(0.5, 0.25), Random(0.5, 0.25, seed=1)],
    "shortened-llama": [ShortenedLlama(blocks=2, protect=0, samples=3, length=16)],
    "shortgpt": [ShortGPT(blocks=2, protect=0), ShortGPT(blocks=1)],
    "truncate": [Truncate(2, how) for how in ("uniform", "first", "last", "drop-middle")],
}
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "opt",
    "gpt2",
    "gpt_neox",
)
EVERY_SAMPLE = [
    pytest.param(method, id=f"{name} {i}")
    for name, methods in SAMPLES.items()
    for i, method in enumerate(methods)
]
ONE_EACH = [pytest.param(methods[0], id=name) for name, methods in SAMPLES.items()]


def fitted(method: Any, family: str) -> Any:
    """The method as far as a family can be cut: some have no config field for fewer heads."""
    if hasattr(method, "heads") and family in FIXED_HEADS:
        return replace(method, heads=0.0, neurons=method.neurons or 0.25)
    return method


def operated(method: Any, family: str, folder: Path) -> tuple[Path, Path, Any]:
    """(dense folder, result, what was removed)."""
    dense = save_tiny(family, folder / "dense", num_hidden_layers=4)
    out = operate(dense, fitted(method, family), folder / "out")
    return dense, out, record(out)["removed"]


@pytest.mark.parametrize("name", [card.name for card in SURGERIES])
def test_has_samples(name: str) -> None:
    if not SAMPLES.get(name):
        pytest.fail(
            f"add samples for the surgery {name!r} to SAMPLES in tests/conformance/test_surgery.py"
        )


def check_contract(method: Any, family: str, folder: Path) -> None:
    dense, out, removed = operated(method, family, folder)
    small = opened(out)
    reference = bypass(dense, removed) if isinstance(removed, list) else silence(dense, removed)
    assert close_to(logits(small), logits(reference))
    assert not close_to(logits(small), logits(opened(dense)), 1e-3)
    model_map = map_for(small.config)
    assert model_map is not None
    prove(small, model_map)


@pytest.mark.parametrize("method", EVERY_SAMPLE)
def test_cutting_is_silencing(method: Any, tmp_path: Path) -> None:
    check_contract(method, "llama", tmp_path)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("method", ONE_EACH)
def test_cutting_is_silencing_in_every_family(method: Any, family: str, tmp_path: Path) -> None:
    check_contract(method, family, tmp_path)


@pytest.mark.parametrize("method", EVERY_SAMPLE)
def test_the_same_run_gives_the_same_bytes(method: Any, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=4)
    first, second = (
        {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in operate(dense, method, tmp_path / name).iterdir()
            if file.name != "timings.json"
        }
        for name in ("first", "second")
    )
    assert "model.safetensors" in first
    assert first == second
