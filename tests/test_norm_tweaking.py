"""Norm tweaking: only norms move, towards the mean and variance of every channel."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import recipe, tensors, words
from tiny import save_tiny, tiny
from torch.func import functional_call

import rarefy
from rarefy import RarefyError
from rarefy.engine.fit import fit
from rarefy.formats.integer import Int
from rarefy.tuners.base import BlockView
from rarefy.tuners.norm_tweaking import NormTweaking

if TYPE_CHECKING:
    from pathlib import Path

INT2 = {"*": {"format": "int", "bits": 2, "group": 16}}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def test_the_loss_is_that_of_the_formula() -> None:
    g = torch.Generator().manual_seed(0)
    q, f = torch.randn(2, 5, 3, generator=g), 2 + 3 * torch.randn(2, 5, 3, generator=g)
    total = 0.0
    for c in range(3):
        a, b = q[..., c].flatten().tolist(), f[..., c].flatten().tolist()
        mu = [sum(x) / 10 for x in (a, b)]
        var = [sum((v - m) ** 2 for v in x) / 10 for x, m in zip((a, b), mu, strict=True)]
        total += abs(mu[0] - mu[1]) + abs(var[0] - var[1])
    assert float(NormTweaking().loss(q, f)) == pytest.approx(total / 3, rel=1e-5)
    # Only the distribution counts: tokens may change places.
    assert NormTweaking().loss(f.flip(1), f) < 1e-5


@pytest.mark.parametrize(("index", "rate"), [(0, 1e-3), (2, 1.5e-3), (3, 1.75e-3)])
def test_later_blocks_learn_faster(index: int, rate: float) -> None:
    others = {"norm.weight": torch.ones(3)}
    block = BlockView("block", index, 4, {}, others, ("norm.weight",))
    [group] = NormTweaking(lr=1e-3, scale=1.0).begin(block).groups
    assert group["lr"] == pytest.approx(rate)
    optimizer = NormTweaking().optimizer([group])
    assert type(optimizer) is torch.optim.Adam


class Tiny:
    """A tiny block whose matrices were rounded to two bits, and the dense one beside it."""

    def __init__(self) -> None:
        self.model = tiny("llama")[1].requires_grad_(False)
        self.block = self.model.model.layers[0]
        own = dict(self.block.named_parameters())
        form = Int(2, group=16)
        self.rounded = {n: form.fit(p).round(p) for n, p in own.items() if p.ndim == 2}
        others = {name: own[name].clone() for name in NORMS}
        self.view = BlockView("block", 0, 1, {}, others, NORMS)

    def feed(self, seed: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(256, (16, 32), generator=g)
        hidden: torch.Tensor = self.model.model.embed_tokens(ids)
        return hidden

    def run(self, values: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        places = self.model.model.rotary_emb(hidden, torch.arange(32)[None])
        out = functional_call(self.block, values, (hidden,), {"position_embeddings": places})
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def learn(self, tuner: NormTweaking, rounded: dict[str, torch.Tensor], seed: int) -> Any:
        """The tuning and its losses."""
        tuning = tuner.begin(self.view)
        hidden = self.feed(seed)
        target = self.run({}, hidden)

        def gradients(step: int) -> float:
            at = slice(step % 16, step % 16 + 1)
            output = self.run(rounded | tuning.parameters(), hidden[at])
            loss = tuner.loss(output, target[at])
            loss.backward()
            return float(loss.detach())

        return tuning, fit(tuner.loop, tuner.optimizer(tuning.groups), gradients).losses


def test_the_loss_falls_on_other_inputs() -> None:
    block = Tiny()
    tuner = NormTweaking(steps=48, lr=3e-3)
    tuning, _ = block.learn(tuner, block.rounded, 0)
    unseen = block.feed(1)
    target = block.run({}, unseen)
    tuned = tuning.finish()
    assert not tuned.matrices
    assert tuned.others.keys() == set(NORMS)
    before = tuner.loss(block.run(block.rounded, unseen), target)
    after = tuner.loss(block.run(block.rounded | tuned.others, unseen), target)
    assert after < 0.9 * before


def test_a_block_that_was_not_rounded_stays_bit_for_bit() -> None:
    block = Tiny()
    tuning, losses = block.learn(NormTweaking(steps=20, lr=0.1), {}, 0)
    assert losses == [0.0] * 20
    tuned = tuning.finish()
    assert all(torch.equal(tuned.others[name], block.view.others[name]) for name in NORMS)


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str) -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def left(folder: Path) -> list[float]:
    history = json.loads((folder / "manifest.json").read_text())["history"]
    return [block["left"] for block in history[-1]["blocks"]]


SOLVER = {"solver": "nearest", "schemes": INT2}


def tweak(steps: int, **options: Any) -> dict[str, Any]:
    return {"tuner": "norm-tweaking", "steps": steps, "lr": 3e-3, **options}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


@pytest.mark.parametrize("stream", ["prefix", "dense"])
def test_after_a_solver_only_norms_move(tmp_path: Path, dense: Path, stream: str) -> None:
    rounded = tensors(run(tmp_path, dense, SOLVER, name="rtn"))
    none = run(tmp_path, dense, SOLVER, tweak(0, stream=stream), name="none")
    some = run(tmp_path, dense, SOLVER, tweak(24, stream=stream), name="some")
    same, tuned = tensors(none), tensors(some)
    assert same.keys() == tuned.keys() == rounded.keys()
    assert all(torch.equal(same[name], rounded[name]) for name in rounded)
    changed = {name for name in rounded if not torch.equal(tuned[name], rounded[name])}
    assert changed == {f"model.layers.{i}.{name}" for i in range(3) for name in NORMS}
    falls = [after < before for before, after in zip(left(none), left(some), strict=True)]
    assert falls[0]
    assert sum(falls) >= 2


@pytest.mark.parametrize("stream", ["prefix", "dense"])
def test_what_the_dense_block_is_fed_decides_about_a_kept_one(
    tmp_path: Path, dense: Path, stream: str
) -> None:
    solver = {"solver": "nearest", "schemes": {"model.layers.1.*": "keep"} | INT2}
    tuned = run(tmp_path, dense, solver, tweak(5, stream=stream), name="tuned")
    mine, theirs = tensors(tuned), tensors(dense)
    same = all(
        torch.equal(mine[name], theirs[name])
        for name in (f"model.layers.1.{norm}" for norm in NORMS)
    )
    assert same == (stream == "prefix")
    assert (left(tuned)[1] == 0) == (stream == "prefix")


def test_what_cannot_work_is_refused(tmp_path: Path, dense: Path) -> None:
    for options, expected in (
        ({"lr": 0.0}, "lr must be above 0"),
        ({"scale": -1.0}, "scale at least 0"),
        ({"stream": "both"}, "stream must be dense or prefix"),
        ({"steps": -1}, "at least 0"),
    ):
        with pytest.raises(RarefyError, match=expected):
            run(tmp_path, dense, SOLVER, tweak(1) | options, name="options")
    with pytest.raises(RarefyError, match="has no norm"):
        NormTweaking().begin(BlockView("block", 0, 1, {}))
