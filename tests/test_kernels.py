"""Compiled kernels against their references, at every level of instructions that is here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.formats.integer import Int
from rarefy.formats.packing import pack, unpack
from rarefy.kernels import library, ops_dense, ops_int, reference
from rarefy.runtime.packed import PackedEmbedding, PackedLinear, TiedHead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_library = pytest.mark.skipif(not library.available(), reason=library.reason())


@contextmanager
def limited(level: str) -> Iterator[str]:
    used = library.limit(level)
    try:
        yield used
    finally:
        library.limit("avx512")


def levels_here() -> list[str]:
    """Levels that this machine really has."""
    if not library.available():
        return ["portable"]
    found = []
    for level in ("portable", "avx2", "avx512"):
        with limited(level) as used:
            if used.startswith(level):
                found.append(level)
    return found


levels = pytest.mark.parametrize("level", levels_here())
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Int, int, int, int]:
    """A format, rows, columns and vectors."""
    columns = draw(st.integers(1, 300))
    multiples = [k for k in (16, 32, 64, 128) if k <= columns]
    groups = st.sampled_from([None, *multiples]) | st.integers(1, columns)
    fmt = Int(
        draw(st.sampled_from((2, 3, 4, 8, 4, 8, 5, 6, 7))),
        draw(groups),
        draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(("float16", "bfloat16"))),
    )
    # One vector goes its own way, as decoding does.
    return fmt, draw(st.integers(1, 40)), columns, draw(st.just(1) | st.integers(1, 20))


def stored(fmt: Int, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    W = torch.randn(rows, columns, generator=g) * torch.randn(rows, 1, generator=g).exp() / 30
    return fmt.fit(W + 0.01).encode(W)


def arguments(
    fmt: Int, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    zeros = tensors.get("weight_zero_point")
    return tensors["weight_packed"], tensors["weight_scale"], zeros


def inputs(vectors: int, columns: int) -> torch.Tensor:
    return torch.randn(vectors, columns, generator=torch.Generator().manual_seed(vectors))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm."""
    size = expected.double().norm().clamp(min=1e-30)
    return float((found.double() - expected.double()).norm() / size)


def integer_product(
    fmt: Int, tensors: dict[str, torch.Tensor], codes: torch.Tensor
) -> torch.Tensor:
    """sum_g s_g sum_j (q - z) c in float64, which holds every integer sum exactly."""
    columns = codes.shape[1]
    grid = fmt.stored_grid(tensors)
    units = unpack(tensors["weight_packed"], fmt.bits, columns) - grid.spread(grid.zero, columns)
    scaled = units.double() * grid.spread(grid.scale, columns).double()
    return codes.double() @ scaled.T


# Grouped integers and float activations


@needs_library
@levels
@SETTINGS
@given(case=cases())
def test_products_are_those_of_the_decoded_matrix(
    level: str, case: tuple[Int, int, int, int]
) -> None:
    fmt, rows, columns, vectors = case
    tensors, x = stored(fmt, rows, columns), inputs(vectors, columns)
    expected = x.double() @ fmt.decode(tensors).double().T
    with limited(level):
        found = ops_int.int_linear(x, *arguments(fmt, tensors), fmt.bits, fmt.group or 0)
    assert apart(found, expected) < 1e-5


@needs_library
@levels
@SETTINGS
@given(case=cases())
def test_decoded_rows_equal_the_format_bit_for_bit(
    level: str, case: tuple[Int, int, int, int]
) -> None:
    fmt, rows, columns, count = case
    tensors = stored(fmt, rows, columns)
    ids = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(1))
    with limited(level):
        found = ops_int.int_rows(ids, *arguments(fmt, tensors), fmt.bits, fmt.group or 0, columns)
    assert torch.equal(found, fmt.decode(tensors)[ids])


