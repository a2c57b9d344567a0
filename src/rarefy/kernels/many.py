"""Products of many vectors: compiled, or by strips of the decoded matrix in torch."""

from __future__ import annotations

import ctypes
import threading

import torch

from rarefy.kernels import library

_STRIP = 1 << 22  # weights of a strip, where the matrix has no less
_room = threading.local()  # memory for a strip; fresh pages would cost more than decoding


def multiply_many(matrix: library.Matrix, vectors: torch.Tensor, y: torch.Tensor) -> None:
    """``y = x W^T``.

    Args:
        matrix: describes W [m, n]; whoever made it keeps what it points to.
        vectors: x, float32 [N, n], contiguous.
        y: float32 [N, m], contiguous, written to.

    Raises:
        RarefyError: the library refuses the matrix.
    """
    at, threads = ctypes.byref(matrix), torch.get_num_threads()
    places = (vectors.data_ptr(), y.data_ptr(), vectors.shape[0])
    status = library.library().rarefy_matmul(at, *places, threads)
    if status != library.UNSUPPORTED:
        library.check(status)
        return
    rows, columns = matrix.rows, matrix.columns
    strip = min(rows, max(32, _STRIP // columns // 32 * 32))
    weight = _memory(strip * columns).view(strip, columns)
    decode = library.library().rarefy_decode
    for start in range(0, rows, strip):
        stop = min(rows, start + strip)
        library.check(decode(at, start, stop, weight.data_ptr(), threads))
        torch.mm(vectors, weight[: stop - start].T, out=y[:, start:stop])


def _memory(numbers: int) -> torch.Tensor:
    """This thread's own float32 memory, which lives on for the next call."""
    held: torch.Tensor | None = getattr(_room, "held", None)
    if held is None or held.numel() < numbers:
        held = _room.held = torch.empty(numbers)
    return held[:numbers]
