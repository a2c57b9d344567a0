"""AWQ: its search against brute force, its clipping group by group, and what models make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from planted import logits, moved, planted, tensors, transformed, watching, write_recipe, write_text
from tiny import FAMILIES, save_tiny

import rarefy
from rarefy import Calibration
from rarefy.errors import RarefyError
from rarefy.formats.integer import Int
from rarefy.formats.low_rank import LowRank
from rarefy.solvers.awq_clip import AWQClip
from rarefy.solvers.base import Problem, output_error
from rarefy.solvers.nearest import Nearest
from rarefy.statistics import Gram, MomentSums
from rarefy.transforms.awq import AWQ
from rarefy.transforms.base import EdgeView, Scaling

if TYPE_CHECKING:
    from pathlib import Path

N = 48
CPU = torch.device("cpu")
FMT = Int(3, 16)
INT4 = {"format": "int", "bits": 4, "group": 32}
TRIALS = [i / 20 for i in range(20)]


def inputs(seed: int, tokens: int = 300, *, spread: float = 1.0) -> torch.Tensor:
    """[T, N]: correlated channels of unequal size, as trained models have them."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(N) + 0.3 * torch.randn(N, N, generator=g) / N**0.5
    return torch.randn(tokens, N, generator=g) @ mix * (spread * torch.randn(N, generator=g)).exp()


def weights(seed: int, rows: int = 24) -> torch.Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(100 + seed))


def view(X: torch.Tensor, *readers: torch.Tensor, fmt: Int | None = FMT) -> EdgeView:
    moments, gram = MomentSums(X.shape[1], CPU), Gram(X.shape[1], CPU)
    moments.add(X)
    gram.add(X)
    return EdgeView(
        name="edge",
        after_norm=True,
        of_heads=False,
        repeated=False,
        readers=readers,
        formats=(fmt,) * len(readers),
        channels=torch.arange(X.shape[1]),
        width=X.shape[1],
        moments=moments.moments(),
        gram=gram.mean(),
    )


def fitted(awq: AWQ, edge: EdgeView) -> Scaling:
    answer = awq.fit(edge)
    assert answer is not None
    return answer


def history(answer: Scaling) -> dict[float, float]:
    search = answer.notes["search"]
    assert isinstance(search, list)
    return dict(search)


def codes(W: torch.Tensor, fmt: Int) -> torch.Tensor:
    return fmt.fit(W).codes(W)


