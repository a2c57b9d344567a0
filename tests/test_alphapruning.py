"""AlphaPruning: the estimate on planted spectra, its invariances, and the exact budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from layers import recipe, supports, words
from tiny import save_tiny

import rarefy
from rarefy.allocate.alphapruning import AlphaPruning, alpha, spectrum
from rarefy.allocate.base import Matrix, Share
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

TAILS = ("peak", "mid")
every_tail = pytest.mark.parametrize("tail", TAILS)


def pareto(exponent: float, n: int = 2000, seed: int = 0) -> torch.Tensor:
    """Ascending sample of the density ``x^-exponent`` on x > 1."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (u ** (-1 / (exponent - 1))).sort().values


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def rotation(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, n, seed)).Q


@every_tail
@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_finds_a_planted_exponent(tail: str, exponent: float) -> None:
    estimates = [alpha(pareto(exponent, seed=seed), tail) for seed in range(5)]
    assert sum(abs(e / exponent - 1) < 0.05 for e in estimates) >= 4
    assert abs(sum(estimates) / 5 / exponent - 1) < 0.05


def test_the_median_tail_is_hills_formula() -> None:
    values = pareto(3.0, n=11)
    tail = values[5:]
    expected = 1 + 6 / float((tail / tail[0]).log().sum())
    assert alpha(values, "mid") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_peak_tail_fits_best_among_the_values_near_the_mode(seed: int) -> None:
    values = spectrum(gaussian(60, 90, seed))
    counts = torch.histc(values.log10(), 100)
    edges = torch.linspace(float(values[0].log10()), float(values[-1].log10()), 101)
    mode = 10 ** float(edges[int(counts.argmax())])
    fits = {}
    for i in range(59):
        if 0.95 * mode <= values[i] <= 1.5 * mode:
            tail = values[i:]
            a = 1 + len(tail) / float((tail / tail[0]).log().sum())
            rank = torch.arange(len(tail), dtype=torch.float64) / len(tail)
            fits[float((1 - (tail / tail[0]) ** (1 - a) - rank).abs().max())] = a
    assert len(fits) > 1
    assert alpha(values) == pytest.approx(fits[min(fits)], rel=1e-9)


