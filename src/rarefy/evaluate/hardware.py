"""What this device can do at best, measured, so that use of it (MFU, MBU) has a stated base.

A datasheet's figure is no base on a shared or virtual machine. The fastest of several runs is
taken: the least disturbed one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from rarefy.checkpoint.load import default_device

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS = 0.4  # of each measurement
# Side of the matrices: enough to fill the device, and small enough for several in the time.
_SIDE_CPU, _SIDE_ACCELERATOR = 1024, 8192
_READ = 1 << 29  # bytes: beyond the last-level cache of most processors


@dataclass(frozen=True)
class Peaks:
    """The device at its best.

    Attributes:
        flops: floating-point operations per second of a float32 matrix product.
        bandwidth: bytes per second of reading memory.
        device: its name. threads: of the CPU.
    """

    flops: float
    bandwidth: float
    device: str
    threads: int


def peaks(device: torch.device | None = None) -> Peaks:
    """Measure a device, once in a process for each number of threads; takes about a second.

    Args:
        device: the one that torch reports by default.
    """
    return _measured(device or default_device(), torch.get_num_threads())


@cache
def _measured(device: torch.device, threads: int) -> Peaks:
    side = _SIDE_CPU if device.type == "cpu" else _SIDE_ACCELERATOR
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    matrix = torch.ones(_READ // 4 // 8192, 8192, device=device)
    vector = torch.ones(8192, device=device)
    flops = 2 * side**3 / _best(lambda: a @ b, device)
    # A matrix times a vector reads every entry once, as making one token does.
    bandwidth = matrix.nbytes / _best(lambda: matrix @ vector, device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else device.type
    return Peaks(flops, bandwidth, name, threads)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the runs that fit the time, after one to warm up."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    runs, end = [timed()], time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        runs.append(timed())
    return min(runs)