# The search


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_the_brute_force_over_all_tokens(seed: int) -> None:
    X, readers = inputs(seed), (weights(seed), weights(seed + 50, 10))
    answer = fitted(AWQ(), view(X, *readers))
    assert [*history(answer)] == TRIALS
    a = X.abs().mean(0).double()
    total = sum(float((X.double() @ W.double().T).square().sum()) for W in readers)
    losses = {}
    for r, found in history(answer).items():
        s = a**r
        s = (s / (s.max() * s.min()).sqrt()).float()
        lost = 0.0
        for W in readers:
            Q = FMT.fit(W * s).round(W * s) / s
            lost += float((X.double() @ (W - Q).double().T).square().sum())
        losses[r] = lost / total
        assert found == pytest.approx(losses[r], rel=2e-3), r
    best = min(losses, key=lambda r: losses[r])
    assert answer.notes["ratio"] == best
    expected = a**best / ((a**best).max() * (a**best).min()).sqrt()
    torch.testing.assert_close(answer.factors, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("duo", [False, True])
def test_never_worse_than_rounding_and_mostly_better(duo: bool) -> None:
    better = 0
    for seed in range(20):
        answer = fitted(AWQ(duo), view(inputs(seed), weights(seed)))
        search = answer.notes["search"]
        assert isinstance(search, list)
        first, least = search[0], min(error for _, error in search)
        assert [answer.notes["ratio"], least] in search
        W, X = weights(seed), inputs(seed)
        H = view(X, W).gram
        assert H is not None
        plain = output_error(W, FMT.fit(W).round(W), H)
        assert first == [0.0, pytest.approx(plain, rel=1e-4)]
        s = answer.factors
        mine = output_error(W, FMT.fit(W * s).round(W * s) / s, H)
        assert mine == pytest.approx(least, rel=1e-4)
        assert mine <= plain
        better += mine < plain
    assert better >= 18


def test_duo_divides_by_the_weights_size_too() -> None:
    X, W = inputs(7), weights(7)
    answer = fitted(AWQ(duo=True), view(X, W))
    search = answer.notes["search"]
    assert isinstance(search, list)
    assert [r for r, _ in search] == [0.0, *TRIALS]
    a = X.abs().mean(0)
    a = a / a.mean()
    w = torch.zeros(N)
    for row in W:
        for at in range(0, N, 16):
            group = row[at : at + 16].abs()
            w[at : at + 16] += group / group.max() / len(W)
    r = float(str(answer.notes["ratio"]))
    s = a**r / (w ** (1 - r) + 1e-4)
    torch.testing.assert_close(answer.factors, s / (s.max() * s.min()).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("c", [0.001, 2.0, 7.3, 1e4])
def test_the_unit_of_the_inputs_does_not_matter(c: float) -> None:
    X, W = inputs(3), weights(3)
    one, other = fitted(AWQ(), view(X, W)), fitted(AWQ(), view(c * X, W))
    assert one.notes["ratio"] == other.notes["ratio"] != 0
    torch.testing.assert_close(one.factors, other.factors, rtol=1e-5, atol=0)
    assert torch.equal(codes(W * one.factors, FMT), codes(W * other.factors, FMT))


def test_equal_channels_are_rounded_to_nearest() -> None:
    X = inputs(4)
    X = X / X.abs().mean(0)
    W = weights(4)
    s = fitted(AWQ(), view(X, W)).factors
    torch.testing.assert_close(s, torch.ones(N), rtol=1e-5, atol=0)
    assert torch.equal(codes(W * s, FMT), codes(W, FMT))


def test_the_loudest_channel_is_enlarged() -> None:
    chosen = 0
    for seed in range(10):
        edge = view(inputs(seed), weights(seed))
        answer = fitted(AWQ(), edge)
        s = answer.factors
        assert s[edge.moments.size.argmax()] >= s.median()
        assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-5)
        chosen += answer.notes["ratio"] != 0
    assert chosen >= 8


def test_a_silent_channel_is_not_made_small() -> None:
    X = inputs(5)
    X[:, 9] = 0
    answer = fitted(AWQ(), view(X, weights(5)))
    assert answer.notes["ratio"] != 0
    assert answer.factors.isfinite().all()
    assert float(answer.factors[9]) >= float(answer.factors.quantile(0.1))


def test_only_matrices_that_are_rounded_vote() -> None:
    X, W, V = inputs(6), weights(6), 100 * weights(60)
    both = replace(view(X, W, V), formats=(FMT, None))
    alone = fitted(AWQ(), view(X, W))
    assert torch.equal(fitted(AWQ(), both).factors, alone.factors)
    assert AWQ().fit(view(X, W, fmt=None)) is None
    assert AWQ().fit(replace(view(X, W), repeated=True)) is None


# In models


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_alone_moves_no_logit(family: str, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    with watching(AWQ) as seen:
        out = transformed(source, tmp_path / "out", AWQ(), Int(3, 32))
    assert moved(source, out) <= 1e-4
    factors = [answer.factors for _, answer in seen if answer is not None]
    assert sum(not torch.equal(s, torch.ones_like(s)) for s in factors) >= len(factors) / 2


@pytest.mark.parametrize("kv", [2, 4])
def test_values_are_left_alone_under_grouped_queries(kv: int, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", num_key_value_heads=kv)
    with watching(AWQ) as seen:
        out = transformed(source, tmp_path / "out", AWQ(), Int(3, 32))
    answered = {view.name for view, answer in seen if answer is not None}
    values = {f"model.layers.{i}.value" for i in range(3)}
    assert (answered & values) == (values if kv == 4 else set())
    before, after = tensors(source), tensors(out)
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3)]
    same = [torch.equal(before[name], after[name]) for name in names]
    assert all(same) if kv == 2 else not all(same)


def test_without_a_format_nothing_is_folded(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    out = transformed(source, tmp_path / "out", AWQ())
    before, after = tensors(source), tensors(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("solver", ["nearest", "awq-clip", "gptq"])
def test_scaling_rescues_weights_behind_loud_channels(solver: str, tmp_path: Path) -> None:
    source = planted("llama", tmp_path, 30)
    data = Calibration(str(write_text(tmp_path)), sequences=8, length=64)
    dense, errors = logits(source), {}
    solve = {"solver": solver, "schemes": {"*": INT4}}
    for name, stages in {"plain": (solve,), "awq": ({"transform": "awq"}, solve)}.items():
        recipe = write_recipe(tmp_path, *stages, name=name)
        out = rarefy.compress(source, recipe, tmp_path / name, calibration=data)
        errors[name] = float((logits(out.path) - dense).square().mean())
    assert errors["awq"] < 0.7 * errors["plain"]


# Clipping


def clipped_by_hand(W: torch.Tensor, X: torch.Tensor, fmt: Int) -> torch.Tensor:
    """Row by row, group by group, over the tokens themselves, in float64."""
    out = torch.empty_like(W)
    span = fmt.span or W.shape[1]
    for i in range(len(W)):
        for a in range(0, W.shape[1], span):
            w, x = W[i : i + 1, a : a + span], X[:, a : a + span]
            tried = []
            for step in range(10):
                c = (1 - step / 20) * float(w.abs().max())
                cut = w.clamp(-c, c)
                q = fmt.fit(cut).round(cut)
                tried.append((float((x @ (w - q).T).square().mean()), step, q))
            out[i, a : a + span] = min(tried)[2]
    return out


def problem(seed: int) -> tuple[Problem, torch.Tensor]:
    """Weights with a few large ones, which a good clip gives up."""
    X = inputs(seed, spread=0.5).double()
    g = torch.Generator().manual_seed(seed)
    W = weights(seed, 9).double()
    W[torch.rand(W.shape, generator=g) < 0.03] *= 3
    return Problem("layer", W, X.T @ X / len(X)), X


@pytest.mark.parametrize(
    "fmt", [Int(3, 16), Int(4, 20), Int(3), Int(4, 16, symmetric=True), Int(3, 16, rule="mse")]
)
def test_clipping_is_the_brute_force_over_all_tokens(fmt: Int) -> None:
    case, X = problem(0)
    found = AWQClip().solve(case, fmt)
    torch.testing.assert_close(found.weight, clipped_by_hand(case.weight, X, fmt), rtol=0, atol=0)
    assert torch.equal(fmt.decode(found.grid.encode(found.weight)), found.weight.float())


@pytest.mark.parametrize("fmt", [Int(3, 16), Int(4, 20), Int(3)])
def test_no_group_loses_by_clipping_and_many_win(fmt: Int) -> None:
    lower = groups = 0
    for seed in range(5):
        case, X = problem(seed)
        W, span = case.weight, fmt.span or N
        mine, plain = (solver.solve(case, fmt).weight for solver in (AWQClip(), Nearest()))
        for a in range(0, N, span):
            g = slice(a, a + span)
            losses = [(X[:, g] @ (W - Q)[:, g].T).square().sum(0) for Q in (mine, plain)]
            assert bool((losses[0] <= losses[1] * (1 + 1e-9)).all())
            lower += int((losses[0] < 0.99 * losses[1]).sum())
            groups += len(W)
    assert lower > groups / 4


def test_clipping_needs_groups_with_ranges() -> None:
    case, _ = problem(1)
    with pytest.raises(RarefyError, match=r"shrinks the range of every group"):
        AWQClip().solve(case, LowRank(rank=4))
