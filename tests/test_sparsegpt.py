"""SparseGPT against an independent reference, its energy identity, and bounds on its error.

The reference is optimal brain surgeon with explicit inverses: every pivot is that of the inverse of
the trailing submatrix, and masks are chosen by sorting in plain Python.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from layers import layer

import rarefy.solvers.sparsegpt as module
from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.sparse import Sparse
from rarefy.solvers.base import Problem, output_error
from rarefy.solvers.nearest import Nearest
from rarefy.solvers.sparsegpt import SparseGPT
from rarefy.solvers.wanda import Wanda

if TYPE_CHECKING:
    from rarefy.solvers.sweep import Swept

F32 = Float("float32")
ROWS, COLUMNS = 24, 192  # one chunk of 128 columns, and one of 64
MATRIX = Sparse(0.5, scope="matrix", values=F32)
PATTERN = Sparse(kept=2, of=4, values=F32)


def damped(case: Problem, damping: float = 0.01) -> torch.Tensor:
    assert case.gram is not None
    H = case.gram.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def error(case: Problem, found: torch.Tensor) -> float:
    assert case.gram is not None
    return output_error(case.weight.double(), found.double(), case.gram.double())


def trailing_pivots(H: torch.Tensor) -> torch.Tensor:
    """``[(H_{i:, i:})^-1]_{ii}`` for each i."""
    return torch.stack([torch.linalg.inv(H[i:, i:])[0, 0] for i in range(len(H))])


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` lowest entries of a matrix."""
    flat = sorted(range(scores.numel()), key=lambda i: float(scores.flatten()[i]))[:count]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[flat] = True
    return mask.reshape(scores.shape)


def choose(live: torch.Tensor, pivots: torch.Tensor, fmt: Sparse) -> torch.Tensor:
    """What to prune of a chunk: the lowest ``w^2 / U_jj^2``."""
    scores = live.square() / pivots
    if fmt.of is None:
        return lowest(scores, int(fmt.sparsity * scores.numel()))
    return torch.cat([lowest(row.unsqueeze(0), fmt.of - (fmt.kept or 0)) for row in scores])


def reference(case: Problem, fmt: Sparse, *, frozen: bool = False) -> torch.Tensor:
    """Prune column by column; ``frozen`` chooses all masks on the dense weights beforehand."""
    H, W = damped(case), case.weight.double().clone()
    dense, Q = W.clone(), torch.zeros_like(W)
    n, chunk = W.shape[1], fmt.of or 128
    pivots, inverse = trailing_pivots(H), torch.linalg.inv(H)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for j in range(n):
        if j % chunk == 0:
            span = slice(j, min(j + chunk, n))
            live = dense if frozen else W
            pruned[:, span] = choose(live[:, span], pivots[span], fmt)
        q = W[:, j].masked_fill(pruned[:, j], 0)
        pivot = inverse[j, j].clone()
        assert abs(float(pivot / pivots[j]) - 1) < 1e-6
        W[:, j + 1 :] -= torch.outer((W[:, j] - q) / pivot, inverse[j, j + 1 :])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / pivot
        Q[:, j] = q
    return Q


@pytest.mark.parametrize("fmt", [MATRIX, PATTERN, Sparse(kept=3, of=6, values=F32)])
def test_equals_the_reference(fmt: Sparse) -> None:
    case = layer(6, COLUMNS)
    found, expected = SparseGPT().solve(case, fmt).weight, reference(case, fmt)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", [MATRIX, PATTERN])
