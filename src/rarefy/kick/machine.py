"""The machine that measured, for whoever reads the figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def machine(device: torch.device) -> dict[str, Any]:
    """Describe this machine: processor, logical cores, bytes of memory, and the device used."""
    cuda = device.type == "cuda"
    return {
        "cpu": next(_processors(), "") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
    }


def _processors() -> Iterator[str]:
    """Model names of the processors, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(errors="replace").splitlines() if info.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            yield value.strip()
