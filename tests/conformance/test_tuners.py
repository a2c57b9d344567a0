"""What every tuner must do: learn, repeat itself, and leave alone what it does not declare.

A new tuner adds a sample: the stages before it, its options, and which stored tensors may change.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import recipe, tensors, words
from tiny import save_tiny

import rarefy
from rarefy.tuners.base import TUNERS, BlockTuner

if TYPE_CHECKING:
    from pathlib import Path

INT3 = {"*": {"format": "int", "bits": 3, "group": 32}}
ROUND = {"solver": "nearest", "schemes": INT3}
PRUNE = {"solver": "wanda", "schemes": {"*": {"format": "sparse", "sparsity": 0.5}}}
TEXT = {"rows": 8, "length": 24}


@dataclass(frozen=True)
class Sample:
    """A tuner at work.

    Attributes:
        options: of the tuner's stage.
        before: stages that come first.
        moves: pattern of the stored tensors that may differ from a run without steps.
        start: stages that give the same tensors as the tuner without steps; None where it does not
            begin at rest.
    """

    options: dict[str, Any]
    before: tuple[dict[str, Any], ...] = ()
    moves: str = r"layers\..*_proj\."
    start: tuple[dict[str, Any], ...] | None = None


SAMPLES: dict[str, Sample] = {
    "signround": Sample({"rows": 4, "schemes": INT3}, start=(ROUND,)),
    "omniquant": Sample({"rows": 4, "lwc_lr": 0.05, "schemes": INT3}),
    "norm-tweaking": Sample({"rows": 4, "lr": 1e-3}, (ROUND,), r"layers\..*norm", (ROUND,)),
    "full": Sample({"learning_rate": 2e-3}, (PRUNE,), r"layers|^model\.norm", (PRUNE,)),
    "lora": Sample({"learning_rate": 5e-3}, (PRUNE,), start=(PRUNE,)),
    "scales": Sample({"relative": True}, (ROUND,), r"weight_scale$", (ROUND,)),
    "codes": Sample({"reach": 0.51}, (ROUND,), r"weight_(packed|scale)$", (ROUND,)),
    "qlora": Sample({"rank": 2}, (ROUND,), r"^$", (ROUND,)),
    "qat": Sample({"learning_rate": 2e-3, "schemes": INT3}, (), "", (ROUND,)),
}
STEPS = 10


def test_every_tuner_has_a_sample() -> None:
    assert {card.name for card in TUNERS} == set(SAMPLES)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def stage(name: str, steps: int) -> dict[str, Any]:
    made = {"tuner": name, "steps": steps, **SAMPLES[name].options}
    if not issubclass(TUNERS.card(name).cls, BlockTuner):
        made = {"text": TEXT, "learning_rate": 1e-3, **made}
    return made


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str) -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def losses(folder: Path) -> list[float]:
    told = json.loads((folder / "manifest.json").read_text())["history"][-1]
    if "blocks" in told:
        return [block["left"] for block in told["blocks"]]
    return [told["losses"][-1]] if told["losses"] else []


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_without_a_step_nothing_has_moved(name: str, tmp_path: Path, dense: Path) -> None:
    sample = SAMPLES[name]
    if sample.start is None:
        pytest.skip("does not begin at rest")
    rest = tensors(run(tmp_path, dense, *sample.before, stage(name, 0), name="rest"))
    expected = tensors(run(tmp_path, dense, *sample.start, name="expected"))
    assert rest.keys() == expected.keys()
    assert [n for n in rest if not torch.equal(rest[n], expected[n])] == []


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_it_learns_and_moves_only_what_it_declares(name: str, tmp_path: Path, dense: Path) -> None:
    sample = SAMPLES[name]
    first = run(tmp_path, dense, *sample.before, stage(name, 1), name="first")
    after = run(tmp_path, dense, *sample.before, stage(name, STEPS), name="after")
    assert sum(losses(after)) < sum(losses(first))
    one, ten = tensors(first), tensors(after)
    assert one.keys() == ten.keys()
    moved = {n for n in one if not torch.equal(one[n], ten[n])}
    assert all(re.search(sample.moves, n) for n in moved)
    apart = (after / "adapter" / "adapter_model.safetensors").exists()
    assert moved or apart


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_it_repeats_itself(name: str, tmp_path: Path, dense: Path) -> None:
    before = SAMPLES[name].before
    runs = [run(tmp_path, dense, *before, stage(name, 3), name=n) for n in ("a", "b")]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (runs[0] / file).exists():
            assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
