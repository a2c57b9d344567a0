"""SignRound: nearest without steps, the identity of a step, lower loss of every block."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import inputs, recipe, reloaded_logits, tensors, words
from tiny import save_tiny

import rarefy
from rarefy import RarefyError
from rarefy.engine.fit import SignSGD, fit
from rarefy.formats.integer import Int
from rarefy.tuners.base import BlockView, Start
from rarefy.tuners.signround import SignRound

if TYPE_CHECKING:
    from pathlib import Path

INT3 = {"*": {"format": "int", "bits": 3, "group": 32}}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str = "out") -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def tune(steps: int, schemes: dict[str, Any] | None = INT3, **options: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {"tuner": "signround", "steps": steps, "rows": 2, **options}
    return stage | ({"schemes": schemes} if schemes else {})


def blocks(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "manifest.json").read_text())["history"]
    return history[-1]["blocks"]


def test_without_steps_it_is_rounding_to_nearest(tmp_path: Path, dense: Path) -> None:
    rounded = run(tmp_path, dense, {"solver": "nearest", "schemes": INT3}, name="rtn")
    tuned = run(tmp_path, dense, tune(0), name="tuned")
    mine, theirs = tensors(tuned), tensors(rounded)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def view(seed: int = 0, bits: int = 3) -> tuple[BlockView, torch.Tensor]:
    """A block of one matrix, and inputs for it."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(24, 40, generator=g)
    X = inputs(40, seed, tokens=96).float()
    fmt = Int(bits, group=16)  # 16 does not divide 40
    return BlockView("block", 0, 1, {"linear": Start(W, fmt.fit(W))}), X


def learn(tuner: SignRound, block: BlockView, X: torch.Tensor) -> Any:
    tuning = tuner.begin(block)
    W = block.matrices["linear"].weight

    def gradients(step: int) -> float:
        loss = ((tuning.parameters()["linear.weight"] - W) @ X.T).square().mean()
        loss.backward()
        return float(loss)

    fit(tuner.loop, tuner.optimizer(tuning.groups), gradients)
    return tuning


def test_a_step_moves_every_number_with_a_gradient_by_the_learning_rate() -> None:
    block, X = view()
    tuner = SignRound(steps=1, learning_rate=0.125, best=False)
    tuning = tuner.begin(block)
    [matrix] = tuning.matrices.values()
    W = block.matrices["linear"].weight
    loss = ((tuning.parameters()["linear.weight"] - W) @ X.T).square().mean()
    leaves = [matrix.v, matrix.alpha, matrix.beta]
    signs = [g.sign() for g in torch.autograd.grad(loss, leaves)]
    tuning = learn(tuner, block, X)
    [matrix] = tuning.matrices.values()
    assert signs[0].abs().mean() > 0.9
    for leaf, start, sign in zip(
        (matrix.v, matrix.alpha, matrix.beta), (0.0, 1.0, 1.0), signs, strict=True
    ):
        assert torch.equal(leaf.detach(), start - 0.125 * sign)


def test_offsets_alone_change_a_code_by_at_most_one() -> None:
    block, X = view()
    tuner = SignRound(steps=40, learn_range=False, best=False)
    tuning = learn(tuner, block, X)
    [matrix] = tuning.matrices.values()
    assert float(matrix.v.detach().abs().max()) <= 0.5 + 1 / 80 + 1e-6
    weight, grid = tuning.finish().matrices["linear"]
    start = block.matrices["linear"]
    change = grid.codes(weight) - start.grid.codes(start.weight)
    assert int(change.abs().max()) == 1
    assert 0.03 < float((change != 0).float().mean()) < 0.4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_help_beside_offsets_and_both_beat_nearest(bits: int) -> None:
    block, X = view(bits=bits)
    W = block.matrices["linear"].weight

    def error(tuner: SignRound) -> float:
        weight, _ = learn(tuner, block, X).finish().matrices["linear"]
        return float(((weight - W) @ X.T).square().mean())

    nearest = error(SignRound(steps=0))
    offsets = error(SignRound(steps=100, learn_range=False))
    both = error(SignRound(steps=100))
    assert offsets < nearest
    assert both < (offsets if bits < 4 else nearest)


def test_every_block_comes_closer_to_the_dense_one(tmp_path: Path, dense: Path) -> None:
    before = run(tmp_path, dense, tune(0), name="rtn")
    after = run(tmp_path, dense, tune(30), name="tuned")
    pairs = list(zip(blocks(before), blocks(after), strict=True))
    assert len(pairs) == 3
    for plain, learned in pairs:
        assert learned["left"] < plain["left"]


def test_it_goes_on_with_the_codes_of_a_solver(tmp_path: Path, dense: Path) -> None:
    solver = {"solver": "gptq", "schemes": INT3}
    gptq = run(tmp_path, dense, solver, name="gptq")
    same = run(tmp_path, dense, solver, tune(0, None), name="same")
    mine, theirs = tensors(same), tensors(gptq)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    better = run(
        tmp_path, dense, solver, tune(40, None, learning_rate=0.01) | {"rows": 4}, name="better"
    )
    for plain, learned in zip(blocks(same), blocks(better), strict=True):
        assert learned["left"] < plain["left"]
    assert "int3" in json.loads((better / "manifest.json").read_text())["nodes"][0]["format"]


def test_it_keeps_the_zeros_of_a_pruned_model(tmp_path: Path, dense: Path) -> None:
    sparse = {"*": {"format": "sparse", "kept": 2, "of": 4}}
    pruned = run(tmp_path, dense, {"solver": "wanda", "schemes": sparse}, name="pruned")
    both = run(tmp_path, dense, {"solver": "wanda", "schemes": sparse}, tune(10), name="both")
    places = {k: v for k, v in tensors(pruned).items() if k.endswith("weight_index")}
    assert places
    assert all(torch.equal(tensors(both)[name], at) for name, at in places.items())
    assert reloaded_logits(both).isfinite().all()


def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, dense, tune(6), name="whole")
    from rarefy.checkpoint.writer import Writer

    add = Writer.add

    def stop(self: Writer, part: str, *rest: Any) -> None:
        if part == "00001":
            raise KeyboardInterrupt
        add(self, part, *rest)

    plan = recipe(tmp_path, tune(6), name="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "add", stop)
        rarefy.compress(dense, plan, tmp_path / "resumed", calibration=words(tmp_path))
    resumed = rarefy.compress(dense, plan, tmp_path / "resumed", calibration=words(tmp_path)).path
    file = "model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_what_cannot_be_learned_is_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(RarefyError, match="has no ranges that could be learned"):
        run(tmp_path, dense, tune(1, {"*": {"format": "float"}}), name="float")
    with pytest.raises(RarefyError, match="has a grid yet"):
        run(tmp_path, dense, tune(1, None), name="none")
    with pytest.raises(RarefyError, match="reads 64 rows a step"):
        run(tmp_path, dense, tune(1) | {"rows": 64}, name="rows")
    assert replace(SignRound(), steps=0).rate == 1.0
    assert isinstance(SignRound().optimizer([{"params": [torch.zeros(1)], "lr": 1.0}]), SignSGD)
