"""Sparse products: equal to the decoded matrix's, for masks and 2:4, floats and integer codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from test_kernels_lut import Largest, compiled, level, normal, off
from torch import nn

from rarefy.formats.floating import Float
from rarefy.formats.integer import Int
from rarefy.formats.low_rank import LowRank
from rarefy.formats.sparse import Sparse
from rarefy.kernels import library, ops_sparse
from rarefy.kernels.bind import kernel_for
from rarefy.kernels.call import decode
from rarefy.runtime.factored import Factored, factorize
from rarefy.runtime.packed import PackedLinear

if TYPE_CHECKING:
    from rarefy.formats.base import ElementFormat

__all__ = ["level"]  # a fixture

FLOATS = [Float("float16"), Float("bfloat16"), Float("float32")]
CODES = [
    *(Int(bits, group=16) for bits in range(2, 9)),
    Int(4, symmetric=True, scale_dtype="bfloat16"),
    Int(3, group=7),
    Int(8, group=40, scale_dtype="bfloat16"),
]
PLACES = [{}, {"sparsity": 0.8}, {"sparsity": 0.3, "scope": "matrix"}, {"kept": 2, "of": 4}]


def filled(fmt: Sparse, W: torch.Tensor) -> PackedLinear:
    grid = fmt.fit(W)
    layer = PackedLinear(grid.form, (W.shape[0], W.shape[1]), None)
    for suffix, tensor in grid.encode(W).items():
        setattr(layer, suffix, tensor)
    return layer


@compiled
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("values", [*FLOATS, *CODES], ids=lambda v: v.label())
@pytest.mark.parametrize("shape", [(1, 16), (13, 101), (17, 52), (33, 640)])
def test_equals_the_decoded_matrix(
    level: str, values: ElementFormat, places: dict[str, object], shape: tuple[int, int]
) -> None:
    fmt = Sparse(values=values, **places)  # type: ignore[arg-type]
    if why := fmt.misfit(*shape):
        pytest.skip(why)
    W = normal(*shape) * 0.05
    W[shape[0] // 2] *= 100  # a row that takes more of the matrix' budget
    layer = filled(fmt, W)
    dense = layer.dense()
    kernel = ops_sparse.SparseKernel(fmt)
    for vectors in (1, 2, 8, 9):
        x = normal(vectors, shape[1], seed=vectors)
        y = kernel.product(x, layer.tensors())
        assert off(y, x.double() @ dense.double().T) < 1e-5
    matrix = kernel.matrix(layer.tensors(), shape[1])
    assert torch.equal(decode(matrix, 0, shape[0]), dense)
    if shape[0] > 5:
        assert torch.equal(decode(matrix, 2, shape[0] - 1), dense[2:-1])


@compiled
def test_empty_and_full_rows(level: str) -> None:
    W = normal(6, 50)
    support = torch.zeros(6, 50, dtype=torch.bool)
    support[1] = True
    support[3, ::7] = True
    for values in (Float("float16"), Int(4, group=16), Int(5)):
        fmt = Sparse(scope="free", values=values)
        grid = fmt.fit(W, support=support)
        packed = grid.encode(W)
        x = normal(2, 50, seed=3)
        y = ops_sparse.SparseKernel(fmt).product(x, packed)
        exact = x.double() @ grid.form.decode(packed).double().T
        assert off(y, exact) < 1e-5
        assert not y[:, [0, 2, 4, 5]].any()


@compiled
def test_no_matrix_is_formed() -> None:
    layer = filled(Sparse(kept=2, of=4), normal(512, 1024))
    x = normal(2, 1024)
    with torch.no_grad(), Largest() as ours:
        y = layer(x)
    assert ours.elements <= 2 * 1024
    assert off(y, x.double() @ layer.dense().double().T) < 1e-5


@compiled
def test_rows_of_a_mask_are_counted_again_for_another_matrix() -> None:
    fmt = Sparse(0.5, scope="matrix")
    kernel, x = ops_sparse.SparseKernel(fmt), normal(1, 64)
    for seed in (0, 1):
        W = normal(8, 64, seed=seed) * torch.linspace(0.2 + seed, 2, 8).unsqueeze(1)
        packed = fmt.fit(W).encode(W)
        exact = x.double() @ fmt.decode(packed).double().T
        assert off(kernel.product(x, packed), exact) < 1e-5


def test_the_operator_passes_torchs_own_checks() -> None:
    W, x = normal(9, 40), normal(2, 40)
    for fmt in (Sparse(0.5), Sparse(0.5, values=Int(3, group=16)), Sparse(kept=2, of=4)):
        it = ops_sparse.stored(fmt, fmt.fit(W).encode(W), 40)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops_sparse.sparse_linear, (x, *it), test_utils=checks)
        found = ops_sparse.sparse_linear(x, *it)
        torch.testing.assert_close(found, ops_sparse.reference(x, it))


def test_patterns_without_a_kernel_are_decoded() -> None:
    assert kernel_for(Sparse(kept=1, of=4)) is None
    assert (kernel_for(Sparse(0.5)) is None) == (not library.available())
    layer = filled(Sparse(kept=1, of=4), normal(8, 16))
    x = normal(2, 16)
    assert off(layer(x), x.double() @ layer.dense().double().T) < 1e-6


@compiled
def test_two_factors_are_two_kernels() -> None:
    model = nn.Sequential(nn.Linear(96, 64, bias=True))
    factorize(model, "0", 16)
    linear = model[0]
    assert isinstance(linear, Factored)
    wide = LowRank(rank=16).fit(normal(64, 96))
    for name, W in (("first", wide.first), ("second", wide.second)):
        layer = PackedLinear(Int(4, group=16), (W.shape[0], W.shape[1]), None)
        for suffix, tensor in layer.fmt.fit(W).encode(W).items():
            setattr(layer, suffix, tensor)
        assert layer.kernel.startswith("int4 x fp32")
        setattr(linear, name, layer)
    x = normal(1, 96)
    product = linear.second.dense().double() @ linear.first.dense().double()  # type: ignore[operator]
    with torch.no_grad(), Largest() as ours:
        y = linear(x)
    assert linear.bias is not None
    assert off(y, x.double() @ product.T + linear.bias.double()) < 1e-5
    assert ours.elements <= 96
