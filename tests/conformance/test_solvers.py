"""The contract of a solver: a better member of the format, the same for every order of the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from conformance.samples import registered_solvers, require_samples, solver_params
from rarefy.solvers.base import Problem, Solver, output_error
from rarefy.solvers.nearest import Nearest
from rarefy.statistics import Moments, MomentSums

if TYPE_CHECKING:
    from rarefy.formats.base import Format

ROWS, COLUMNS = 11, 50
LAYERS = 40
every_solver = pytest.mark.parametrize(("solver", "fmt"), solver_params())
every_calibrated_solver = pytest.mark.parametrize(("solver", "fmt"), solver_params(calibrated=True))


def layer(seed: int, dtype: torch.dtype = torch.float64) -> Problem:
    """A random matrix whose inputs are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=g, dtype=torch.float64)
    spectrum = torch.logspace(0, -1.5, COLUMNS, dtype=torch.float64)
    X = torch.randn(4 * COLUMNS, COLUMNS, generator=g, dtype=torch.float64) * spectrum @ mix
    X *= spectrum[torch.randperm(COLUMNS, generator=g)]
    W = torch.randn(ROWS, COLUMNS, generator=g, dtype=torch.float64)
    sums = MomentSums(COLUMNS, X.device)
    sums.add(X)
    return Problem("layer", W.to(dtype), (X.T @ X / len(X)).to(dtype), sums.moments())


def agree(fmt: Format, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, except where a decomposition's last bits depend on the arrangement."""
    if fmt.inner_width(*a.shape) is None:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", registered_solvers())
def test_has_samples(name: str) -> None:
    require_samples("solver", name)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_lies_in_the_format(solver: Solver, fmt: Format, dtype: torch.dtype) -> None:
    problem = layer(0, dtype)
    solution = solver.solve(problem, fmt)
    assert solution.weight.dtype == dtype
    assert solution.weight.shape == problem.weight.shape
    assert torch.isfinite(solution.weight).all()
    assert torch.equal(solution.grid.round(solution.weight), solution.weight)
    decoded = fmt.decode(solution.grid.encode(solution.weight))
    assert torch.equal(decoded, solution.weight.float())
    assert solution.notes == ()


@every_solver
def test_input_is_untouched_and_the_result_repeats(solver: Solver, fmt: Format) -> None:
    problem = layer(1, torch.float32)
    assert problem.gram is not None
    weight, gram = problem.weight.clone(), problem.gram.clone()
    first = solver.solve(problem, fmt).weight.clone()
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.gram, gram)
    assert torch.equal(solver.solve(problem, fmt).weight, first)


@every_calibrated_solver
def test_lowers_the_output_error(solver: Solver, fmt: Format) -> None:
    lower = 0
    for seed in range(LAYERS):
        problem = layer(seed)
        assert problem.gram is not None
        found, plain = (
            output_error(problem.weight, s.solve(problem, fmt).weight, problem.gram)
            for s in (solver, Nearest())
        )
        lower += found < plain
    assert lower >= 0.95 * LAYERS


@every_solver
def test_rows_are_solved_independently_of_their_order(solver: Solver, fmt: Format) -> None:
    problem = layer(2)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    whole = solver.solve(problem, fmt).weight
    permuted = solver.solve(replace(problem, weight=problem.weight[order]), fmt).weight
    assert agree(fmt, permuted, whole[order])


@every_solver
def test_some_rows_alone_give_the_same_rows(solver: Solver, fmt: Format) -> None:
    if not fmt.rows_independent:
        pytest.skip("rows share a budget or a basis")
    problem = layer(4)
    whole = solver.solve(problem, fmt)
    part = solver.solve(replace(problem, weight=problem.weight[2:7]), fmt)
    assert torch.equal(part.weight, whole.weight[2:7])
    assert torch.equal(whole.grid.rows(2, 7).round(part.weight), part.weight)


@every_solver
@pytest.mark.parametrize("factor", [2.0, 7.3e-6, 7.3e6])
def test_the_unit_of_the_inputs_does_not_matter(solver: Solver, fmt: Format, factor: float) -> None:
    problem = layer(5)
    assert problem.gram is not None
    assert problem.moments is not None
    seen, unit = problem.moments, factor**0.5
    moments = Moments(
        seen.mean * unit, seen.square * factor, seen.size * unit, seen.peak * unit, seen.tokens
    )
    scaled = replace(problem, gram=problem.gram * factor, moments=moments)
    assert agree(fmt, solver.solve(scaled, fmt).weight, solver.solve(problem, fmt).weight)