@needs_library
@levels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_single_weights_are_exact_for_every_mantissa_and_code(
    level: str, bits: int, dtype: str
) -> None:
    # Unit vectors pick single weights, so a product is exact or wrong.
    fmt, codes = Int(bits, 64, scale_dtype=dtype), 2**bits
    mantissas = 1024 if dtype == "float16" else 128
    first = 0x1400 if dtype == "float16" else 0x3B80
    scale = (torch.arange(mantissas) + first).to(torch.int16).view(getattr(torch, dtype))
    rows = codes * mantissas
    zero = (torch.arange(rows) % codes).unsqueeze(1)
    tensors = {
        "weight_packed": pack((torch.arange(64) % codes).expand(rows, 64), bits),
        "weight_scale": scale.repeat_interleave(codes).unsqueeze(1),
        "weight_zero_point": pack(zero.T, bits).T.contiguous(),
        "weight_shape": torch.tensor([rows, 64]),
    }
    units = torch.eye(64)[:codes]
    given = (*arguments(fmt, tensors), bits, 64)
    with limited(level):
        together = ops_int.cpu_int_linear(units, *given)
        alone = torch.cat([ops_int.cpu_int_linear(one.unsqueeze(0), *given) for one in units])
    expected = fmt.decode(tensors)[:, :codes].T
    assert torch.equal(together, expected)
    assert torch.equal(alone, expected)


@needs_library
@levels
@pytest.mark.parametrize(
    "fmt", [Int(4, 64), Int(4, 32), Int(4), Int(3, 64), Int(2, 64), Int(8, 64)]
)
@pytest.mark.parametrize("largest", [1.0, 1e4, 3e38, 1e-30])
def test_one_number_that_exceeds_the_others_costs_no_accuracy(
    level: str, fmt: Int, largest: float
) -> None:
    tensors, x = stored(fmt, 24, 1088), inputs(1, 1088)
    x *= largest / x.abs().max() / 100
    x[0, 700] = largest
    expected = x.double() @ fmt.decode(tensors).double().T
    with limited(level):
        found = ops_int.cpu_int_linear(x, *arguments(fmt, tensors), fmt.bits, fmt.group or 0)
    assert expected.abs().max() < 3.4e38
    assert apart(found, expected) < 2e-6


@needs_library
@levels
@pytest.mark.parametrize(
    "fmt", [Int(4, 64), Int(4, 32), Int(4, symmetric=True), Int(8, 128), Int(8, symmetric=True)]
)
def test_numbers_of_one_sign_do_not_cancel(level: str, fmt: Int) -> None:
    # Sums of codes and numbers are some hundred times as large as those of weights and numbers.
    W = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    tensors, x = fmt.fit(W).encode(W), 1 + inputs(1, 4096) / 10
    expected = x.double() @ fmt.decode(tensors).double().T
    with limited(level):
        found = ops_int.cpu_int_linear(x, *arguments(fmt, tensors), fmt.bits, fmt.group or 0)
    assert apart(found, expected) < 2e-6


@needs_library
@levels
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 48, 64, 96, 128, 192, 256, 512])
def test_rows_of_many_groups_of_any_number_of_steps(level: str, group: int, bits: int) -> None:
    fmt, columns = Int(bits, group), 35 * group + 40
    tensors, x = stored(fmt, 7, columns), inputs(1, columns)
    expected = x.double() @ fmt.decode(tensors).double().T
    with limited(level):
        found = ops_int.cpu_int_linear(x, *arguments(fmt, tensors), bits, group)
    assert apart(found, expected) < 1e-5


@needs_library
@levels
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(level: str, wrong: float) -> None:
    fmt = Int(4, 64)
    tensors, x = stored(fmt, 24, 320), inputs(1, 320)
    x[0, 100] = wrong
    with limited(level):
        found = ops_int.cpu_int_linear(x, *arguments(fmt, tensors), 4, 64)
        nothing = ops_int.cpu_int_linear(torch.zeros(1, 320), *arguments(fmt, tensors), 4, 64)
    assert not found.isfinite().any()
    assert torch.equal(nothing, torch.zeros(1, 24))


@needs_library
@levels
@pytest.mark.parametrize(
    "fmt", [Int(4, 64), Int(8), Int(3, 48, scale_dtype="bfloat16"), Int(5, 64)]
)
@pytest.mark.parametrize(("rows", "columns", "half"), [(700, 192, 20), (61, 832, 37), (5, 48, 260)])
def test_many_vectors(level: str, fmt: Int, rows: int, columns: int, half: int) -> None:
    if fmt.group and fmt.group > columns:
        fmt = replace(fmt, group=16)
    tensors, x = stored(fmt, rows, columns), inputs(2 * half, columns).reshape(2, half, columns)
    with limited(level):
        found = ops_int.int_linear(x, *arguments(fmt, tensors), fmt.bits, fmt.group or 0)
    assert found.shape == (2, half, rows)
    assert apart(found, x.double() @ fmt.decode(tensors).double().T) < 1e-6


