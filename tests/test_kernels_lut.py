"""Look-up products: equal to the decoded matrix's, at every level, without ever forming it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy.formats.bcq import BCQ, from_int
from rarefy.formats.integer import Int
from rarefy.kernels import library, ops_lut
from rarefy.kernels.bind import kernel_for
from rarefy.kernels.call import decode
from rarefy.runtime.packed import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

compiled = pytest.mark.skipif(not library.available(), reason="no compiled kernels")
LEVELS = ("portable", "avx2", "avx512")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has."""
    used = library.limit(request.param)
    if not used.startswith(request.param):
        library.limit("avx512")
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.limit("avx512")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@compiled
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [8, 32, 40, 64, None])
@pytest.mark.parametrize("shape", [(3, 64), (13, 101), (37, 640), (80, 2500)])
def test_equals_the_decoded_matrix(
    level: str, bits: int, group: int | None, shape: tuple[int, int]
) -> None:
    W = normal(*shape) * 0.05
    for fmt in (
        BCQ(bits, group, rule="uniform"),
        BCQ(bits, group, offset=False, rounds=1, scale_dtype="bfloat16"),
        BCQ(bits, group, rounds=0, scale_dtype="float32"),
    ):
        packed = fmt.fit(W).encode(W)
        dense = fmt.decode(packed)
        kernel = ops_lut.BCQKernel(fmt)
        for vectors in (1, 2, 8, 9, 20):
            x = normal(vectors, shape[1], seed=vectors)
            exact = x.double() @ dense.double().T
            assert off(kernel.product(x, packed), exact) < 1e-5
        # A strip for BLAS has the very bits of the reference.
        assert torch.equal(decode(kernel.matrix(packed, shape[1]), 0, shape[0]), dense)


@compiled
def test_integers_of_every_width_run_as_planes(level: str) -> None:
    W, x = normal(21, 130) * 0.02, normal(3, 130, seed=1)
    for bits in range(2, 9):
        for symmetric in (True, False):
            fmt = Int(bits, 40, symmetric, scale_dtype="bfloat16")
            ours, packed = from_int(fmt, fmt.fit(W).encode(W))
            exact = x.double() @ ours.decode(packed).double().T
            assert off(ops_lut.BCQKernel(ours).product(x, packed), exact) < 1e-5


@compiled
def test_padding_bits_and_large_inputs_do_not_leak(level: str) -> None:
    fmt = BCQ(3, None)
    W = normal(5, 33)
    packed = fmt.fit(W).encode(W)
    octets = packed["weight_planes"].view(torch.uint8)
    octets[..., 5:] = 255  # bits of columns that are not there
    octets[..., 4] |= 254
    x = normal(1, 33) * 1e6
    exact = x.double() @ fmt.fit(W).round(W).double().T
    assert off(ops_lut.BCQKernel(fmt).product(x, packed), exact) < 1e-5


class Largest(TorchDispatchMode):
    """Size of the largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@compiled
def test_no_matrix_is_formed() -> None:
    fmt, shape = BCQ(3, 64, rounds=0), (512, 1024)
    W = normal(*shape)
    layer = PackedLinear(fmt, shape, None)
    for suffix, tensor in fmt.fit(W).encode(W).items():
        setattr(layer, suffix, tensor)
    x = normal(2, 1024)
    with torch.no_grad(), Largest() as ours:
        y = layer(x)
    assert ours.elements <= 2 * 1024
    with Largest() as theirs:
        reference = F.linear(x, layer.dense())
    assert theirs.elements >= 512 * 1024
    assert off(y, reference.double()) < 1e-5


@compiled
def test_threads_and_parts_change_nothing() -> None:
    fmt, W, x = BCQ(2, 64, rounds=0), normal(300, 512), normal(3, 512)
    packed, kernel = fmt.fit(W).encode(W), ops_lut.BCQKernel(fmt)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(kernel.product(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_operator_passes_torchs_own_checks() -> None:
    W, x = normal(9, 40), normal(2, 40)
    for fmt in (BCQ(2, 16), BCQ(3, None, rule="uniform"), BCQ(1, 8, offset=False)):
        arguments = ops_lut.BCQKernel(fmt)._arguments(fmt.fit(W).encode(W), 40)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops_lut.bcq_linear, (x, *arguments), test_utils=checks)
        reference = ops_lut.reference(x, *arguments)
        torch.testing.assert_close(ops_lut.bcq_linear(x, *arguments), reference)


@compiled
def test_compiled_modules_call_the_operator_in_one_graph() -> None:
    fmt, W = BCQ(2, 32, rounds=0), normal(24, 64)
    layer = PackedLinear(fmt, (24, 64), None)
    for suffix, tensor in fmt.fit(W).encode(W).items():
        setattr(layer, suffix, tensor)
    x = normal(3, 64)
    with torch.no_grad():
        whole = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(whole(x), layer(x))


def test_who_multiplies() -> None:
    kernel = kernel_for(BCQ(3, 64))
    assert (kernel is None) == (not library.available())
    if kernel is not None:
        fmt, W = BCQ(3, 64, rounds=0), normal(20, 64)
        packed, ids = fmt.fit(W).encode(W), torch.tensor([[3, 3], [19, 0]])
        assert kernel.name == "bcq3 x fp32"
        assert torch.equal(kernel.rows(ids, packed, 64), fmt.decode(packed)[ids])
