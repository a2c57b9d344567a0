"""Magnitude pruning: exact counts, nothing else touched, and files as small as computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import decoded_logits, recipe, reloaded_logits, supports, tensors
from tiny import save_tiny

import rarefy
from rarefy.errors import RarefyError
from rarefy.formats.floating import Float
from rarefy.formats.sparse import Sparse
from rarefy.solvers.base import Problem
from rarefy.solvers.nearest import Nearest

if TYPE_CHECKING:
    from pathlib import Path

F32 = Float("float32")


def matrix(rows: int = 13, columns: int = 84) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def prune(W: torch.Tensor, fmt: Sparse) -> torch.Tensor:
    return Nearest().solve(Problem("layer", W), fmt).weight


def stage(**scheme: Any) -> dict[str, Any]:
    return {"solver": "nearest", "schemes": {"*": {"format": "sparse", **scheme}}}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.999])
def test_zeros_of_a_matrix_are_its_smallest_weights(sparsity: float) -> None:
    W = matrix()
    found = prune(W, Sparse(sparsity, scope="matrix", values=F32))
    zeros = int(sparsity * W.numel() + 1e-6)
    assert int((found == 0).sum()) == zeros
    assert torch.equal(found[found != 0], W[found != 0])
    if zeros:
        assert W[found == 0].abs().max() < W[found != 0].abs().min()


def test_equal_weights_do_not_upset_the_count() -> None:
    for scope in ("row", "matrix"):
        found = prune(torch.ones(5, 40), Sparse(0.3, scope=scope, values=F32))
        assert int((found == 0).sum()) == 60


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5])
def test_zeros_of_each_row_are_its_smallest_weights(sparsity: float) -> None:
    W = matrix()
    found = prune(W, Sparse(sparsity, values=F32))
    zeros = int(sparsity * 84 + 1e-6)
    for w, f in zip(W, found, strict=True):
        assert int((f == 0).sum()) == zeros
        assert w[f == 0].abs().max() < w[f != 0].abs().min()


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4), (2, 7)])
def test_n_is_the_number_that_is_kept(kept: int, of: int) -> None:
    W = matrix(columns=168)
    groups = prune(W, Sparse(kept=kept, of=of, values=F32)).reshape(13, -1, of)
    assert (groups.ne(0).sum(-1) == kept).all()
    for w, g in zip(W.reshape(-1, of), groups.reshape(-1, of), strict=True):
        assert w[g == 0].abs().max() < w[g != 0].abs().min()


def test_a_pattern_has_to_fill_the_row(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RarefyError, match="7 does not divide rows of 64 columns"):
        rarefy.compress(model, recipe(tmp_path, stage(kept=2, of=7)), tmp_path / "out")


WIDE = {"hidden_size": 256, "intermediate_size": 384}


@pytest.mark.parametrize(
    ("scheme", "density"),
    [
        ({"sparsity": 0.5, "scope": "matrix"}, 0.5),
        ({"sparsity": 0.7}, 0.3),
        ({"kept": 2, "of": 4}, 0.5),
    ],
)
def test_the_folder_holds_what_is_left_and_opens_to_the_same_model(
    scheme: dict[str, Any], density: float, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "dense", torch.float16, **WIDE)
    out = rarefy.compress(model, recipe(tmp_path, stage(**scheme)), tmp_path / "out")
    before, after = tensors(model), tensors(out.path)
    pruned = {f"{node['name']}.weight" for node in out.manifest["nodes"]}
    assert len(pruned) == 3 * 7
    for name in before.keys() - pruned:
        assert torch.equal(before[name], after[name]), name
    assert any("embed" in name for name in before.keys() - pruned)
    for name, support in supports(out.path).items():
        W = before[f"{name}.weight"].float()
        fmt = Sparse(**scheme)
        assert torch.equal(support, prune(W, fmt) != 0), name
        assert int(support.sum()) == fmt.count(*W.shape)
    prunable = sum(before[name].nbytes for name in pruned)
    rest = sum(t.nbytes for name, t in before.items() if name not in pruned)
    stored = sum(file.stat().st_size for file in out.path.glob("*.safetensors"))
    formula = prunable * (16 * density + 1) / 16 + rest
    assert formula < stored <= 1.01 * formula
    # The kernel for many vectors does not add up in the order of BLAS.
    torch.testing.assert_close(
        reloaded_logits(out.path), decoded_logits("llama", out.path, **WIDE), rtol=1e-5, atol=1e-4
    )