@needs_library
@levels
def test_nothing_needs_to_be_aligned(level: str) -> None:
    fmt = Int(4, 32)
    tensors, x = stored(fmt, 9, 96), inputs(3, 97)[:, 1:]
    codes, scales, zeros = arguments(fmt, tensors)
    moved = torch.cat([codes.new_zeros(1), codes.reshape(-1)])[1:].reshape(codes.shape)
    halves = torch.cat([scales.new_zeros(1), scales.reshape(-1)])[1:].reshape(scales.shape)
    assert moved.data_ptr() % 16 and halves.data_ptr() % 4
    with limited(level):
        found = ops_int.int_linear(x, moved, halves, zeros, 4, 32)
    assert apart(found, x.double() @ fmt.decode(tensors).double().T) < 1e-5


# Activations of 8 bits


@needs_library
@levels
@SETTINGS
@given(case=cases(), per=st.sampled_from(["token", "group"]))
def test_int8_products_round_as_the_activation_format(
    level: str, case: tuple[Int, int, int, int], per: str
) -> None:
    fmt, rows, columns, vectors = case
    tensors, x = stored(fmt, rows, columns), inputs(vectors, columns)
    product = int8_product(fmt, tensors, x, per)
    with limited(level):
        assert apart(product(), rounded_product(fmt, tensors, x, per)) < 1e-5


@needs_library
@levels
@pytest.mark.parametrize("vectors", [1, 3, 8, 11])
@pytest.mark.parametrize("per", ["token", "group"])
@pytest.mark.parametrize(
    ("group", "columns"), [(64, 576), (128, 1536), (64, 1024), (192, 576), (None, 640), (32, 576)]
)
def test_groups_of_whole_steps_with_int8(
    level: str, group: int | None, columns: int, per: str, vectors: int
) -> None:
    for bits, scale, symmetric in (
        (2, "float16", True), (2, "float16", False), (3, "float16", True), (3, "bfloat16", False),
        (4, "float16", False), (4, "bfloat16", True), (8, "bfloat16", False), (8, "float16", True),
    ):  # fmt: skip
        fmt = Int(bits, group, symmetric, scale_dtype=scale)
        tensors, x = stored(fmt, 37, columns), inputs(vectors, columns)
        product = int8_product(fmt, tensors, x, per)
        with limited(level):
            assert apart(product(), rounded_product(fmt, tensors, x, per)) < 1e-5


def int8_product(
    fmt: Int, tensors: dict[str, torch.Tensor], x: torch.Tensor, per: str
) -> Callable[[], torch.Tensor]:
    """The operator with scales of each token or of every 64 channels."""
    group = fmt.group or 0
    last = (None, fmt.bits, group, ops_int.INPUT_GROUP if per == "group" else 0)
    return lambda: ops_int.int8_linear(x, *arguments(fmt, tensors), *last)


def rounded_product(
    fmt: Int, tensors: dict[str, torch.Tensor], x: torch.Tensor, per: str
) -> torch.Tensor:
    """What that should give."""
    codes, scale = IntActivation(per=per).codes(x)
    return integer_product(fmt, tensors, codes.double() * scale.double())


@needs_library
@levels
@pytest.mark.parametrize("columns", [1, 33, 100, 513])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_sums_are_exact(level: str, bits: int, columns: int) -> None:
    # Scales of one: the result is the integer sum itself, which float32 holds.
    fmt = Int(bits)
    tensors = stored(fmt, 21, columns)
    tensors["weight_scale"].fill_(1.0)
    x = torch.randint(-128, 128, (5, columns), generator=torch.Generator().manual_seed(0)).float()
    with limited(level):
        found = ops_int.int8_linear(x, *arguments(fmt, tensors), torch.ones(1), bits, 0)
    assert torch.equal(found.double(), integer_product(fmt, tensors, x))


@needs_library
@levels
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(level: str, bits: int) -> None:
    fmt = Int(bits)
    tensors = fmt.fit(-torch.ones(4, 256)).encode(torch.ones(4, 256))
    tensors["weight_packed"].fill_(-1)
    tensors["weight_zero_point"].fill_(0)
    tensors["weight_scale"].fill_(1.0)
    x = torch.full((1, 256), -200.0)
    with limited(level):
        found = ops_int.int8_linear(x, *arguments(fmt, tensors), torch.ones(1), bits, 0)
    assert (found == -128 * 256 * ((1 << bits) - 1)).all()


