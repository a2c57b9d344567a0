"""Low rank: optimal truncation, execution by two products, and honest bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import (
    CPU,
    IDS,
    decoded_logits,
    inputs,
    layer,
    recipe,
    reloaded_logits,
    tensors,
    words,
)
from tiny import FAMILIES, save_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.allocate.base import Matrix, Share
from rarefy.allocate.truncation import Truncation
from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.export.dense import export_dense
from rarefy.formats.low_rank import LowRank
from rarefy.recipe import parse_recipe
from rarefy.runtime.factored import Factored
from rarefy.solvers.asvd import ASVD
from rarefy.solvers.base import Problem, output_error
from rarefy.solvers.nearest import Nearest
from rarefy.solvers.svd_llm import Whitened

if TYPE_CHECKING:
    from pathlib import Path

FMT = LowRank(0.6, dtype="float32")
SHAPES = ((40, 40), (24, 60), (60, 24))
every_shape = pytest.mark.parametrize("shape", SHAPES)


def lost(case: Problem, found: torch.Tensor) -> float:
    """Squared output error, not divided by anything."""
    assert case.gram is not None
    D = (case.weight - found).double()
    return float(torch.trace(D @ case.gram.double() @ D.T))


def whitened_values(case: Problem) -> torch.Tensor:
    assert case.gram is not None
    L = torch.linalg.cholesky(case.gram.double())
    return torch.linalg.svdvals(case.weight.double() @ L).square()


def rank_of(shape: tuple[int, int], ratio: float = 0.6) -> int:
    m, n = shape
    return int(ratio * m * n / (m + n))


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitened_error_is_the_sum_of_the_dropped_values(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    case = layer(*shape, dtype=dtype)
    found = Whitened().solve(case, FMT).weight
    k = rank_of(shape)
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == k
    assert lost(case, found) == pytest.approx(float(whitened_values(case)[k:].sum()), rel=1e-3)


@every_shape
def test_error_on_the_calibration_tokens_themselves(shape: tuple[int, int]) -> None:
    X = inputs(shape[1], 3)
    W = layer(*shape, seed=3).weight
    found = Whitened().solve(Problem("layer", W, X.T @ X / len(X)), FMT).weight
    tail = torch.linalg.svdvals(W @ X.T).square()[rank_of(shape) :].sum()
    assert float(((W - found) @ X.T).square().sum()) == pytest.approx(float(tail), rel=1e-3)


@every_shape
def test_plain_truncation_is_the_best_in_weights(shape: tuple[int, int]) -> None:
    case = layer(*shape)
    found = Nearest().solve(case, FMT).weight
    tail = torch.linalg.svdvals(case.weight)[rank_of(shape) :].square().sum()
    error = (case.weight - found).square().sum()
    assert float(error) == pytest.approx(float(tail), rel=1e-4)


@every_shape
def test_asvd_is_the_truncation_of_the_scaled_matrix(shape: tuple[int, int]) -> None:
    case = layer(*shape)
    assert case.moments is not None
    D = case.moments.size.double().sqrt() + 1e-6
    U, S, Vh = torch.linalg.svd(case.weight * D)
    k = rank_of(shape)
    expected = U[:, :k] * S[:k] @ Vh[:k] / D
    assert torch.allclose(ASVD().solve(case, FMT).weight, expected, rtol=1e-3, atol=1e-4)


def test_each_metric_wins_where_it_should() -> None:
    ordered = 0
    cases = [layer(*shape, seed=seed) for seed in range(10) for shape in SHAPES]
    for case in cases:
        found = [s.solve(case, FMT).weight for s in (Whitened(), ASVD(), Nearest())]
        assert case.gram is not None
        best, middle, plain = (output_error(case.weight, f, case.gram) for f in found)
        assert best < min(middle, plain)  # by optimality, always
        ordered += best < middle < plain
        size = [float((case.weight - f).square().sum()) for f in found]
        assert size[2] < min(size[:2])
    assert ordered >= 0.95 * len(cases)


def test_a_singular_gram_is_no_obstacle() -> None:
    X = inputs(40, 0, tokens=15)
    case = Problem("layer", layer(24, 40).weight, X.T @ X / len(X))
    found = Whitened().solve(case, FMT).weight
    tail = torch.linalg.svdvals(case.weight @ X.T).square()[rank_of((24, 40)) :].sum()
    total = (case.weight @ X.T).square().sum()
    assert float(((case.weight - found) @ X.T).square().sum() - tail) < 1e-3 * float(total)


# What is refused


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.3])
def test_a_ratio_that_saves_nothing_is_refused(ratio: float) -> None:
    stage = {"solver": "svd-llm", "schemes": {"*": {"format": "low-rank", "ratio": ratio}}}
    with pytest.raises(RarefyError, match=r"ratio must lie in \(0, 1\)"):
        parse_recipe({"stages": [stage]}, "trial")


def test_a_rank_that_saves_nothing_is_refused_with_the_largest_that_does(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stage = {"solver": "nearest", "schemes": {"*": {"format": "low-rank", "rank": 32}}}
    # q_proj is [64, 64], where rank 32 breaks even.
    with pytest.raises(RarefyError, match=r"rank 32 saves nothing on a \[64, 64\].*at most 31"):
        rarefy.compress(model, recipe(tmp_path, stage), tmp_path / "out")


# Execution


class Recorder(TorchDispatchMode):
    """Notes the name and the output size of every tensor operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, out.numel()))
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_execution_is_two_products_and_forms_no_large_matrix(bias: bool) -> None:
    m, n, k = 48, 40, 10
    b = torch.nn.Parameter(torch.randn(m)) if bias else None
    module = Factored((m, n), k, b, device="cpu")
    x = torch.randn(3, n)
    with torch.no_grad(), Recorder() as record:
        y = module(x)
    products = [name for name, _ in record.seen if name in ("mm", "addmm", "matmul", "bmm")]
    assert len(products) == 2
    views = ("t", "transpose")
    assert max(size for name, size in record.seen if name not in views) < m * n / 4
    expected = x @ (module.second.weight @ module.first.weight).T
    assert torch.allclose(y, expected if b is None else expected + b, atol=1e-4)


