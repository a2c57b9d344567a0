"""GPTQ against an independent reference and its exact identities, in fp64.

The reference below is optimal brain surgeon as the paper derives it: the explicit inverse of the
damped H, one column at a time, each column eliminated from the inverse after use. It shares no
code with the solver but the format's grids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch

from rarefy.formats.integer import Int
from rarefy.solvers.base import Problem
from rarefy.solvers.factor import inverse_factor
from rarefy.solvers.gptq import GPTQ
from rarefy.solvers.nearest import Nearest

if TYPE_CHECKING:
    from rarefy.formats.base import Grid

DAMPING = 0.03
SHAPES = {"even": (9, 48), "ragged": (9, 53), "wide rows": (40, 16)}
FORMATS = {
    "row": Int(3),
    "group": Int(3, 16),
    "small groups": Int(4, 5),
    "symmetric": Int(4, 16, symmetric=True),
    "mse": Int(2, 16, rule="mse"),
}


def problem(rows: int = 9, columns: int = 53, seed: int = 0) -> Problem:
    """Correlated inputs whose sizes differ by a factor of thirty."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    spectrum = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    X = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64) * spectrum @ mix
    W = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return Problem("layer", W, X.T @ X / len(X))


def gram_of(case: Problem) -> torch.Tensor:
    assert case.gram is not None
    return case.gram