@needs_library
@levels
def test_halves_round_to_even_and_one_scale_may_serve_all(level: str) -> None:
    fmt = Int(8, symmetric=True)
    tensors = fmt.fit(torch.eye(16)).encode(torch.eye(16))
    tensors["weight_scale"].fill_(1.0)
    tensors["weight_packed"].copy_(pack_identity())
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, 0.49] * 2]) * 0.25
    with limited(level):
        found = ops_int.int8_linear(x, *arguments(fmt, tensors), torch.tensor([0.25]), 8, 0)
    assert (found / 0.25)[0, :8].tolist() == [0, 2, 2, 0, -2, 127, -128, 0]


def pack_identity() -> torch.Tensor:
    """Codes of the unit matrix under scales of one: 129 on the diagonal, 128 elsewhere."""
    codes = torch.full((16, 16), 128) + torch.eye(16, dtype=torch.int64)
    return codes.to(torch.uint8).view(torch.int32)


@needs_library
@levels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(level: str, bad: float, bits: int) -> None:
    fmt = Int(bits)
    tensors, x = stored(fmt, 8, 128), inputs(2, 128)
    x[1, 3] = bad
    with limited(level):
        found = ops_int.int8_linear(x, *arguments(fmt, tensors), None, bits, 0)
        groups = ops_int.int8_linear(x, *arguments(fmt, tensors), None, bits, 0, 64)
        plain = ops_int.int_linear(x, *arguments(fmt, tensors), bits, 0)
    for y in (found, groups, plain):
        assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


# Zero points between codes, and scales in integers of each row's unit


@st.composite
def finer_cases(draw: st.DrawFn) -> tuple[int, int, bool, int, int, int, int]:
    """Bits of codes and zero points, whether scales are integers, rows, columns, group, vectors."""
    bits = draw(st.sampled_from((2, 3, 4, 4, 5, 8)))
    zero_bits = draw(st.integers(bits, 8))
    group = draw(st.sampled_from((0, 16, 32, 48, 64, 96, 128)))
    columns = draw(st.sampled_from((64, 128, 320, 576)) | st.integers(1, 300))
    rows, vectors = draw(st.integers(1, 40)), draw(st.just(1) | st.integers(1, 20))
    return bits, zero_bits, draw(st.booleans()), rows, columns, min(group, columns), vectors


@needs_library
@levels
@SETTINGS
@given(case=finer_cases())
def test_finer_zero_points_and_integer_scales(
    level: str, case: tuple[int, int, bool, int, int, int, int]
) -> None:
    bits, zero_bits, integers, rows, columns, group, vectors = case
    g = torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // group) if group else 1
    codes = pack(torch.randint(1 << bits, (rows, columns), generator=g), bits)
    zeros = pack(torch.randint(1 << zero_bits, (groups, rows), generator=g), zero_bits)
    zeros, units = zeros.T.contiguous(), None
    scales = torch.rand(rows, groups, generator=g).half()
    if integers:
        scales = torch.randint(256, (rows, groups), generator=g, dtype=torch.uint8)
        units = torch.rand(rows, generator=g)
    stored = (codes, scales, zeros)
    W = reference.int_rows(*stored, bits, group, columns, None, zero_bits, units)
    x, lib = inputs(vectors, columns), library.library()
    matrix = ops_int.describe(*stored, bits, group, columns, zero_bits, units)
    y, decoded, last = torch.empty(vectors, rows), torch.empty(rows, columns), torch.empty(columns)
    at = (x.data_ptr(), y.data_ptr(), vectors)
    expected = x.double() @ W.double().T
    size = x.norm() * W.norm()  # a sum of few products may cancel
    with limited(level):
        library.check(lib.rarefy_decode(matrix, 0, rows, decoded.data_ptr(), 2))
        ids = torch.tensor([rows - 1])
        library.check(lib.rarefy_decode_rows(matrix, ids.data_ptr(), 1, last.data_ptr(), 1))
        library.check(lib.rarefy_matvec(matrix, *at, 2))
        assert (y - expected).norm() <= 2e-6 * size
        if lib.rarefy_matmul(matrix, *at, 2) != library.UNSUPPORTED:
            assert (y - expected).norm() <= 2e-6 * size
        for per, together in (("token", 0), ("group", 64)):
            rounded, scale = IntActivation(per=per).codes(x)
            expected = (rounded.double() * scale.double()) @ W.double().T
            given = (x.data_ptr(), None, together, y.data_ptr(), vectors)
            library.check(lib.rarefy_matvec_int8(matrix, *given, 2))
            assert (y - expected).norm() <= 2e-6 * size
    assert torch.equal(decoded, W)
    assert torch.equal(last, W[-1])


