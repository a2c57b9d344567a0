"""The contract of an allocator: the exact budget, whatever the order of the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.allocate.alphapruning import AlphaPruning
from rarefy.allocate.base import (
    ALLOCATORS,
    DensityAllocator,
    Matrix,
    Offer,
    Share,
    WidthAllocator,
)
from rarefy.allocate.fisher import Fisher
from rarefy.allocate.global_magnitude import GlobalMagnitude
from rarefy.allocate.owl import OWL
from rarefy.allocate.truncation import Truncation
from rarefy.statistics import MomentSums

# A new allocator adds its instances here.
SAMPLES: dict[str, list[DensityAllocator]] = {
    "alphapruning": [AlphaPruning(), AlphaPruning(0.5, "mid")],
    "owl": [OWL(), OWL(3.0, 0.2)],
    "global-magnitude": [GlobalMagnitude()],
    "truncation": [Truncation(), Truncation(0.0)],
}
WIDTHS: dict[str, list[WidthAllocator]] = {"fisher": [Fisher(), Fisher((3, 4, 8))]}
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
    allocator: DensityAllocator, density: float
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Share]]]:
    blocks = [block(i) for i in range(len(PRESENT))]
    shares = [{p: Share(*m.weight.shape, density) for p, m in b.items()} for b in blocks]
    return [allocator.measure(b) for b in blocks], shares


@pytest.mark.parametrize("name", [card.name for card in ALLOCATORS])
def test_has_samples(name: str) -> None:
    if not SAMPLES.get(name) and not WIDTHS.get(name):
        pytest.fail(
            f"add samples for the allocator {name!r} to SAMPLES or WIDTHS in "
            "tests/conformance/test_allocators.py"
        )


@every_allocator
@every_density
def test_meets_the_budget_with_usable_densities(
    allocator: DensityAllocator, density: float
) -> None:
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
def test_order_of_the_blocks_does_not_matter(allocator: DensityAllocator, density: float) -> None:
    measures, shares = problem(allocator, density)
    table = allocator.spread(measures, shares)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        other = allocator.spread([measures[i] for i in order], [shares[i] for i in order])
        for row, i in zip(other, order, strict=True):
            assert row == {p: pytest.approx(d, rel=1e-9) for p, d in table[i].items()}


@every_allocator
def test_measuring_repeats_and_changes_nothing(allocator: DensityAllocator) -> None:
    matrices = block(2)
    before = {p: m.weight.clone() for p, m in matrices.items()}
    first, second = allocator.measure(matrices), allocator.measure(matrices)
    assert all(torch.equal(first[p], second[p]) for p in matrices)
    assert all(torch.equal(m.weight, before[p]) for p, m in matrices.items())
    _, shares = problem(allocator, 0.5)
    tables = [allocator.spread(problem(allocator, 0.5)[0], shares) for _ in range(2)]
    assert tables[0] == tables[1]


@every_allocator
def test_measures_depend_on_nothing_but_what_is_needed(allocator: DensityAllocator) -> None:
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


every_width_allocator = pytest.mark.parametrize(
    "allocator", [pytest.param(a, id=f"{n} {i}") for n in WIDTHS for i, a in enumerate(WIDTHS[n])]
)


def offers(allocator: WidthAllocator, given: int) -> dict[str, Offer]:
    """Matrices of many sizes and sensitivities; damage falls by a factor of about 4 a bit."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for i in range(24):
        weights = 1000 * (1 + i % 5)
        sensitivity = float(torch.randn(1, generator=g).mul(1.5).exp())
        bits = torch.tensor(allocator.bits, dtype=torch.float64)
        damage = weights * sensitivity * 4.0**-bits * (1 + 0.2 * torch.rand(len(bits), generator=g))
        found[f"m{i}"] = Offer(bits * weights / 8, damage, given * weights / 8)
    return found


def taken(allocator: WidthAllocator, of: dict[str, Offer], bits: dict[str, int]) -> list[float]:
    """Bytes and damage in all."""
    at = {name: allocator.bits.index(bits[name]) for name in of}
    return [
        sum(float(o.bytes[at[n]]) for n, o in of.items()),
        sum(float(o.damage[at[n]]) for n, o in of.items()),
    ]


@every_width_allocator
@pytest.mark.parametrize("given", [4, 5])
def test_widths_fill_the_budget_and_never_exceed_it(allocator: WidthAllocator, given: int) -> None:
    of = offers(allocator, given)
    size, damage = taken(allocator, of, allocator.choose(of))
    budget = sum(offer.given for offer in of.values())
    assert 0.97 * budget < size <= budget
    even = dict.fromkeys(of, max(b for b in allocator.bits if b <= given))
    assert damage < taken(allocator, of, even)[1]


@every_width_allocator
def test_widths_do_not_depend_on_the_order_and_repeat(allocator: WidthAllocator) -> None:
    of = offers(allocator, 4)
    found = allocator.choose(of)
    assert allocator.choose(of) == found
    assert allocator.choose(dict(reversed(of.items()))) == found


@every_width_allocator
def test_more_damage_never_means_fewer_bits(allocator: WidthAllocator) -> None:
    of = offers(allocator, 4)
    found = allocator.choose(of)
    for name, offer in of.items():
        worse = of | {name: Offer(offer.bytes, 8 * offer.damage, offer.given)}
        assert allocator.choose(worse)[name] >= found[name]
