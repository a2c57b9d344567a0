"""DSnoT against a plain-Python reference, and what its guards promise."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from layers import decoded_logits, inputs, layer, moments_of, recipe, reloaded_logits, words
from tiny import save_tiny

import rarefy
from rarefy.errors import RarefyError
from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.sparse import Sparse
from rarefy.solvers.dsnot import DSnoT
from rarefy.solvers.nearest import Nearest
from rarefy.solvers.wanda import Wanda

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.solvers.base import Problem

F32 = Float("float32")
ROWS, COLUMNS = 20, 96
FORMATS = {
    "row": Sparse(0.6, values=F32),
    "matrix": Sparse(0.6, scope="matrix", values=F32),
    "2:4": Sparse(kept=2, of=4, values=F32),
    "3:8": Sparse(kept=3, of=8, values=F32),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
every_start = pytest.mark.parametrize("initial", ["magnitude", "wanda"])


def activations(seed: int = 0, columns: int = COLUMNS) -> torch.Tensor:
    """Every other channel is far off centre, so that eps means something."""
    X = inputs(columns, seed)
    X[:, ::2] += 2 * X.std(0)[::2]
    return X


def case_of(seed: int = 0, columns: int = COLUMNS) -> Problem:
    moments = moments_of(activations(seed, columns))
    return replace(layer(ROWS, columns, seed), gram=None, moments=moments)


def start(case: Problem, fmt: Sparse, initial: str) -> torch.Tensor:
    solver = Wanda() if initial == "wanda" else Nearest()
    mask = solver.solve(case, fmt).grid.support
    assert mask is not None
    return mask


def eps(case: Problem, mask: torch.Tensor) -> torch.Tensor:
    assert case.moments is not None
    return (case.weight * case.moments.mean * ~mask).sum(1)


def mended(case: Problem, fmt: Sparse, solver: DSnoT) -> torch.Tensor:
    mask = solver.solve(case, fmt).grid.support
    assert mask is not None
    return mask


def reference(case: Problem, mask: torch.Tensor, solver: DSnoT, width: int) -> torch.Tensor:
    """The module's loop, a row and a weight at a time."""
    assert case.moments is not None
    mask, mean = mask.clone(), case.moments.mean.double()
    variance = case.moments.variance.double()
    norm = case.moments.square.double().sqrt()
    for i in range(len(mask)):
        w, c = case.weight[i], case.weight[i] * mean
        off = [j for j in range(len(w)) if not mask[i, j]]
        on = [j for j in range(len(w)) if mask[i, j]]
        error = float(c[off].sum())
        for _ in range(solver.cycles):
            sign = 1.0 if error >= 0 else -1.0
            pairs = []
            for j in off:
                mates = [k for k in on if k // width == j // width and float(c[k]) * sign < 0]
                if float(c[j]) * sign > 0 and mates:
                    best = min(mates, key=lambda k: float(w[k].abs() * norm[k]))
                    pairs.append((float(c[j]) * sign / float(variance[j]) ** solver.power, j, best))
            if not pairs or abs(error) <= solver.threshold:
                break
            _, grow, prune = max(pairs)
            after = error + float(c[prune] - c[grow])
            if solver.sign_guard and after * sign < 0:
                break
            error = after
            mask[i, grow], mask[i, prune] = True, False
            off.remove(grow)
            on.remove(prune)
    return mask


@every_format
@every_start
@pytest.mark.parametrize(
    "solver",
    [
        DSnoT(),
        DSnoT(cycles=3),
        DSnoT(power=0.0, threshold=0.5),
        DSnoT(sign_guard=False, threshold=0.01, cycles=12),
    ],
)
def test_equals_the_reference(fmt: Sparse, initial: str, solver: DSnoT) -> None:
    solver = replace(solver, initial=initial)
    case = case_of()
    before = start(case, fmt, initial)
    found = mended(case, fmt, solver)
    assert torch.equal(found, reference(case, before, solver, fmt.of or COLUMNS))
    assert not torch.equal(found, before)


@every_format
@every_start
def test_counts_stay_and_weights_are_the_dense_ones(fmt: Sparse, initial: str) -> None:
    case = replace(case_of(), weight=case_of().weight.float())
    solver = DSnoT(initial=initial)
    found, before = solver.solve(case, fmt), start(case, fmt, initial)
    after = found.grid.support
    assert after is not None
    assert torch.equal(after.sum(1), before.sum(1))
    changed = (after ^ before).sum(1)
    assert (changed % 2 == 0).all()
    assert 0 < changed.max() <= 2 * solver.cycles
    assert torch.equal(found.weight[after], case.weight[after])
    assert not found.weight[~after].any()
    if fmt.of:
        assert (after.reshape(-1, fmt.of).sum(1) == fmt.kept).all()


@every_format
@every_start
def test_the_expected_error_never_rises_under_the_guard(fmt: Sparse, initial: str) -> None:
    for seed in range(10):
        case = case_of(seed)
        before = eps(case, start(case, fmt, initial))
        cycles = [
            eps(case, mended(case, fmt, DSnoT(initial=initial, cycles=c))) for c in (1, 2, 5, 50)
        ]
        sizes = [e.abs() for e in (before, *cycles)]
        for a, b in itertools.pairwise(sizes):
            assert (b <= a * (1 + 1e-9)).all()
        assert all((e * before >= 0).all() for e in cycles)


@every_start
def test_the_expected_error_falls_by_four_fifths(initial: str) -> None:
    before, after = torch.zeros(0), torch.zeros(0)
    for seed in range(10):
        case, fmt, solver = case_of(seed, 384), FORMATS["row"], DSnoT(initial=initial)
        old, new = start(case, fmt, initial), mended(case, fmt, solver)
        active = (old != new).any(1)
        before = torch.cat([before, eps(case, old)[active].abs()])
        after = torch.cat([after, eps(case, new)[active].abs()])
    assert len(before) > 100
    assert after.mean() < 0.2 * before.mean()


@every_format
def test_an_infinite_threshold_changes_nothing(fmt: Sparse) -> None:
    case = case_of()
    for solver in (DSnoT(threshold=float("inf")), DSnoT(cycles=0)):
        assert torch.equal(mended(case, fmt, solver), start(case, fmt, "wanda"))


def test_the_threshold_does_not_depend_on_the_length_of_the_text() -> None:
    case, fmt, solver = case_of(), FORMATS["row"], DSnoT(threshold=2.0)
    longer = replace(case, moments=moments_of(activations().repeat(3, 1)))
    assert torch.equal(mended(case, fmt, solver), mended(longer, fmt, solver))
    assert not torch.equal(mended(case, fmt, solver), mended(case, fmt, DSnoT(threshold=0.0)))


def test_centred_channels_leave_nothing_to_mend() -> None:
    X = inputs(COLUMNS, 0)
    case = replace(case_of(), moments=moments_of(X - X.mean(0)))
    assert torch.equal(mended(case, FORMATS["row"], DSnoT()), start(case, FORMATS["row"], "wanda"))


def test_a_channel_that_never_varies_is_no_division_by_zero() -> None:
    X = inputs(COLUMNS, 0)
    X[:, 3], X[:, 5] = 0, 1.5
    case = replace(case_of(), moments=moments_of(X))
    found = mended(case, FORMATS["row"], DSnoT())
    assert torch.equal(found.sum(1), start(case, FORMATS["row"], "wanda").sum(1))


@every_format
def test_a_support_of_an_earlier_stage_is_left_as_it_is(fmt: Sparse) -> None:
    case = case_of()
    earlier = start(case, fmt, "magnitude")
    found = DSnoT().solve(replace(case, support=earlier), replace(fmt, values=Int(4)))
    assert torch.equal(found.grid.support, earlier)
    assert not torch.equal(mended(case, fmt, DSnoT(initial="magnitude")), earlier)


def test_needs_zeros_to_move() -> None:
    with pytest.raises(RarefyError, match="int4 row has none"):
        DSnoT().solve(case_of(), Int(4))


@pytest.mark.parametrize("options", [{"initial": "sparsegpt"}, {"cycles": -1}, {"threshold": -1.0}])
def test_refuses_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DSnoT(**options)  # type: ignore[arg-type]


def test_the_result_is_stored_and_opens_again(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    schemes = {"*": {"format": "sparse", "kept": 2, "of": 4}}
    file = recipe(tmp_path, {"solver": "dsnot", "schemes": schemes})
    out = rarefy.compress(model, file, tmp_path / "out", calibration=words(tmp_path))
    assert {n["solver"] for n in out.manifest["nodes"]} == {"dsnot"}
    assert torch.allclose(
        reloaded_logits(out.path), decoded_logits("llama", out.path), rtol=0, atol=1e-6
    )