@every_tail
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_unit_and_basis_of_the_weights_do_not_matter(tail: str, shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    plain = alpha(spectrum(W), tail)
    turned = rotation(shape[0], 1) @ W @ rotation(shape[1], 2)
    for other in (W * 1e-4, W * 37, turned, W.T):
        assert alpha(spectrum(other), tail) == pytest.approx(plain, rel=1e-6)


def test_the_spectrum_is_that_of_the_singular_values() -> None:
    for W in (gaussian(30, 50), gaussian(50, 30)):
        expected = torch.linalg.svdvals(W).square().flip(0)
        assert torch.allclose(spectrum(W), expected, rtol=1e-9)
    low = gaussian(30, 4) @ gaussian(4, 50)
    assert len(spectrum(low)) == 4


def test_matrices_without_a_spectrum_have_an_alpha() -> None:
    for W in (torch.zeros(5, 5), torch.eye(6), torch.ones(4, 4)):
        assert alpha(spectrum(W)) > 0


def heavy(seed: int, exponent: float) -> torch.Tensor:
    """A matrix [40, 60] whose squared singular values follow a power law."""
    values = pareto(exponent, 40, seed)
    return rotation(40, seed) * values.sqrt() @ rotation(60, seed + 1)[:40]


EXPONENTS = (2.0, 5.0, 1.6, 3.0, 9.0)
SIZES = ((40, 60), (40, 60), (40, 60), (40, 60), (40, 60))


def measured(allocator: AlphaPruning) -> list[dict[str, torch.Tensor]]:
    return [
        allocator.measure({"a": Matrix(heavy(b, e)), "b": Matrix(heavy(b + 50, e))})
        for b, e in enumerate(EXPONENTS)
    ]


def shares(density: float) -> list[dict[str, Share]]:
    sizes = [(40, 60), (40, 60), (80, 60), (40, 60), (20, 60)]
    return [{"a": Share(*size, density), "b": Share(40, 60, density)} for size in sizes]


def spent(densities: list[dict[str, float]], table: list[dict[str, Share]]) -> float:
    return sum(
        row[path] * share.weights
        for row, block in zip(densities, table, strict=True)
        for path, share in block.items()
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_spread_is_the_formula_within_the_exact_budget(epsilon: float, sparsity: float) -> None:
    allocator, table = AlphaPruning(epsilon), shares(1 - sparsity)
    measures = measured(allocator)
    found = allocator.spread(measures, table)
    budget = sum(s.weights * s.density for block in table for s in block.values())
    assert spent(found, table) == pytest.approx(budget, rel=1e-6)
    q = torch.stack([(m["a"] + m["b"]) / 2 for m in measures])
    p = (q - q.min()) / (q.max() - q.min()) * 2 * epsilon + (1 - epsilon)
    s = torch.tensor([1 - row["a"] for row in found], dtype=torch.float64)
    if float((s / p).max()) * float(p.max()) < 0.99:
        assert torch.allclose(s / p, (s / p)[:1].expand(5), rtol=1e-9)
        assert s.max() / s.min() == pytest.approx((1 + epsilon) / (1 - epsilon))
    assert all(row["a"] == row["b"] for row in found)
    if epsilon:
        assert torch.equal(s.argsort(), q.argsort())  # Spearman's coefficient is 1


def test_sparsities_beyond_the_limit_go_to_the_other_blocks() -> None:
    allocator, table = AlphaPruning(0.3), shares(0.2)
    found = allocator.spread(measured(allocator), table)
    s = [1 - row["a"] for row in found]
    assert max(s) == pytest.approx(0.99)
    budget = sum(share.weights * 0.2 for block in table for share in block.values())
    assert spent(found, table) == pytest.approx(budget, rel=1e-6)
    # Those below the limit still keep the formula's proportions.
    q = [float((m["a"] + m["b"]) / 2) for m in measured(allocator)]
    p = [0.7 + 0.6 * (x - min(q)) / (max(q) - min(q)) for x in q]
    etas = [a / b for a, b in zip(s, p, strict=True) if a < 0.9899]
    assert 1 < len(etas) < 5
    assert max(etas) == pytest.approx(min(etas), rel=1e-9)


def test_equal_blocks_are_treated_alike() -> None:
    allocator, table = AlphaPruning(), shares(0.4)
    same = [measured(allocator)[0]] * 5
    assert allocator.spread(same, table) == [dict.fromkeys("ab", pytest.approx(0.4))] * 5


def test_a_budget_that_no_block_could_meet_is_refused() -> None:
    allocator = AlphaPruning()
    with pytest.raises(RarefyError, match="keep between 1% and 100%"):
        allocator.spread(measured(allocator), shares(0.005))


@pytest.mark.parametrize("options", [{"epsilon": 1.0}, {"tail": "end"}])
def test_refuses_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AlphaPruning(**options)  # type: ignore[arg-type]


def test_the_walk_prunes_what_was_allocated(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stage = {
        "solver": "sparsegpt",
        "allocate": {"method": "alphapruning", "epsilon": 0.3},
        "schemes": {
            "model.layers.1.self_attn.*": "keep",
            "*": {"format": "sparse", "sparsity": 0.7, "scope": "matrix"},
        },
    }
    out = rarefy.compress(
        model, recipe(tmp_path, stage), tmp_path / "out", calibration=words(tmp_path)
    )
    masks = supports(out.path)
    [entry] = out.manifest["history"]
    assert entry["allocator"] == "alphapruning"
    table = {
        f"model.layers.{b}.{path}": density
        for b, row in enumerate(entry["density"])
        for path, density in row.items()
    }
    assert masks.keys() == table.keys()
    for name, density in table.items():
        assert abs(float(masks[name].double().mean()) - density) <= 1 / masks[name].numel() + 1e-9
    kept, total = (sum(f(m) for m in masks.values()) for f in (torch.sum, torch.numel))
    assert float(kept / total) == pytest.approx(0.3, abs=1e-3)
    assert len({round(d, 6) for d in table.values()}) == 3
