"""Wanda and its variant: exact row counts, weights untouched, and invariance to rescaling."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import (
    CPU,
    decoded_logits,
    inputs,
    layer,
    moments_of,
    recipe,
    reloaded_logits,
    supports,
    tensors,
    words,
)
from tiny import save_tiny, tiny, tiny_tokenizer

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.data import corpora
from rarefy.data.tokens import calibration
from rarefy.engine.capture import capture_all
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import Skeleton, matrix_of
from rarefy.errors import RarefyError
from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.sparse import Sparse
from rarefy.maps.catalogue import map_for
from rarefy.maps.check import fold
from rarefy.maps.model_map import dims_of
from rarefy.solvers.wanda import Wanda
from rarefy.solvers.wanda_variant import WandaVariant

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.solvers.base import Problem

F32 = Float("float32")
ROWS, COLUMNS = 17, 90
HALF = {"*": {"format": "sparse", "sparsity": 0.5}}
PAIRS = {"*": {"format": "sparse", "kept": 2, "of": 4}}


def scores(case: Problem) -> torch.Tensor:
    assert case.moments is not None
    return case.weight.abs() * case.moments.square.sqrt()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_each_row_loses_its_lowest_scores_and_no_weight_changes(sparsity: float) -> None:
    case = layer(ROWS, COLUMNS, dtype=torch.float32)
    found = Wanda().solve(case, Sparse(sparsity, values=F32)).weight
    zeros = int(sparsity * COLUMNS + 1e-6)
    for w, f, score in zip(case.weight, found, scores(case), strict=True):
        assert int((f == 0).sum()) == zeros
        assert torch.equal(f[f != 0], w[f != 0])
        assert score[f == 0].max() < score[f != 0].min()


def test_a_pattern_keeps_its_best_scores() -> None:
    case = layer(ROWS, 88)
    found = Wanda().solve(case, Sparse(kept=1, of=4, values=F32)).weight.reshape(-1, 4)
    best = scores(case).reshape(-1, 4).argmax(1)
    assert torch.equal(found.ne(0).int().argmax(1), best)
    assert (found.ne(0).sum(1) == 1).all()


def test_a_louder_channel_keeps_more_weights() -> None:
    W = layer(ROWS, COLUMNS).weight
    X = torch.randn(400, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = replace(layer(ROWS, COLUMNS), weight=W, moments=moments_of(X))
    before = Wanda().solve(case, Sparse(0.5, values=F32)).weight[:, 7]
    X[:, 7] *= 100
    after = Wanda().solve(replace(case, moments=moments_of(X)), Sparse(0.5, values=F32)).weight
    assert after[:, 7].ne(0).sum() > before.ne(0).sum()
    X[:, 7] = 0
    dead = Wanda().solve(replace(case, moments=moments_of(X)), Sparse(0.5, values=F32)).weight
    assert not dead[:, 7].any()


def test_imposed_zeros_stay() -> None:
    case = layer(ROWS, COLUMNS)
    first = Wanda().solve(case, Sparse(0.5, values=F32)).weight != 0
    again = Wanda().solve(replace(case, support=first), Sparse(0.5, values=F32))
    assert torch.equal(again.grid.support, first)


# Through the engine


def prune(folder: Path, model: Path, solver: str, schemes: dict[str, Any], name: str) -> Path:
    file = recipe(folder, {"solver": solver, "schemes": schemes}, name=name)
    return rarefy.compress(model, file, folder / name, calibration=words(folder)).path


def test_folding_the_norms_moves_magnitude_but_not_wanda(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    config, net = tiny("llama")
    known = map_for(config)
    assert known is not None
    dims, g = dims_of(config), torch.Generator().manual_seed(0)
    norms = {n.writes[0] for n in known.nodes if n.kind == "norm"}
    assert len(norms) == 2
    for block in net.get_submodule(known.blocks):
        for edge in known.edges:
            if edge.name in norms:
                # Powers of two move no rounding, so that masks must agree to the last bit.
                scale = 2.0 ** torch.randint(-2, 3, (dims.width(edge.width),), generator=g)
                fold(block, known.expanded(dims), edge, scale, dims)
    net.save_pretrained(tmp_path / "folded")
    tiny_tokenizer().save_pretrained(tmp_path / "folded")
    same = {}
    for solver in ("wanda", "nearest"):
        plain = supports(prune(tmp_path, model, solver, HALF, f"{solver}-plain"))
        folded = supports(prune(tmp_path, tmp_path / "folded", solver, HALF, f"{solver}-folded"))
        same[solver] = {name: torch.equal(plain[name], folded[name]) for name in plain}
    assert all(same["wanda"].values())
    assert {name.rsplit(".", 1)[-1] for name, equal in same["nearest"].items() if not equal} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }


def one_shot(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Masks from statistics of the dense model, everything pruned at once."""
    skeleton = Skeleton(Checkpoint(model), CPU)
    wanted, tokenizer = words(folder), tiny_tokenizer()
    rows = calibration(
        corpora.load(wanted.text, tokenizer), tokenizer, wanted.sequences, wanted.length, 0
    )
    masks = {}
    with torch.no_grad():
        batches = capture_all(skeleton, rows.ids)
        for index in range(len(skeleton.blocks)):
            with skeleton.block(index) as module:
                paths = {n.path: n.path for n in skeleton.linears(index)}
                seen = observe(module, index, batches, paths, frozenset({"moments"}))
                for path in paths:
                    W = matrix_of(module.get_submodule(path))
                    square = seen[path].result()[1].square
                    grid = Sparse(0.5, values=F32).fit(W, square)
                    masks[f"{skeleton.map.blocks}.{index}.{path}"] = grid.support
    return masks


