"""Energy per token, from counters where the machine has them, else from codecarbon's model.

Measured: the CPU package's counters (RAPL) or, for a model on an NVIDIA GPU, that GPU's. What they
say of an idle machine is subtracted. Modelled: load times rated power, and a constant for memory;
a virtual machine has nothing else, and the figure is then little more than another view of time.

Nothing leaves the machine and no file is written: the tracker is the offline one, without outputs,
and emissions are not asked for.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rarefy.checkpoint.load import default_device

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Source = Literal["measured", "modelled", "none"]

_JOULES = 3.6e6  # per kWh


@dataclass(frozen=True)
class Energy:
    """Energy of a workload.

    Attributes:
        joules_per_token: None when it could not be had.
        source: where the figure comes from. detail: the same for a reader.
        runs, seconds: how often and how long the workload ran.
    """

    joules_per_token: float | None
    source: Source
    detail: str
    runs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Reading:
    """Joules by part, as codecarbon saw them."""

    cpu: float
    gpu: float
    ram: float
    runs: int
    seconds: float


def energy(
    work: Callable[[], object],
    tokens: int,
    *,
    seconds: float = 10.0,
    device: torch.device | None = None,
) -> Energy:
    """Repeat a workload under codecarbon and divide by its tokens.

    Args:
        work: reads or makes ``tokens`` tokens; it must have finished when it returns.
        tokens: of one call.
        seconds: how long to repeat it, at least; power is sampled every second.
        device: where the model is; the default device when None.

    Returns:
        The energy; source "none" without codecarbon (extra ``energy``) or without a reading.
    """
    try:
        import codecarbon  # noqa: F401
    except ImportError:
        return Energy(None, "none", "codecarbon is not installed: pip install 'rarefy[energy]'")
    counter = _counter(device or default_device())
    work()
    reading = _watch(work, seconds)
    total = reading.cpu + reading.gpu + reading.ram
    if counter:
        idle = _watch(lambda: time.sleep(0.1), seconds / 2)
        rest = getattr(idle, counter) / idle.seconds * reading.seconds
        total = getattr(reading, counter) - rest
    if total <= 0:
        return Energy(None, "none", "codecarbon gave no reading", reading.runs, reading.seconds)
    return Energy(
        joules_per_token=total / (tokens * reading.runs),
        source="measured" if counter else "modelled",
        detail=_DETAIL[counter],
        runs=reading.runs,
        seconds=reading.seconds,
    )


_DETAIL = {
    "cpu": "counters of the CPU package (RAPL), idle power subtracted",
    "gpu": "counters of the GPU (NVML), idle power subtracted; the CPU is not included",
    "": "codecarbon's model: CPU load times rated power, and a constant for memory",
}


def _counter(device: torch.device) -> str:
    """The part whose counters can be read and which does the work; empty for none."""
    from codecarbon.core.cpu import is_rapl_available
    from codecarbon.core.gpu import is_nvidia_system

    if device.type == "cuda":
        return "gpu" if is_nvidia_system() else ""
    return "cpu" if device.type == "cpu" and is_rapl_available() else ""


def _watch(work: Callable[[], object], seconds: float) -> _Reading:
    """Repeat something for a while and read the energy of it."""
    tracker = _tracker()
    tracker.start()
    start, runs = time.perf_counter(), 0
    try:
        while not runs or time.perf_counter() - start < seconds:
            work()
            runs += 1
    finally:
        spent = time.perf_counter() - start
        tracker.stop()
    found = getattr(tracker, "final_emissions_data", None)
    cpu, gpu, ram = (getattr(found, f"{part}_energy", 0.0) for part in ("cpu", "gpu", "ram"))
    return _Reading(_JOULES * cpu, _JOULES * gpu, _JOULES * ram, runs, spent)


def _tracker() -> Any:
    """A tracker that keeps to itself, whatever the user's own codecarbon settings say."""
    from codecarbon import OfflineEmissionsTracker

    # Its first messages come before it reads its own log level.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return OfflineEmissionsTracker(
        country_iso_code="FRA",
        force_carbon_intensity_g_co2e_kwh=0,  # a stated intensity is not looked up
        electricitymaps_api_token=None,
        emissions_endpoint=None,
        output_methods=[],
        output_handlers=[],
        log_level="critical",
        tracking_mode="process",
        measure_power_secs=1,
        allow_multiple_runs=True,
    )
