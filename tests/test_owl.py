"""OWL: the count of outliers, the spread, and the exact budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from layers import layer, recipe, supports, words
from tiny import save_tiny

import rarefy
from rarefy.allocate.base import Matrix, Share
from rarefy.allocate.owl import OWL

if TYPE_CHECKING:
    from pathlib import Path

OUTLIERS = (0.002, 0.05, 0.01, 0.02)


def block(seed: int, share: float) -> dict[str, Matrix]:
    """Two matrices; ``share`` of the weights is thirty times as large as the rest."""
    out = {}
    for i, (path, rows) in enumerate((("a", 30), ("b", 50))):
        case = layer(rows, 40, seed)
        g = torch.Generator().manual_seed(seed + i)
        loud = torch.rand(rows, 40, generator=g) < share
        out[path] = Matrix(case.weight * torch.where(loud, 30.0, 1.0), case.moments)
    return out


def blocks() -> list[dict[str, Matrix]]:
    return [block(b, share) for b, share in enumerate(OUTLIERS)]


def shares(density: float, *, equal: bool) -> list[dict[str, Share]]:
    rows = [30] * 4 if equal else [30, 60, 200, 10]
    return [{"a": Share(r, 40, density), "b": Share(50, 40, density)} for r in rows]


def test_outliers_are_counted_against_the_mean_of_the_whole_block() -> None:
    matrices = block(0, 0.02)
    A = torch.cat([(m.weight.abs() * m.moments.square.sqrt()).flatten() for m in matrices.values()])
    found = OWL().measure(matrices)
    assert int(found["a"] + found["b"]) == int((5 * A.mean() < A).sum()) > 0
    # Against its own mean, a loud matrix would have fewer outliers than it has.
    loud = {**matrices, "a": Matrix(matrices["a"].weight * 20, matrices["a"].moments)}
    assert int(OWL().measure(loud)["a"]) > int(found["a"])
    assert int(OWL().measure(loud)["b"]) < int(found["b"])


@pytest.mark.parametrize("lam", [0.04, 0.08])
@pytest.mark.parametrize("equal", [True, False])
def test_spread_and_budget(lam: float, equal: bool) -> None:
    allocator, table = OWL(lam=lam), shares(0.3, equal=equal)
    measures = [allocator.measure(b) for b in blocks()]
    found = allocator.spread(measures, table)
    budget = sum(s.weights * 0.3 for row in table for s in row.values())
    spent = sum(
        row[path] * s.weights for row, b in zip(found, table, strict=True) for path, s in b.items()
    )
    assert spent == pytest.approx(budget, rel=1e-9)
    densities = torch.tensor([row["a"] for row in found], dtype=torch.float64)
    assert float(densities.max() - densities.min()) == pytest.approx(2 * lam, rel=1e-9)
    assert all(row["a"] == row["b"] for row in found)
    sizes = torch.tensor([sum(s.weights for s in row.values()) for row in table])
    D = torch.tensor([float(m["a"] + m["b"]) for m in measures]) / sizes
    # Sparsity falls as outliers grow: Spearman's coefficient is -1.
    assert torch.equal((1 - densities).argsort(descending=True), D.argsort())


def test_equal_blocks_are_treated_alike() -> None:
    allocator, table = OWL(), shares(0.4, equal=True)
    same = [allocator.measure(block(0, 0.02))] * 4
    assert allocator.spread(same, table) == [dict.fromkeys("ab", pytest.approx(0.4))] * 4


def test_densities_are_cut_and_the_rest_is_shared_out() -> None:
    allocator, table = OWL(lam=0.3), shares(0.2, equal=True)
    found = allocator.spread([allocator.measure(b) for b in blocks()], table)
    densities = [row["a"] for row in found]
    assert min(densities) == pytest.approx(0.01)
    assert sum(densities) / 4 == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("options", [{"outlier": 0.0}, {"lam": 0.0}, {"lam": 0.6}])
def test_refuses_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OWL(**options)


def test_the_walk_prunes_what_was_allocated(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stage = {
        "solver": "nearest",  # the allocator alone needs data here
        "allocate": {"method": "owl"},
        "schemes": {"*": {"format": "sparse", "sparsity": 0.6, "scope": "matrix"}},
    }
    out = rarefy.compress(
        model, recipe(tmp_path, stage), tmp_path / "out", calibration=words(tmp_path)
    )
    masks = supports(out.path)
    by_block = [
        torch.cat([m.flatten() for n, m in masks.items() if f"layers.{b}." in n]).double().mean()
        for b in range(3)
    ]
    assert float(max(by_block) - min(by_block)) == pytest.approx(0.16, abs=1e-3)
    assert float(sum(by_block)) / 3 == pytest.approx(0.4, abs=1e-3)