@needs_library
def test_the_reference_reads_finer_zero_points_by_hand() -> None:
    codes = pack(torch.tensor([[0, 7, 15, 8]]), 4)
    zeros = pack(torch.tensor([[0b01111000]]), 8)  # 7.5
    stored = (codes, torch.tensor([[3]], dtype=torch.uint8), zeros)
    more = (4, 0, 4, None, 8, torch.tensor([0.5]))
    W = reference.int_rows(*stored, *more)
    assert W.tolist() == [[-11.25, -0.75, 11.25, 0.75]]
    x = torch.tensor([[1.0, 2.0, 4.0, -8.0]])
    y = reference.int_linear(x, *stored, 4, 0, 8, torch.tensor([0.5]))
    assert y.tolist() == [[-11.25 - 1.5 + 45 - 6]]


@needs_library
def test_what_no_kernel_reads_is_refused() -> None:
    codes, scales = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.uint8)
    zeros, y = torch.zeros(1, 1, dtype=torch.int32), torch.empty(2)
    call, x = library.library().rarefy_matvec, torch.zeros(8)
    for zero_bits, units in ((3, torch.ones(2)), (9, torch.ones(2)), (4, None)):
        matrix = ops_int.describe(codes, scales, zeros, 4, 0, 8, zero_bits, units)
        assert call(matrix, x.data_ptr(), y.data_ptr(), 1, 1) == library.UNSUPPORTED


# Dense matrices


@needs_library
@levels
@SETTINGS
@given(
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    vectors=st.integers(1, 9),
)
def test_dense_products(
    level: str, dtype: torch.dtype, rows: int, columns: int, vectors: int
) -> None:
    weight = inputs(rows, columns).to(dtype)
    x = inputs(vectors, columns)
    with limited(level):
        found = ops_dense.dense_linear(x, weight)
    assert apart(found, x.double() @ weight.double().T) < 1e-5


# Threads and processes


@needs_library
@pytest.mark.parametrize("own", [False, True])
def test_calls_of_two_threads_do_not_meet(own: bool) -> None:
    if own:
        library.library().rarefy_borrow(None)
    fmt = Int(4, 64)
    tensors = stored(fmt, 600, 256)
    matrix = ops_int.describe(*arguments(fmt, tensors), 4, 64, 256)
    D, wrong = fmt.decode(tensors), []

    def work(seed: int) -> None:
        x = inputs(2, 256) + seed
        y, expected = torch.empty(2, 600), x @ D.T
        for turn in range(50):
            y.zero_()
            library.library().rarefy_matvec(matrix, x.data_ptr(), y.data_ptr(), 2, 1 + turn % 3)
            if apart(y, expected) > 1e-5:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.library().rarefy_borrow(library.torch_threads())
    assert not wrong


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    fmt = Int(4, 64)
    tensors, x, y = stored(fmt, 600, 256), inputs(1, 256), torch.empty(1, 600)
    matrix = ops_int.describe(*arguments(fmt, tensors), 4, 64, 256)
    call = library.library().rarefy_matvec
    call(matrix, x.data_ptr(), y.data_ptr(), 1, 2)
    expected = y.clone()
    child = os.fork()
    if child == 0:
        y.zero_()
        call(matrix, x.data_ptr(), y.data_ptr(), 1, 2)
        os._exit(0 if bool((y == expected).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


# The modules that use them


def packed_linear(
    fmt: Int, rows: int, columns: int, rounding: IntActivation | None = None
) -> PackedLinear:
    module = PackedLinear(fmt, (rows, columns), None, rounding).to_empty(device="cpu")
    for suffix, tensor in stored(fmt, rows, columns).items():
        getattr(module, suffix).copy_(tensor)
    module.bias = torch.nn.Parameter(torch.linspace(-1, 1, rows), requires_grad=False)
    return module


@needs_library
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("rounding", [None, IntActivation(), IntActivation(per="group")])
def test_a_packed_linear_compiles_without_a_break(
    backend: str, rounding: IntActivation | None
) -> None:
    if backend == "inductor" and rounding is None:
        pytest.skip("one run of inductor is enough")
    module = packed_linear(Int(8), 24, 64, rounding)
    x = inputs(6, 64).reshape(2, 3, 64)
    with torch.no_grad():
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), expected)


