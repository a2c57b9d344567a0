"""The compiled library: found, loaded and limited; and the C descriptor of a stored matrix.

``RAREFY_KERNELS`` limits what is used: ``off`` (the torch reference), ``portable``, ``avx2`` or
``avx512``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rarefy.errors import RarefyError

FILE = Path(__file__).with_name("librarefy_kernels.so")

F32, F16, BF16, INT, BCQ, BITMASK, TWO_FOUR = range(7)
SCALE_F32, SCALE_F16, SCALE_BF16, SCALE_U8 = range(4)

_CHOICES = ("off", "portable", "avx2", "avx512")


class Matrix(ctypes.Structure):
    """Mirror of ``rarefy_matrix`` in ``csrc/matrix.h``, which describes the fields."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("words_per_row", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("units", ctypes.c_void_p),
        ("zero_bits", ctypes.c_int32),
    )


_I64, _INT, _AT = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_MATRIX = ctypes.POINTER(Matrix)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rarefy_matvec": (_INT, (_MATRIX, _AT, _AT, _I64, _INT)),
    "rarefy_matmul": (_INT, (_MATRIX, _AT, _AT, _I64, _INT)),
    "rarefy_matvec_int8": (_INT, (_MATRIX, _AT, _AT, _I64, _AT, _I64, _INT)),
    "rarefy_decode": (_INT, (_MATRIX, _I64, _I64, _AT, _INT)),
    "rarefy_decode_rows": (_INT, (_MATRIX, _AT, _I64, _AT, _INT)),
    "rarefy_instructions": (ctypes.c_char_p, ()),
    "rarefy_limit": (ctypes.c_char_p, (ctypes.c_char_p,)),
    "rarefy_soft_round": (_INT, (_AT, _AT, _AT, _AT, _INT)),
    "rarefy_soft_round_back": (_INT, (_AT, _AT, _AT, _AT, _AT, _AT, _INT)),
    "rarefy_borrow": (None, (_AT,)),
    "rarefy_read": (ctypes.c_uint64, (_AT, _I64, _INT)),
}


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    wanted = os.environ.get("RAREFY_KERNELS", "")
    if wanted and wanted not in _CHOICES:
        return None, f"RAREFY_KERNELS is {wanted!r}; it may be {', '.join(_CHOICES)}"
    if wanted == "off":
        return None, "RAREFY_KERNELS=off"
    if not FILE.is_file():
        return None, "not compiled when rarefy was installed; install a C++ compiler, then rarefy"
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as problem:
        return None, f"the library does not load: {problem}"
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return None, f"{FILE.name} lacks {name}: it is of another version; install rarefy again"
        function.restype, function.argtypes = result, arguments
    library.rarefy_borrow(torch_threads())
    return library, ""


def torch_threads() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch brought along, if it did.

    Its threads spin for milliseconds after every parallel operation of torch; threads of our own
    would have to share the cores with them.
    """
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        function = getattr(ctypes.CDLL(str(file)), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


UNSUPPORTED = 1


def check(status: int) -> None:
    """Raise what a status of the library means."""
    if status:
        problem = {
            UNSUPPORTED: "has no kernel for this matrix",
            2: "was given a row that is not there",
            3: "has no memory left",
        }.get(status, f"failed with status {status}")
        raise RarefyError(f"the compiled library {problem}; RAREFY_KERNELS=off avoids it")


def available() -> bool:
    """Whether compiled kernels run."""
    return _open()[0] is not None


def reason() -> str:
    """Why they do not; empty when they do."""
    return _open()[1]


def library() -> ctypes.CDLL:
    """The loaded library; ask :func:`available` first."""
    found, problem = _open()
    assert found is not None, problem
    return found


def instructions() -> str:
    """What the kernels use: "avx512-vnni", "avx2" or "portable"; "reference" without a library."""
    return str(library().rarefy_instructions().decode()) if available() else "reference"


def limit(name: str) -> str:
    """Allow no better instructions than "portable", "avx2" or "avx512"; return what is then used.

    For tests and measurements: it holds for the whole process.
    """
    return str(library().rarefy_limit(name.encode()).decode())
