"""Training the whole model: what moves and what stays, the teacher, a stop in the middle."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import recipe, reloaded_logits, supports, tensors, words
from tiny import save_tiny

import rarefy
from rarefy import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

SPARSE = {"*": {"format": "sparse", "sparsity": 0.5}}
PRUNE = {"solver": "wanda", "schemes": SPARSE}
INT3 = {"solver": "nearest", "schemes": {"*": {"format": "int", "bits": 3, "group": 32}}}
TEXT = {"rows": 16, "length": 24}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str = "out", **more: Any) -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder), **more).path


def train(tuner: str = "full", **options: Any) -> dict[str, Any]:
    base = {"tuner": tuner, "steps": 12, "rows": 4, "learning_rate": 2e-3, "text": TEXT}
    return base | options


def last(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["history"][-1]
    return entry


def distance(folder: Path, dense: Path) -> float:
    """KL divergence from the dense model."""
    p, q = (reloaded_logits(path).log_softmax(-1) for path in (dense, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_recovery_brings_a_pruned_model_closer_and_keeps_its_zeros(
    tmp_path: Path, dense: Path
) -> None:
    pruned = run(tmp_path, dense, PRUNE, name="pruned")
    healed = run(tmp_path, dense, PRUNE, train(steps=40), name="healed")
    assert distance(healed, dense) < distance(pruned, dense)
    before, after = supports(pruned), supports(healed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    losses = last(healed)["losses"]
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]


def test_the_dense_model_has_nothing_to_learn_from_itself(tmp_path: Path, dense: Path) -> None:
    same = run(tmp_path, dense, train(steps=1), name="same")
    plain = run(tmp_path, dense, train(steps=1, objective="cross-entropy"), name="plain")
    assert last(same)["losses"][0] < 1e-6
    assert last(plain)["losses"][0] > 1


def test_only_scales_move(tmp_path: Path, dense: Path) -> None:
    rounded = run(tmp_path, dense, INT3, name="rounded")
    tuned = run(tmp_path, dense, INT3, train("scales", learning_rate=1e-3), name="tuned")
    assert distance(tuned, dense) < distance(rounded, dense)
    before, after = tensors(rounded), tensors(tuned)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) != name.endswith("weight_scale")


def test_a_model_that_was_cut_learns_from_the_whole_one(tmp_path: Path, dense: Path) -> None:
    cut = {"surgery": "truncate", "blocks": 1}
    short = run(tmp_path, dense, cut, name="short")
    taught = run(tmp_path, dense, cut, train(steps=30), name="taught")
    assert json.loads((taught / "config.json").read_text())["num_hidden_layers"] == 2
    assert distance(taught, dense) < 0.9 * distance(short, dense)
    losses = last(taught)["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (PRUNE, train(norms=True))
    whole = run(tmp_path, dense, *stages, name="whole")
    from rarefy.engine import train as engine

    monkeypatch.setattr(engine, "_SAVE_SECONDS", 0.0)
    after = engine._Training._after
    calls = []

    def stop(self: Any, progress: Any) -> None:
        after(self, progress)
        calls.append(progress.step)
        if progress.step == 5:
            raise KeyboardInterrupt

    plan = recipe(tmp_path, *stages, name="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._Training, "_after", stop)
        rarefy.compress(dense, plan, tmp_path / "resumed", calibration=words(tmp_path))
    assert calls == [1, 2, 3, 4, 5]
    resumed = rarefy.compress(dense, plan, tmp_path / "resumed", calibration=words(tmp_path)).path
    file = "model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    assert last(resumed)["losses"] == last(whole)["losses"]


def test_a_compressed_folder_needs_a_teacher(tmp_path: Path, dense: Path) -> None:
    pruned = run(tmp_path, dense, PRUNE, name="pruned")
    with pytest.raises(RarefyError, match="--teacher"):
        run(tmp_path, pruned, train(), name="alone")
    taught = run(tmp_path, pruned, train(), name="taught", teacher=dense)
    once = run(tmp_path, dense, PRUNE, train(), name="once")
    assert (taught / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()


def test_codes_that_cannot_move_are_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(RarefyError, match="whose codes do not move"):
        run(tmp_path, dense, INT3, train(), name="codes")
    with pytest.raises(RarefyError, match="did you mean 'distil'"):
        run(tmp_path, dense, train(objective="distill"), name="typo")
    with pytest.raises(RarefyError, match="not to signround"):
        run(tmp_path, dense, {"tuner": "signround", "text": TEXT}, name="block")
