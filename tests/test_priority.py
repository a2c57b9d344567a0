"""Prioritised training: planted damage comes first, the rest stays, and hard rows are taken."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import recipe, tensors, words
from tiny import save_tiny

import rarefy
from rarefy import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

# Half the bytes of block 1, and little of the others.
PLANTED = {
    "solver": "nearest",
    "schemes": {
        "model.layers.1.mlp.*": {"format": "sparse", "sparsity": 0.95},
        "*": {"format": "sparse", "sparsity": 0.02},
    },
}
TEXT = {"rows": 16, "length": 24}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str = "out") -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def train(**options: Any) -> dict[str, Any]:
    base = {"tuner": "full", "steps": 4, "rows": 4, "learning_rate": 1e-3, "text": TEXT}
    return base | {"norms": False, "biases": False} | options


def last(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["history"][-1]
    return entry


@pytest.mark.parametrize("by", ["restoration", "local"])
def test_planted_damage_comes_first_and_the_rest_stays(
    tmp_path: Path, dense: Path, by: str
) -> None:
    pruned = run(tmp_path, dense, PLANTED, name="pruned")
    healed = run(tmp_path, dense, PLANTED, train(priority={"share": 0.1, "by": by}), name="healed")
    told = last(healed)
    assert max(told["damage"], key=told["damage"].__getitem__) == "model.layers.1.mlp"
    assert {name.rpartition(".")[0] for name in told["modules"]} == {"model.layers.1.mlp"}
    before, after = tensors(pruned), tensors(healed)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.1.mlp.") for name in changed)


def test_controls_choose_others(tmp_path: Path, dense: Path) -> None:
    least = run(tmp_path, dense, PLANTED, train(priority={"share": 0.1, "least": True}), name="a")
    assert "model.layers.1.mlp.up_proj" not in last(least)["modules"]
    half = {"share": 0.5, "by": "random", "seed": 3}
    blind = run(tmp_path, dense, PLANTED, train(priority=half), name="b")
    assert len({name.rpartition(".")[0] for name in last(blind)["modules"]}) == 3


def test_rows_of_large_excess_loss_are_taken(tmp_path: Path, dense: Path) -> None:
    text = TEXT | {"pool": 4, "uniform": 0.0}
    out = run(tmp_path, dense, PLANTED, train(text=text, objective="cross-entropy"))
    told = last(out)["excess"]
    assert len(told) == 4
    assert all(chosen > pool for chosen, pool in told)


def test_a_dense_model_has_no_damage(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(RarefyError, match="needs a model that was compressed"):
        run(tmp_path, dense, train(priority={"share": 0.5}))
    with pytest.raises(RarefyError, match="did you mean 'share'"):
        run(tmp_path, dense, PLANTED, train(priority={"shar": 0.5}))