THIN = {"*": {"format": "low-rank", "ratio": 0.8}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_opens_in_factors_and_computes_the_same(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "dense")
    file = recipe(tmp_path, {"solver": "svd-llm", "schemes": THIN})
    out = rarefy.compress(model, file, tmp_path / "out", calibration=words(tmp_path)).path
    logits, expected = reloaded_logits(out), decoded_logits(family, out)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_bytes_shrink_as_computed_and_the_model_runs_on_factors(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 192}
    model = save_tiny("llama", tmp_path / "dense", torch.float16, **wide)
    file = recipe(tmp_path, {"solver": "svd-llm", "schemes": THIN})
    out = rarefy.compress(model, file, tmp_path / "out", calibration=words(tmp_path))
    before, after = tensors(model), tensors(out.path)
    for node in out.manifest["nodes"]:
        m, n = before[f"{node['name']}.weight"].shape
        k = int(0.8 * m * n / (m + n) + 1e-9)
        first, second = (after[f"{node['name']}.{f}.weight"] for f in ("first", "second"))
        assert (first.shape, second.shape) == ((k, n), (m, k))
        assert node["bytes"] == first.nbytes + second.nbytes == 2 * k * (m + n)
        assert f"{node['name']}.weight" not in after
    loaded = AutoModelForCausalLM.from_pretrained(out.path, dtype=torch.float32).eval()
    factored = [m for m in loaded.modules() if isinstance(m, Factored)]
    assert len(factored) == 3 * 7
    smallest = min(m.second.weight.shape[0] * m.first.weight.shape[1] for m in factored)
    loaded(input_ids=IDS[:1, :2], use_cache=False)  # buffers of the first call
    with torch.no_grad(), Recorder() as record:
        loaded(input_ids=IDS[:1, :2], use_cache=False)
    made = {size for name, size in record.seen if name not in ("t", "transpose", "detach")}
    assert max(made) < smallest / 2
    shapes = {p.shape for p in loaded.model.layers.parameters()}
    assert not shapes & {(128, 128), (192, 128), (128, 192), (64, 128)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_factors_are_quantized_by_a_second_stage(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "dense", tie_word_embeddings=False)
    int4 = {"format": "int", "bits": 4, "group": 16}
    first = {"solver": "svd-llm", "schemes": THIN}
    second = {"solver": "gptq", "schemes": {"*": int4}}
    data = words(tmp_path)
    one = rarefy.compress(
        model, recipe(tmp_path, first, name="one"), tmp_path / "one", calibration=data
    )
    two = rarefy.compress(
        model, recipe(tmp_path, first, second), tmp_path / "two", calibration=data
    )
    skeleton = Skeleton(Checkpoint(two.path), CPU)
    dense = tensors(one.path)
    factors = [name for name in skeleton.earlier if name.endswith((".first", ".second"))]
    assert len(factors) == 2 * len(one.manifest["nodes"])
    for name in factors:
        decoded = skeleton.read(f"{name}.weight")
        stored = next(t for key, t in dense.items() if key.endswith(f"{name}.weight"))
        assert 0 < float((decoded - stored).norm() / stored.norm()) < 0.4
    # Each factor saw its own input: the second one's has the width of the rank.
    errors = {n["name"]: n["error"] for n in two.manifest["nodes"]}
    assert all(0 < errors[name] < 0.1 for name in factors)
    logits = reloaded_logits(two.path)
    with torch.no_grad():
        skeleton.fill(skeleton.model, "")
        expected = skeleton.model(input_ids=IDS, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    # A dense copy multiplies the decoded factors.
    export_dense(two.path, tmp_path / "again")
    again = reloaded_logits(tmp_path / "again")
    assert (logits - again).abs().max() < 1e-4 * expected.abs().max()


# Ranks under one budget


# Of unequal cost: a unit of rank takes 80, 84 or 170 parameters.
UNEQUAL = ((40, 40), (24, 60), (140, 30))


def measured() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, Share]], list[Problem]]:
    """Five blocks of three shapes; the later ones are closer to low rank."""
    cases = []
    for b in range(5):
        for i, (m, n) in enumerate(UNEQUAL):
            case = layer(m, n, seed=10 * b + i)
            U, S, Vh = torch.linalg.svd(case.weight, full_matrices=False)
            S = S * torch.logspace(0, -0.4 * b, len(S), dtype=S.dtype)
            cases.append(Problem("layer", U * S @ Vh, case.gram))
    measures, shares = [], []
    for b in range(5):
        block = {str(i): cases[3 * b + i] for i in range(3)}
        measures.append(
            Truncation().measure({k: Matrix(c.weight, gram=c.gram) for k, c in block.items()})
        )
        shares.append({k: Share(*c.weight.shape, 0.7) for k, c in block.items()})
    return measures, shares, cases


