"""``rarefy bench``: how fast a model runs and how much memory it takes, beside the dense one.

Every measurement is a fresh process. The models take turns, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.hardware import peaks
from rarefy.evaluate.speed import measure, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rarefy.evaluate.speed import Speed

ROUNDED = "this, 8-bit inputs"


@dataclass(frozen=True)
class Load:
    """What each measurement does.

    Attributes:
        prompt_tokens: length of the prompt. new_tokens: made after it, at least 2.
        threads: of the CPU; PyTorch's default when None.
        rounds: processes of each model. runs: timed in each process, after one that is not.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    threads: int | None = None
    rounds: int = 2
    runs: int = 2


@dataclass(frozen=True)
class Row:
    """One model under one engine.

    Attributes:
        name: of the row. speed: over all rounds.
        share: of the measured read bandwidth that making tokens uses.
    """

    name: str
    speed: Speed
    share: float


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        rows: the model first.
        read_bandwidth: bytes per second of reading memory, with the same threads.
    """

    rows: tuple[Row, ...]
    read_bandwidth: float

    def report(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def bench(
    model: str,
    against: str | None = None,
    load: Load = Load(),
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    int8: bool = False,
) -> Bench:
    """Measure a model, and the dense one natively and in transformers if it is named.

    Args:
        model: what ``resolve`` takes. against: the dense model.
        load: what each measurement does.
        tell: called with measurements done and in all.
        int8: measure the model also with the inputs of its integer matrices rounded to 8 bits.

    Raises:
        RarefyError: a model is missing, or its process failed.
    """
    folder = resolve(model)
    jobs: list[tuple[str, Path, str, bool]] = [("this", folder, "native", False)]
    if int8:
        jobs.append((ROUNDED, folder, "native", True))
    if against is not None:
        dense = resolve(against)
        jobs += [("dense", dense, "native", False)]
        jobs += [("dense, transformers", dense, "transformers", False)]
    found: dict[str, list[Speed]] = {name: [] for name, *_ in jobs}
    total = load.rounds * len(jobs)
    for number in range(total):
        tell(number, total)
        name, folder, engine, rounded = jobs[number % len(jobs)]
        size = (load.prompt_tokens, load.new_tokens, load.threads, load.runs)
        found[name].append(measure(folder, *size, engine, rounded))
    tell(total, total)
    best = _bandwidth(load.threads)
    merged = {name: merge(speeds) for name, speeds in found.items()}
    rows = (Row(name, speed, speed.bandwidth / best) for name, speed in merged.items())
    return Bench(tuple(rows), best)


def _bandwidth(threads: int | None) -> float:
    """Bytes per second of reading memory on some threads."""
    with _threads(threads):
        return peaks(torch.device("cpu")).bandwidth


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
