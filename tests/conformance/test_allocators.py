"""The contract of an allocator: the exact budget, whatever the order of the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.allocate.alphapruning import AlphaPruning
from rarefy.allocate.base import ALLOCATORS, Allocator, Matrix, Share
from rarefy.allocate.global_magnitude import GlobalMagnitude
from rarefy.allocate.owl import OWL
from rarefy.allocate.truncation import Truncation
from rarefy.statistics import MomentSums

# A new allocator adds its instances here.
SAMPLES: dict[str, list[Allocator]] = {
    "alphapruning": [AlphaPruning(), AlphaPruning(0.5, "mid")],
    "owl": [OWL(), OWL(3.0, 0.2)],
    "global-magnitude": [GlobalMagnitude()],
    "truncation": [Truncation(), Truncation(0.0)],
}
# Block 3 lacks a matrix, block 4 is left alone by the recipe.
SHAPES = {"a": (24, 40), "b": (48, 24), "c": (16, 16)}
PRESENT = ("abc", "abc", "abc", "ac", "", "abc")
DENSITIES = (0.25, 0.5, 0.8)

every_allocator = pytest.mark.parametrize(
    "allocator", [pytest.param(a, id=f"{n} {i}") for n in SAMPLES for i, a in enumerate(SAMPLES[n])]
)
every_density = pytest.mark.parametrize("density", DENSITIES)


def block(index: int) -> dict[str, Matrix]:
    g = torch.Generator().manual_seed(index)
    out = {}
    for path in PRESENT[index]:
        m, n = SHAPES[path]
        scale = torch.logspace(0, -0.3 * index, n)
        W = torch.randn(m, n, generator=g) * scale * (1 + index)
        W *= torch.where(torch.rand(m, n, generator=g) < 0.01 * (index + 1), 10.0, 1.0)
        X = torch.randn(4 * n, n, generator=g) * torch.rand(n, generator=g)
        sums = MomentSums(n, X.device)
        sums.add(X)
        out[path] = Matrix(W, sums.moments(), X.T @ X / len(X))
    return out


def problem(
    allocator: Allocator, density: float
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Share]]]:
    blocks = [block(i) for i in range(len(PRESENT))]
    shares = [{p: Share(*m.weight.shape, density) for p, m in b.items()} for b in blocks]
    return [allocator.measure(b) for b in blocks], shares


@pytest.mark.parametrize("name", [card.name for card in ALLOCATORS])
def test_has_samples(name: str) -> None:
    if not SAMPLES.get(name):
        pytest.fail(
            f"add samples for the allocator {name!r} to SAMPLES in "
            "tests/conformance/test_allocators.py"
        )


@every_allocator
@every_density
def test_meets_the_budget_with_usable_densities(allocator: Allocator, density: float) -> None:
    measures, shares = problem(allocator, density)
    table = allocator.spread(measures, shares)
    assert [row.keys() for row in table] == [row.keys() for row in shares]
    pairs = [(s, table[b][path]) for b, row in enumerate(shares) for path, s in row.items()]
    spent = sum(s.weights * d for s, d in pairs)
    assert spent == pytest.approx(sum(s.weights * s.density for s, _ in pairs), rel=1e-6)
    assert all(0 < d <= 1 for _, d in pairs)
    assert all(type(d) is float for _, d in pairs)  # goes into the journal
    # Otherwise there would be no use for it.
    assert max(d for _, d in pairs) - min(d for _, d in pairs) > 0.02


@every_allocator
@every_density
def test_order_of_the_blocks_does_not_matter(allocator: Allocator, density: float) -> None:
    measures, shares = problem(allocator, density)
    table = allocator.spread(measures, shares)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        other = allocator.spread([measures[i] for i in order], [shares[i] for i in order])
        for row, i in zip(other, order, strict=True):
            assert row == {p: pytest.approx(d, rel=1e-9) for p, d in table[i].items()}


@every_allocator
def test_measuring_repeats_and_changes_nothing(allocator: Allocator) -> None:
    matrices = block(2)
    before = {p: m.weight.clone() for p, m in matrices.items()}
    first, second = allocator.measure(matrices), allocator.measure(matrices)
    assert all(torch.equal(first[p], second[p]) for p in matrices)
    assert all(torch.equal(m.weight, before[p]) for p, m in matrices.items())
    _, shares = problem(allocator, 0.5)
    tables = [allocator.spread(problem(allocator, 0.5)[0], shares) for _ in range(2)]
    assert tables[0] == tables[1]


@every_allocator
def test_measures_depend_on_nothing_but_what_is_needed(allocator: Allocator) -> None:
    full = block(1)
    bare: dict[str, Any] = {
        p: Matrix(
            m.weight,
            m.moments if "moments" in allocator.needs else None,
            m.gram if "gram" in allocator.needs else None,
        )
        for p, m in full.items()
    }
    with_all, without = allocator.measure(full), allocator.measure(bare)
    assert all(torch.equal(with_all[p], without[p]) for p in full)