def test_later_matrices_see_the_pruned_earlier_ones(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    sequential = supports(prune(tmp_path, model, "wanda", HALF, "out"))
    dense = one_shot(model, tmp_path)
    equal = {name for name, mask in sequential.items() if torch.equal(mask, dense[name])}
    # Nothing is pruned before the first group: the same numbers. Everything later sees the change.
    assert equal == {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}


def test_gptq_keeps_the_pattern_that_wanda_chose(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    first = {"solver": "wanda", "schemes": PAIRS}
    int4 = {"format": "int", "bits": 4, "group": 32}
    second = {"solver": "gptq", "schemes": {"*": int4}}
    data = words(tmp_path)
    one = rarefy.compress(
        model, recipe(tmp_path, first, name="one"), tmp_path / "one", calibration=data
    )
    two = rarefy.compress(
        model, recipe(tmp_path, first, second), tmp_path / "two", calibration=data
    )
    wanted, found = supports(one.path), supports(two.path)
    assert len(found) == 3 * 7
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    skeleton = Skeleton(Checkpoint(two.path), CPU)
    changed = 0
    for name, fmt in skeleton.earlier.items():
        W = fmt.decode(skeleton.packed(name))
        assert (W.reshape(-1, 4).ne(0).sum(1) <= 2).all(), name
        assert not W[~wanted[name]].any()
        changed += int(
            (
                W[wanted[name]]
                != Skeleton(Checkpoint(one.path), CPU).read(f"{name}.weight")[wanted[name]]
            ).sum()
        )
    assert changed
    assert {n["format"] for n in two.manifest["nodes"]} == {"2:4 int4 g32"}
    assert torch.allclose(
        reloaded_logits(two.path), decoded_logits("llama", two.path), rtol=0, atol=1e-6
    )
    bits = {n["bits"] for n in two.manifest["nodes"]}
    assert max(bits) < 4 / 2 + 1 + 2  # half the codes, a bit for the place, scales and zeros


# The variant


def free(sparsity: float) -> Sparse:
    return Sparse(sparsity, scope="free", values=F32)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.95])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_variant_prunes_the_same_share_of_every_rows_mass(
    sparsity: float, tolerance: float
) -> None:
    case = layer(60, 120)
    found = WandaVariant(tolerance).solve(case, free(sparsity)).weight
    pruned = found == 0
    assert abs(float(pruned.float().mean()) - sparsity) < tolerance
    assert torch.equal(found[~pruned], case.weight[~pruned].float().double())
    assert pruned.sum(1).float().std() > 0
    S = scores(case)
    lowest, highest = 0.0, 1.0
    for row, off in zip(S, pruned, strict=True):
        assert row[off].max() <= row[~off].min()
        # Some alpha lies between the mass that went and that with one more weight, in all rows.
        total, gone = row.sum(), row[off].sum()
        lowest = max(lowest, float(gone / total))
        highest = min(highest, float((gone + row[~off].min()) / total))
    assert lowest <= highest * (1 + 1e-9)


def test_variant_leaves_a_row_alone_whose_smallest_weight_is_too_large() -> None:
    case = layer(6, 50)
    W = case.weight.clone()
    W[0] = 1 / case.moments.square.sqrt()  # fifty equal scores
    W[1:, :45] *= 1e-6
    found = WandaVariant().solve(replace(case, weight=W), free(0.5)).weight
    assert found[0].all()


def test_variant_takes_dead_channels_first_and_keeps_imposed_zeros() -> None:
    X = inputs(COLUMNS, 0)
    X[:, 11] = 0
    case = replace(layer(ROWS, COLUMNS), moments=moments_of(X))
    support = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) > 0.3
    found = WandaVariant().solve(replace(case, support=support), free(0.5)).weight
    assert not found[:, 11].any()
    assert not found[~support].any()


@pytest.mark.parametrize(
    "fmt", [Sparse(0.5), Sparse(0.5, scope="matrix"), Sparse(kept=2, of=4), Int(4)]
)
def test_variant_needs_a_format_with_free_counts(fmt: Any) -> None:
    with pytest.raises(RarefyError, match="scope 'free'"):
        WandaVariant().solve(layer(100, 400), fmt)


def test_variant_is_stored_and_opens_again(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    schemes = {"*": {"format": "sparse", "sparsity": 0.5, "scope": "free"}}
    out = prune(tmp_path, model, "wanda-variant", schemes, "out")
    counts = {name: mask.sum(1) for name, mask in supports(out).items()}
    assert all(count.float().std() > 0 for count in counts.values())
    before = tensors(model)
    dense = sum(before[f"{name}.weight"].numel() for name in counts)
    assert abs(float(sum(c.sum() for c in counts.values())) / dense - 0.5) < 0.002
    assert torch.allclose(reloaded_logits(out), decoded_logits("llama", out), rtol=0, atol=1e-6)