def damped(H: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def visiting_order(H: torch.Tensor, solver: GPTQ, span: int | None) -> list[int]:
    """What the documentation promises, in plain Python."""
    score = H.diagonal().tolist()
    n = len(score)
    if not solver.activation_order:
        return list(range(n))
    if solver.static_groups or span is None:
        return sorted(range(n), key=lambda j: -score[j])
    groups = [list(range(a, min(a + span, n))) for a in range(0, n, span)]
    groups.sort(key=lambda group: -sum(score[j] for j in group) / len(group))
    return [j for group in groups for j in sorted(group, key=lambda j: -score[j])]


@dataclass
class Swept:
    weight: torch.Tensor  # [m, n]
    errors: torch.Tensor  # E, [m, n], columns in sweep order
    order: list[int]


def reference(case: Problem, fmt: Int, solver: GPTQ) -> Swept:
    H = gram_of(case)
    W, Q = case.weight.clone(), torch.zeros_like(case.weight)
    n, span = W.shape[1], fmt.span or W.shape[1]
    order = visiting_order(H, solver, fmt.span)
    fixed = fmt.fit(case.weight, H.diagonal().sqrt()) if solver.static_groups else None
    live: dict[int, Grid] = {}
    inverse = torch.linalg.inv(damped(H, solver.damping))
    errors = torch.zeros_like(W)
    for step, j in enumerate(order):
        if fixed is not None:
            q = fixed.round(W[:, j : j + 1], j)[:, 0]
        else:
            group = slice(j // span * span, min(j // span * span + span, n))
            if group.start not in live:
                live[group.start] = fmt.fit(W[:, group], H.diagonal().sqrt()[group])
            q = live[group.start].round(W[:, j : j + 1], j - group.start)[:, 0]
        Q[:, j] = q
        pivot = inverse[j, j].clone()
        error = W[:, j] - q
        errors[:, step] = error / pivot.sqrt()
        rest = order[step + 1 :]
        W[:, rest] -= torch.outer(error / pivot, inverse[j, rest])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / pivot
    return Swept(Q, errors, order)


SOLVERS = [
    GPTQ(DAMPING, activation_order=order, static_groups=static, block=7)
    for order in (False, True)
    for static in (False, True)
]
every_solver = pytest.mark.parametrize(
    "solver", SOLVERS, ids=lambda s: f"order={s.activation_order} static={s.static_groups}"
)
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_solver
@every_format
@every_shape
def test_equals_the_reference(solver: GPTQ, fmt: Int, shape: tuple[int, int]) -> None:
    case = problem(*shape)
    found = solver.solve(case, fmt)
    assert torch.equal(found.weight, reference(case, fmt, solver).weight)
    # Error compensation did something, so that equality means something.
    assert not torch.equal(found.weight, Nearest().solve(case, fmt).weight)


@every_solver
@every_format
def test_error_is_the_swept_errors_times_the_factor(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    swept = reference(case, fmt, solver)
    found = solver.solve(case, fmt).weight
    H = damped(gram_of(case))
    U = torch.linalg.cholesky(torch.linalg.inv(H[swept.order][:, swept.order]), upper=True)
    delta = case.weight - found
    product = swept.errors @ U
    assert (product - delta[:, swept.order]).abs().max() < 1e-10 * delta.abs().max()
    loss = torch.trace(delta @ H @ delta.T)
    assert abs(loss / swept.errors.square().sum() - 1) < 1e-10


@pytest.mark.parametrize("columns", [1, 2, 53, 256, 700])
def test_factor_is_that_of_the_inverse(columns: int) -> None:
    H = gram_of(problem(columns=columns))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    alive = torch.zeros(columns, dtype=torch.bool)
    U = inverse_factor(H, alive, order, float(DAMPING * H.diagonal().mean()))
    assert U is not None
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    inverse = torch.linalg.inv(damped(H))[order][:, order]
    assert torch.allclose(U.T @ U, inverse, rtol=1e-9, atol=1e-12 * float(inverse.abs().max()))


@every_solver
@every_format
def test_block_size_changes_nothing(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    results = [replace(solver, block=block).solve(case, fmt) for block in (1, 7, 32, 1000)]
    for other in results[1:]:
        assert torch.equal(other.weight, results[0].weight)
        packed = [r.grid.encode(r.weight)["weight_packed"] for r in (other, results[0])]
        assert torch.equal(*packed)


@every_solver
@every_format
@pytest.mark.parametrize("factor", [2.0, 3.7e-5, 1e6])
def test_scaling_the_hessian_changes_nothing(solver: GPTQ, fmt: Int, factor: float) -> None:
    case = problem()
    scaled = replace(case, gram=gram_of(case) * factor)
    assert torch.equal(solver.solve(scaled, fmt).weight, solver.solve(case, fmt).weight)


@every_solver
@every_format
def test_diagonal_hessian_is_plain_rounding(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    case = replace(case, gram=gram_of(case).diagonal().diag())
    # The range search sees the inputs' RMS in GPTQ, so that plain rounding gets it too.
    grid = fmt.fit(case.weight, gram_of(case).diagonal().sqrt())
    assert torch.equal(solver.solve(case, fmt).weight, grid.round(case.weight))


@pytest.mark.parametrize("fmt", [Int(3), Int(3, 16), Int(2, 5, symmetric=True)])
def test_static_groups_have_one_grid_for_every_order(fmt: Int) -> None:
    case = problem()
    free, ordered = (
        GPTQ(activation_order=order, static_groups=True).solve(case, fmt) for order in (False, True)
    )
    plain = fmt.fit(case.weight)
    a, b, c = (grid.encode(case.weight) for grid in (free.grid, ordered.grid, plain))
    for suffix in a.keys() - {"weight_packed"}:
        assert torch.equal(a[suffix], b[suffix])
        assert torch.equal(a[suffix], c[suffix])
    assert not torch.equal(free.weight, ordered.weight)


# Inputs that never fire


@every_solver
@pytest.mark.parametrize("fmt", [Int(3), Int(3, symmetric=True)])
def test_dead_columns_become_zero_and_disturb_nothing(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    dead = torch.tensor([0, 17, 18, 52])
    alive = torch.tensor([j for j in range(53) if j not in dead])
    gram = gram_of(case).clone()
    gram[dead], gram[:, dead] = 0, 0
    weight = case.weight.clone()
    weight[:, dead] = 100  # must not widen the range of the row either
    found = solver.solve(Problem("layer", weight, gram), fmt).weight
    smaller = Problem("layer", case.weight[:, alive], gram[alive][:, alive])
    assert not found[:, dead].any()
    assert torch.equal(found[:, alive], solver.solve(smaller, fmt).weight)


@every_solver
@every_format
def test_a_whole_group_of_dead_columns(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    gram = gram_of(case).clone()
    gram[16:32], gram[:, 16:32] = 0, 0
    found = solver.solve(replace(case, gram=gram), fmt)
    assert not found.weight[:, 16:32].any()
    assert torch.isfinite(found.weight).all()
    assert torch.equal(found.grid.round(found.weight), found.weight)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_all_zero(solver: GPTQ, dtype: torch.dtype) -> None:
    W = torch.randn(4, 20, dtype=dtype)
    found = solver.solve(Problem("layer", W, torch.zeros(20, 20, dtype=dtype)), Int(4, 8))
    assert not found.weight.any()


# Hessians that are not positive definite


def indefinite(by: float) -> Problem:
    """A Hessian whose least eigenvalue is ``-by`` times the mean of its diagonal."""
    case = problem()
    values, vectors = torch.linalg.eigh(gram_of(case))
    n = len(values)
    values[0] = -by * values[1:].sum() / (n + by)
    gram = vectors * values @ vectors.T
    assert abs(float(values[0]) / (-by * float(gram.diagonal().mean())) - 1) < 1e-9
    assert (gram.diagonal() > 0).all()
    return replace(case, gram=(gram + gram.T) / 2)


@every_solver
@pytest.mark.parametrize(("by", "used"), [(0.02, 0.02 * 1.2), (0.05, 0.1), (0.5, 1.0)])
def test_damping_climbs_until_the_hessian_is_definite(solver: GPTQ, by: float, used: float) -> None:
    case, fmt = indefinite(by), Int(3, 16)
    start = used if by == 0.02 else 0.01
    found = replace(solver, damping=start).solve(case, fmt)
    enough = replace(solver, damping=used).solve(case, fmt)
    assert torch.equal(found.weight, enough.weight)
    assert enough.notes == ()
    assert bool(found.notes) == (start != used)
    assert all("layer" in note and "damping was raised" in note for note in found.notes)
    assert torch.equal(found.grid.round(found.weight), found.weight)


@every_solver
@every_format
def test_a_hopeless_hessian_ends_in_rounding_and_says_so(solver: GPTQ, fmt: Int) -> None:
    case = problem()
    gram = torch.full_like(gram_of(case), -3.0)
    gram.fill_diagonal_(1.0)
    found = solver.solve(replace(case, gram=gram), fmt)
    assert torch.equal(found.weight, Nearest().solve(case, fmt).weight)
    assert len(found.notes) == 1
    assert "rounded to nearest" in found.notes[0]


def test_rank_deficient_hessian_needs_no_fallback() -> None:
    case = problem(columns=48)
    X = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    case = Problem("layer", case.weight.float(), X.T @ X / 5)
    found = GPTQ().solve(case, Int(3, 16))
    assert found.notes == ()
    assert torch.isfinite(found.weight).all()


@every_solver
@pytest.mark.parametrize("fmt", [Int(3), Int(3, 16)])
def test_a_single_column_is_rounded(solver: GPTQ, fmt: Int) -> None:
    case = problem(columns=1)
    assert torch.equal(solver.solve(case, fmt).weight, Nearest().solve(case, fmt).weight)


@pytest.mark.parametrize("options", [{"damping": -0.1}, {"block": 0}])
def test_refuses_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GPTQ(**options)
