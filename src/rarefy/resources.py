"""Threads and memory of this process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run small operations on one thread.

    Waking a second thread costs more than a few thousand elements are worth, and on a busy machine
    each such wake-up waits for the scheduler: a column sweep was seen to take a hundred times
    longer with two threads than with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "gnu_get_libc_version") else None


def return_unused_pages() -> None:
    """Give the pages between live pieces of the heap back to the system.

    Small freed pieces pile up to hundreds of megabytes of resident but unused memory over a long
    walk. Takes milliseconds; does nothing where the C library is not glibc.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def return_freed_memory(size: int) -> None:
    """Have freed tensors of at least ``size`` bytes go back to the system at once.

    glibc keeps freed pieces of up to 32 MB for later use. Fresh pages cost time, so this is for
    models whose matrices are large. Does nothing where the C library is another one.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, size)
        libc.mallopt(_M_ARENA_MAX, 1)  # a heap for every thread would keep its own leftovers


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes.

    Linux's ``ru_maxrss`` survives exec and so starts at the parent's peak; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
