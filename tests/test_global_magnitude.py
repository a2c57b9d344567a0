"""One magnitude threshold for the whole model, against a sort of all weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from layers import recipe, supports, tensors
from tiny import save_tiny

import rarefy
from rarefy.allocate.base import Matrix, Share
from rarefy.allocate.global_magnitude import GlobalMagnitude

if TYPE_CHECKING:
    from pathlib import Path


def model(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Four blocks of two matrices of unequal sizes and scales, in a stored type."""
    g = torch.Generator().manual_seed(0)
    return [
        {
            path: (torch.randn(rows, 50, generator=g) * 0.02 * (2 + b)).to(dtype).float()
            for path, rows in (("a", 40), ("b", 90))
        }
        for b in range(4)
    ]


def spread(blocks: list[dict[str, torch.Tensor]], density: float) -> list[dict[str, float]]:
    allocator = GlobalMagnitude()
    measures = [allocator.measure({p: Matrix(w) for p, w in b.items()}) for b in blocks]
    shares = [{p: Share(*w.shape, density) for p, w in b.items()} for b in blocks]
    return allocator.spread(measures, shares)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_a_sort_of_all_weights(dtype: torch.dtype, density: float) -> None:
    blocks = model(dtype)
    found = spread(blocks, density)
    everything = torch.cat([w.flatten() for b in blocks for w in b.values()]).abs()
    threshold = everything.sort(descending=True).values[int(density * len(everything)) - 1]
    for row, b in zip(found, blocks, strict=True):
        for path, w in b.items():
            above = float((w.abs() > threshold).double().mean())
            if dtype is torch.float32:
                near = (w.abs() / threshold - 1).abs() < 1 / 1024
                assert abs(row[path] - above) <= float(near.double().mean()) + 1e-9
            else:
                ties = float((w.abs() == threshold).double().mean())
                assert above - 1e-9 <= row[path] <= above + ties + 1e-9


def test_a_faint_matrix_keeps_a_hundredth() -> None:
    blocks = model(torch.float32)
    blocks[0]["a"] *= 1e-3
    found = spread(blocks, 0.5)
    assert found[0]["a"] == pytest.approx(0.01)
    spent = sum(
        row[p] * w.numel() for row, b in zip(found, blocks, strict=True) for p, w in b.items()
    )
    assert spent == pytest.approx(0.5 * sum(w.numel() for b in blocks for w in b.values()))


def test_pruned_weights_of_the_model_are_below_the_kept_ones(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense", torch.bfloat16)
    stage = {
        "solver": "nearest",
        "allocate": {"method": "global-magnitude"},
        "schemes": {"*": {"format": "sparse", "sparsity": 0.5, "scope": "matrix"}},
    }
    out = rarefy.compress(folder, recipe(tmp_path, stage), tmp_path / "out")
    dense, masks = tensors(folder), supports(out.path)
    kept = torch.cat([dense[f"{n}.weight"][m].float().abs() for n, m in masks.items()])
    gone = torch.cat([dense[f"{n}.weight"][~m].float().abs() for n, m in masks.items()])
    # Counts of a matrix are whole numbers, so weights on the threshold may fall on either side.
    assert gone.max() <= kept.min() * (1 + 2**-7)
    assert abs(len(kept) - len(gone)) <= 2 * len(masks)
    assert len({round(float(m.double().mean()), 3) for m in masks.values()}) > 5