@needs_library
def test_operators_tell_torch_the_truth_about_themselves() -> None:
    fmt = Int(4, 32)
    tensors = stored(fmt, 9, 96)
    given = (*arguments(fmt, tensors), 4, 32)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops_int.int_linear, (inputs(3, 96), *given), test_utils=checks)
    codes, scales, zeros, bits, group = given
    one = (inputs(3, 96), codes, scales, zeros, torch.ones(1), bits, group)
    torch.library.opcheck(ops_int.int8_linear, one, test_utils=checks)
    groups = (inputs(3, 96), codes, scales, zeros, None, bits, group, 64)
    torch.library.opcheck(ops_int.int8_linear, groups, test_utils=checks)
    ids = torch.tensor([[1, 8]])
    torch.library.opcheck(ops_int.int_rows, (ids, *given, 96), test_utils=checks)
    weight = inputs(5, 96).half()
    torch.library.opcheck(ops_dense.dense_linear, (inputs(3, 96), weight), test_utils=checks)


@needs_library
def test_where_a_gradient_is_wanted_the_reference_runs() -> None:
    module = packed_linear(Int(4, 32), 12, 64)
    x = inputs(2, 64).requires_grad_()
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, module.dense().sum(0).expand(2, 64))
    with torch.no_grad():
        assert not torch.equal(module(x), module(x) + 1) and apart(module(x), y) < 1e-6


@needs_library
def test_modules_name_their_kernel() -> None:
    instructions = library.instructions()
    assert packed_linear(Int(4, 32), 8, 64).kernel == f"int4 x fp32, {instructions}"
    assert packed_linear(Int(8), 8, 64, IntActivation()).kernel == f"int8 x int8, {instructions}"
    by_group = packed_linear(Int(4, 32), 8, 64, IntActivation(per="group"))
    assert by_group.kernel == f"int4 x int8 g64, {instructions}"
    # Six bits, and groups of another size, are rounded first.
    other = packed_linear(Int(8), 8, 64, IntActivation(per="group", group=32))
    assert other.kernel == f"int8 x fp32, {instructions}"
    six = packed_linear(Int(8), 8, 64, IntActivation(6))
    assert six.kernel == f"int8 x fp32, {instructions}"


@needs_library
def test_rounded_activations_of_every_kind() -> None:
    for rounding in (
        IntActivation(), IntActivation(per="tensor"), IntActivation(per="tensor", dynamic=False),
        IntActivation(6),
    ):  # fmt: skip
        module = packed_linear(Int(8, symmetric=True), 12, 64, rounding)
        x = inputs(5, 64)
        if rounding.static:
            module.input_scale = rounding.scale(x.abs().amax(0))
        rounded = rounding.round(x, module.input_scale)
        expected = rounded @ module.dense().T + module.bias
        assert apart(module(x), expected) < 1e-5


@needs_library
def test_an_embedding_and_its_head() -> None:
    fmt = Int(8, 32)
    embedding = PackedEmbedding(fmt, (50, 96)).to_empty(device="cpu")
    for suffix, tensor in stored(fmt, 50, 96).items():
        getattr(embedding, suffix).copy_(tensor)
    ids = torch.tensor([[0, 49, 3], [3, 3, 7]])
    D = embedding.dense()
    assert torch.equal(embedding(ids), D[ids])
    head, x = TiedHead(embedding), inputs(4, 96)
    assert apart(head(x), x.double() @ D.double().T) < 1e-5
    assert head.kernel == embedding.kernel
    with pytest.raises(RarefyError, match="row that is not there"):
        embedding(torch.tensor([50]))


@pytest.mark.parametrize(
    ("setting", "said"), [("off", "RAREFY_KERNELS=off"), ("avx1024", "it may be off")]
)
def test_the_environment_turns_kernels_off(setting: str, said: str) -> None:
    program = (
        "from rarefy.kernels import library as l; "
        "print(l.available(), l.instructions(), l.reason())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"RAREFY_KERNELS": setting},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("False reference") and said in done.stdout
