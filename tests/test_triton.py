"""Kernels for GPUs against the torch reference; without a GPU, in triton's interpreter.

All of it is skipped where triton is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from rarefy.errors import RarefyError
from rarefy.formats.integer import Int

ON_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined

from rarefy.kernels import ops_cuda, ops_int, reference  # noqa: E402
from rarefy.kernels.triton.integer import product  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def check(fmt: Int, shape: tuple[int, int], vectors: int, dtype: torch.dtype) -> None:
    """Compare with a product in float64 of what the reference decodes."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=g)
    packed = fmt.fit(weight).encode(weight)
    x = torch.randn(vectors, shape[1], generator=g).to(dtype)
    want = F.linear(x.double(), fmt.decode(packed).to(dtype).double())
    stored = (packed[f"weight_{name}"] for name in ("packed", "scale"))
    words, scales = (tensor.to(DEVICE) for tensor in stored)
    zeros = None if fmt.symmetric else packed["weight_zero_point"].to(DEVICE)
    got = product(x.to(DEVICE), words, scales, zeros, fmt.bits, fmt.group)
    assert got.dtype == dtype
    error = (got.cpu().double() - want).norm() / want.norm()
    # The interpreter cuts bits off where GPUs round to bfloat16.
    cut = not ON_GPU and torch.bfloat16 in (dtype, scales.dtype)
    assert error < (1e-2 if cut else ROUNDING[dtype])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("vectors", [1, 3, 17])
def test_whole_groups(bits: int, symmetric: bool, vectors: int) -> None:
    check(Int(bits, 64, symmetric), (96, 256), vectors, torch.float32)


@pytest.mark.parametrize("shape", [(1, 8), (33, 100), (70, 131), (5, 65)])
@pytest.mark.parametrize("group", [None, 8, 5, 1])
@pytest.mark.parametrize("vectors", [2, 5])
def test_ragged_shapes_and_odd_groups(
    shape: tuple[int, int], group: int | None, vectors: int
) -> None:
    for bits in (4, 8):
        check(Int(bits, group), shape, vectors, torch.float32)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("vectors", [1, 70])
def test_types(stored: str, dtype: torch.dtype, vectors: int) -> None:
    if not ON_GPU and vectors > 1 and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no product of bfloat16 matrices")
    for bits in (4, 8):
        check(Int(bits, 128, scale_dtype=stored), (80, 384), vectors, dtype)


def test_leading_dimensions_and_other_widths() -> None:
    fmt = Int(4, 32)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    packed = {name: t.to(DEVICE) for name, t in fmt.fit(weight).encode(weight).items()}
    x = torch.randn(2, 3, 64, device=DEVICE)
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    stored = [packed[name] for name in names]
    flat = product(x.reshape(6, 64), *stored, 4, 32)
    torch.testing.assert_close(product(x, *stored, 4, 32).reshape(6, 24), flat)
    with pytest.raises(RarefyError, match="3 bits"):
        product(x, *stored, 3, 32)


def stored_as(fmt: Int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    packed = fmt.fit(weight).encode(weight)
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    words, scales, zeros = (packed[n].to(DEVICE) if n in packed else None for n in names)
    assert words is not None
    assert scales is not None
    return words, scales, zeros


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [0, 32])
def test_the_operator_of_gpus(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU as torch dispatches it; else called by name. Widths without a kernel are decoded."""
    monkeypatch.setattr(ops_cuda, "available", lambda: True)
    stored = stored_as(Int(bits, group or None))
    x = torch.randn(2, 7, 96, device=DEVICE)
    call = ops_int.int_linear if ON_GPU else ops_cuda.cuda_int_linear
    want = reference.int_linear(x, *stored, bits, group)
    torch.testing.assert_close(call(x, *stored, bits, group), want, rtol=1e-5, atol=1e-4)


_COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rarefy.kernels.triton import integer
constants = {"BITS": 4, "GROUP": 32, "SYMMETRIC": False, "ROWS": 16}
few = constants | {"BLOCK": 64}
many = constants | {"BLOCK": 32, "VECTORS": 16}
pointers = {"x": "*bf16", "y": "*bf16", "words": "*i32", "zeros": "*i32", "scales": "*fp16"}
for kernel, chosen in ((integer._few_vectors, few), (integer._many_vectors, many)):
    types = {n: "constexpr" if n in chosen else pointers.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=chosen)
    made = compile(source, target=GPUTarget("cuda", 80, 32))
    print(len(made.asm["cubin"]))
"""


def test_kernels_compile_for_gpus_that_are_not_there() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]