def test_truncation_measures_the_relative_whitened_spectrum() -> None:
    measures, _, cases = measured()
    for i, case in enumerate(cases):
        expected = whitened_values(case)
        found = measures[i // 3][str(i % 3)]
        assert torch.allclose(found, expected / expected.sum(), rtol=1e-5, atol=1e-9)


def ranks_of(table: list[dict[str, float]], shares: list[dict[str, Share]]) -> list[int]:
    return [
        LowRank(0.5).with_density(d).inner_width(shares[b][path].rows, shares[b][path].columns)
        for b, row in enumerate(table)
        for path, d in row.items()
    ]


@pytest.mark.parametrize("density", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("least", [0.0, 0.2, 1.0])
def test_truncation_spends_the_budget_and_saves_on_every_matrix(
    density: float, least: float
) -> None:
    measures, shares, _ = measured()
    shares = [{k: Share(s.rows, s.columns, density) for k, s in row.items()} for row in shares]
    table = Truncation(least).spread(measures, shares)
    flat = [s for row in shares for s in row.values()]
    given = [d for row in table for d in row.values()]
    budget = sum(s.weights * density for s in flat)
    assert sum(s.weights * d for s, d in zip(flat, given, strict=True)) == pytest.approx(budget)
    ranks = ranks_of(table, shares)
    cost = sum(k * (s.rows + s.columns) for k, s in zip(ranks, flat, strict=True))
    # What the fractions of a unit hide is less than one unit of the largest matrix.
    assert budget - 170 < cost <= budget + 1e-6
    for k, s, d in zip(ranks, flat, given, strict=True):
        assert 0 < d < 1
        assert LowRank(0.5).with_density(d).misfit(s.rows, s.columns) == ""
        uniform = int(density * s.weights / (s.rows + s.columns) + 1e-9)
        assert k >= min(int(least * uniform), uniform)


def test_truncation_loses_less_than_equal_ratios() -> None:
    measures, shares, cases = measured()
    ranks = ranks_of(Truncation(0.0).spread(measures, shares), shares)
    uniform = [rank_of(tuple(c.weight.shape), 0.7) for c in cases]
    assert ranks != uniform

    def loss(ks: list[int]) -> float:
        spectra = [measures[i // 3][str(i % 3)] for i in range(len(cases))]
        return sum(float(s[k:].sum()) for s, k in zip(spectra, ks, strict=True))

    assert loss(ranks) < 0.9 * loss(uniform)
    # No rank that was not taken gains more per parameter than one that was.
    costs = [sum(c.weight.shape) for c in cases]
    caps = [-(-c.weight.numel() // sum(c.weight.shape)) - 1 for c in cases]
    spectra = [measures[i // 3][str(i % 3)] for i in range(len(cases))]
    worth = [s / c for s, c in zip(spectra, costs, strict=True)]
    taken = min(float(w[k - 1]) for w, k in zip(worth, ranks, strict=True) if k > 1)
    left_out = [float(w[k]) for w, k, cap in zip(worth, ranks, caps, strict=True) if k < cap]
    # All but the last unit, which has to fit into what is left.
    assert sorted(left_out)[-2] <= taken * (1 + 1e-9)


def test_what_is_left_of_the_budget_makes_no_matrix_larger() -> None:
    # The small matrix is full at rank 17; nearly a whole unit of the large one is left.
    budget = 17 * (24 + 60) + 60 * (200 + 200) + 399
    density = budget / (24 * 60 + 200 * 200)
    shares = [{"small": Share(24, 60, density), "large": Share(200, 200, density)}]
    small, large = torch.full((24,), 1.0), torch.linspace(0.1, 0.01, 200)
    [table] = Truncation().spread([{"small": small, "large": large}], shares)
    assert ranks_of([table], shares) == [17, 60]
    assert max(table.values()) < 1
    spent = sum(table[k] * s.weights for k, s in shares[0].items())
    assert spent == pytest.approx(budget, rel=1e-9)


def test_truncation_refuses_a_budget_below_one_rank() -> None:
    measures, shares, _ = measured()
    tiny = [{k: Share(s.rows, s.columns, 0.02) for k, s in row.items()} for row in shares]
    with pytest.raises(RarefyError, match="larger ratio"):
        Truncation().spread(measures, tiny)


def test_truncation_through_the_engine(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stage = {"solver": "svd-llm", "allocate": {"method": "truncation"}, "schemes": THIN}
    out = rarefy.compress(
        model, recipe(tmp_path, stage), tmp_path / "out", calibration=words(tmp_path)
    )
    before, after = tensors(model), tensors(out.path)
    names = [node["name"] for node in out.manifest["nodes"]]
    ratios = set()
    stored = weights = 0
    for name in names:
        m, n = before[f"{name}.weight"].shape
        k = after[f"{name}.first.weight"].shape[0]
        stored, weights = stored + k * (m + n), weights + m * n
        ratios.add(round(k * (m + n) / (m * n), 2))
    assert len(ratios) > 5
    assert 0.8 * weights - 160 < stored <= 0.8 * weights + 1e-6
    assert out.manifest["history"][-1]["allocator"] == "truncation"