def test_masks_follow_the_live_weights(fmt: Sparse) -> None:
    better = 0
    for seed in range(6):
        case = layer(6, COLUMNS, seed)
        found, frozen = SparseGPT().solve(case, fmt).weight, reference(case, fmt, frozen=True)
        # The first chunk is chosen on dense weights either way, later ones are not.
        chunk = fmt.of or 128
        assert torch.equal(found[:, :chunk] == 0, frozen[:, :chunk] == 0)
        assert not torch.equal(found == 0, frozen == 0)
        better += error(case, found) < error(case, frozen)
    assert better >= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fmt", [MATRIX, PATTERN, Sparse(0.5, values=Int(4)), Sparse(kept=2, of=4, values=Int(3, 16))]
)
def test_the_energy_of_the_sweep_is_the_loss(
    fmt: Sparse, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Swept] = []
    inner = module.sweep

    def watched(*args: object) -> Swept:
        seen.append(inner(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(module, "sweep", watched)
    case = layer(ROWS, COLUMNS, dtype=dtype)
    found = SparseGPT().solve(case, fmt).weight
    D = (case.weight - found).double()
    loss = float(torch.trace(D @ damped(case) @ D.T))
    assert seen[0].energy == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_every_chunk_has_the_sparsity_and_rows_vary(sparsity: float) -> None:
    fmt = replace(MATRIX, sparsity=sparsity)
    zeros = SparseGPT().solve(layer(ROWS, COLUMNS), fmt).weight == 0
    for part in (zeros[:, :128], zeros[:, 128:]):
        assert abs(float(part.double().mean()) - sparsity) <= 1 / part.numel() + 1e-12
    assert zeros.double().mean(1).std() > 0
    assert int(zeros.sum()) == int(sparsity * zeros.numel() + 1e-6)


def test_the_scope_row_gives_every_row_the_same_count() -> None:
    zeros = SparseGPT().solve(layer(ROWS, COLUMNS), Sparse(0.6, values=F32)).weight == 0
    assert (zeros.sum(1) == int(0.6 * COLUMNS)).all()


def test_a_pattern_holds_in_every_group() -> None:
    found = SparseGPT().solve(layer(ROWS, COLUMNS), PATTERN).weight
    assert (found.reshape(-1, 4).ne(0).sum(1) == 2).all()


def test_almost_every_kept_weight_moves() -> None:
    # The first column has nothing to make up for; it must be a small part of all.
    case = layer(ROWS, 576, dtype=torch.float32)
    found = SparseGPT().solve(case, MATRIX).weight
    kept = found != 0
    assert (found != case.weight)[kept].float().mean() > 0.99


def least_squares(case: Problem, mask: torch.Tensor) -> float:
    """Relative error of the best weights on a mask, in closed form row by row."""
    assert case.gram is not None
    H, W = case.gram.double(), case.weight.double()
    lost = 0.0
    for w, on in zip(W, mask, strict=True):
        off = ~on
        schur = H[off][:, off] - H[off][:, on] @ torch.linalg.solve(H[on][:, on], H[on][:, off])
        lost += float(w[off] @ schur @ w[off])
    return lost / float(((W @ H) * W).sum())


@pytest.mark.parametrize("fmt", [MATRIX, PATTERN])
def test_error_is_below_the_baselines_and_above_least_squares(fmt: Sparse) -> None:
    lower = 0
    for seed in range(20):
        case = layer(ROWS, COLUMNS, seed)
        found = SparseGPT().solve(case, fmt).weight
        ours = error(case, found)
        others = [error(case, s.solve(case, fmt).weight) for s in (Nearest(), Wanda())]
        lower += ours < min(others)
        assert ours >= least_squares(case, found != 0)
    assert lower >= 19


@pytest.mark.parametrize("values", [Int(4), Int(3)])
def test_joint_quantization_beats_pruning_and_then_rounding(values: Int) -> None:
    better = 0
    for seed in range(10):
        case = layer(ROWS, COLUMNS, seed, torch.float32)
        joint = SparseGPT().solve(case, replace(MATRIX, values=values))
        assert joint.grid.support is not None
        assert not joint.weight[~joint.grid.support].any()
        assert int((~joint.grid.support).sum()) == joint.weight.numel() // 2
        assert max(len(row.unique()) for row in joint.weight) <= 2**values.bits
        pruned = SparseGPT().solve(case, MATRIX)
        then = Nearest().solve(
            Problem("layer", pruned.weight, support=pruned.grid.support),
            replace(MATRIX, values=values),
        )
        better += error(case, joint.weight) < error(case, then.weight)
    assert better == 10


@pytest.mark.parametrize("fmt", [MATRIX, Sparse(0.5, values=F32), PATTERN])
def test_a_support_of_an_earlier_stage_stays_and_the_rest_makes_up(fmt: Sparse) -> None:
    case = layer(ROWS, COLUMNS)
    earlier = Wanda().solve(case, fmt).grid.support
    assert earlier is not None
    imposed = replace(case, weight=case.weight * earlier, support=earlier)
    joint = replace(fmt, values=Int(3))
    found, plain = (s.solve(imposed, joint) for s in (SparseGPT(), Nearest()))
    assert torch.equal(found.grid.support, earlier)
    assert not found.weight[~earlier].any()
    assert error(imposed, found.weight) < error(imposed, plain.weight)


def test_dead_columns_are_pruned() -> None:
    case = layer(ROWS, COLUMNS)
    assert case.gram is not None
    gram = case.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    found = SparseGPT().solve(replace(case, gram=gram), MATRIX)
    assert not found.weight[:, 5].any()
    assert found.notes == ()


def test_a_hopeless_hessian_is_reported() -> None:
    case = layer(ROWS, COLUMNS)
    gram = torch.full((COLUMNS, COLUMNS), -3.0, dtype=torch.float64).fill_diagonal_(1.0)
    found = SparseGPT().solve(replace(case, gram=gram), MATRIX)
    assert len(found.notes) == 1
    assert int((found.weight == 0).sum()) == ROWS * COLUMNS // 2


@pytest.mark.parametrize("fmt", [MATRIX, PATTERN], ids=Sparse.label)
def test_refitting_goes_down_to_least_squares_and_keeps_the_mask(fmt: Sparse) -> None:
    case = layer(ROWS, COLUMNS, seed=5)
    plain, few, many = (
        SparseGPT(damping=1e-6, refit=steps).solve(case, fmt).weight for steps in (0, 4, 400)
    )
    assert torch.equal(few != 0, plain != 0)
    assert torch.equal(many != 0, plain != 0)
    bound = least_squares(case, plain != 0)
    assert bound <= error(case, many) <= 1.001 * bound
    assert error(case, many) < error(case, few) < error(case, plain)


def test_refitting_never_makes_coarse_values_worse() -> None:
    for seed in range(6):
        case = layer(ROWS, COLUMNS, seed=seed)
        fmt = Sparse(0.5, scope="matrix", values=Int(3, group=32))
        plain, refitted = (SparseGPT(refit=n).solve(case, fmt).weight for n in (0, 8))
        assert error(case, refitted) <= error(case, plain)
