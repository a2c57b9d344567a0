"""What a model costs: its size, its operations, its speed, and what making it took.

Size comes from the folder's files, counts from the loaded weights, speed from a process of its
own. Use of the device is stated against peaks measured on it (see ``hardware.py``):

    MFU = operations per second while reading the prompt / peak operations per second
    MBU = bytes of weights, keys and values per second while making tokens / peak bandwidth

Weights count with the bytes that are resident: a matrix that runs packed counts packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.evaluate.flops import count
from rarefy.evaluate.hardware import peaks

if TYPE_CHECKING:
    from rarefy.evaluate.energy import Energy
    from rarefy.evaluate.flops import Counts
    from rarefy.evaluate.footprint import Footprint
    from rarefy.evaluate.hardware import Peaks
    from rarefy.evaluate.speed import Speed

LENGTH = 512


@dataclass(frozen=True)
class Measured:
    """What was measured elsewhere; None where it was not.

    Attributes:
        speed: of the model. energy: of making or reading tokens.
        compress_s, compress_peak_bytes: of the compression, "seconds" and "peak_memory_bytes" of
            its manifest.
        peaks: of the device; measured here when None.
    """

    speed: Speed | None = None
    energy: Energy | None = None
    compress_s: float | None = None
    compress_peak_bytes: int | None = None
    peaks: Peaks | None = None


@dataclass(frozen=True)
class Cost:
    """Everything about a model but its quality; ``asdict`` gives plain JSON.

    Attributes:
        parameters: learned scalars, tied ones once; nonzero: those not zero when executed.
        linear_parameters: of the matrices inside the blocks.
        disk_bytes, ratio_16bit, ratio_stored, bits_linear, bits_model: see ``Footprint``.
        flops, flops_effective: per token at a context of ``tokens``, zeros multiplied or skipped.
        ttft_s, prefill_tok_s, decode_tok_s, peak_bytes: see ``Speed``.
        latency_s: from the request to the last token, for the lengths of the speed measurement.
        mfu, mbu: shares of ``peak_flops`` (per second, float32) and ``peak_bandwidth`` (bytes
            per second), measured on this device.
        energy_source: "measured", "modelled" or "none".
    """

    parameters: int
    nonzero: int
    linear_parameters: int
    disk_bytes: int
    ratio_16bit: float
    ratio_stored: float | None
    bits_linear: float | None
    bits_model: float
    flops: int
    flops_effective: int
    tokens: int
    ttft_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    latency_s: float | None
    peak_bytes: int | None
    mfu: float | None
    mbu: float | None
    peak_flops: float
    peak_bandwidth: float
    compress_s: float | None
    compress_peak_bytes: int | None
    joules_per_token: float | None
    energy_source: str


def cost(
    model: Any,
    size: Footprint,
    measured: Measured = Measured(),
    tokens: int = LENGTH,
) -> Cost:
    """Put together what a model costs.

    Args:
        model: loaded. size: of its folder, with the dense model as source.
        measured: what else is known.
        tokens: context length at which operations are stated.

    Raises:
        RarefyError: the model's config does not say how wide it is.
    """
    counts, best = count(model), measured.peaks or peaks(model.device)
    speed, energy = measured.speed, measured.energy
    return Cost(
        parameters=counts.parameters,
        nonzero=counts.nonzero,
        linear_parameters=counts.linear,
        disk_bytes=size.disk_bytes,
        ratio_16bit=size.ratio_16bit,
        ratio_stored=size.ratio_stored,
        bits_linear=size.bits_linear,
        bits_model=size.bits_model,
        flops=counts.flops(tokens),
        flops_effective=counts.flops_effective(tokens),
        tokens=tokens,
        ttft_s=speed.ttft_s if speed else None,
        prefill_tok_s=speed.prefill_tok_s if speed else None,
        decode_tok_s=speed.decode_tok_s if speed else None,
        latency_s=_latency(speed) if speed else None,
        peak_bytes=speed.peak_bytes if speed else None,
        mfu=_mfu(counts, speed, best) if speed else None,
        mbu=_mbu(counts, speed, best) if speed else None,
        peak_flops=best.flops,
        peak_bandwidth=best.bandwidth,
        compress_s=measured.compress_s,
        compress_peak_bytes=measured.compress_peak_bytes,
        joules_per_token=energy.joules_per_token if energy else None,
        energy_source=energy.source if energy else "none",
    )


def _latency(speed: Speed) -> float:
    return speed.ttft_s + (speed.new_tokens - 1) / speed.decode_tok_s


def _mfu(counts: Counts, speed: Speed, best: Peaks) -> float:
    # The speed measurement asks for the last position's logits only.
    return counts.flops_prefill(speed.prompt_tokens) / speed.ttft_s / best.flops


def _mbu(counts: Counts, speed: Speed, best: Peaks) -> float:
    """Bytes per token at the mean context of the tokens that were made."""
    context = speed.prompt_tokens + speed.new_tokens / 2
    bytes_per_token = counts.read_bytes + counts.cache_bytes * context
    return bytes_per_token * speed.decode_tok_s / best.bandwidth
