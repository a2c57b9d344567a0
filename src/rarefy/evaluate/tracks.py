"""LLMCBench's six tracks: one number each for what a recipe costs and what it saves.

Every quantity i of a track becomes a ratio of compressed to dense, above 1 when the compressed
model is better, averaged over models:

    r_i = mean(compressed / dense)      or mean(dense / compressed) where lower is better
    OM  = 100 sqrt(mean_i r_i^2)

The quadratic mean rewards an outlier: one saving by four lifts a whole track. So the geometric
mean, on the same scale, and the ratios themselves stand beside it. This is our reading; the
paper's normalisation of each track is not published with its code.

Source: Yang et al., LLMCBench, NeurIPS 2024 (arXiv 2410.21352).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Entry = Mapping[str, Any]

TRACKS = (
    "performance",
    "generalization",
    "training consumption",
    "inference consumption",
    "acceleration",
    "trust",
)
_TRAINING = {"time": "compress_s", "memory": "compress_peak_bytes"}
_INFERENCE = {"size": "disk_bytes", "peak memory": "peak_bytes", "flops": "flops"}


@dataclass(frozen=True)
class Track:
    """One track of one recipe.

    Attributes:
        om: LLMCBench's overall metric; 100 is the dense model.
        geometric: 100 times the geometric mean of the ratios.
        ratios: by name, above 1 where the compressed model is better.
    """

    om: float
    geometric: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A recipe applied to one model.

    Attributes:
        entry, dense: of the compressed and of the dense model, with "cost" (a Cost as plain data)
            and "tasks" (TaskDamage as plain data, by task).
        family: of the model, for the track of generalization.
        best: least of any recipe on this model: "compress_s" and "compress_peak_bytes".
    """

    entry: Entry
    dense: Entry
    family: str = ""
    best: Mapping[str, float] = field(default_factory=dict)


def tracks(runs: Sequence[Run], abilities: Mapping[str, str | None]) -> dict[str, Track | None]:
    """Score one recipe.

    A task on which the dense model is hardly above chance has nothing to lose and is left out.

    Args:
        runs: the recipe on one or several models.
        abilities: of each task: "knowledge", "inference", "trust" or None.

    Returns:
        By track; None where nothing was measured, and for generalization with one model.
    """
    ratios: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in TRACKS}
    for run in runs:
        for task, relative in _relatives(run.entry):
            ability = abilities.get(task)
            if ability == "trust":
                ratios["trust"][task].append(relative)
            elif ability is not None:
                ratios["performance"][ability].append(relative)
                if len(runs) > 1:
                    ratios["generalization"][run.family].append(relative)
        own, dense = run.entry["cost"], run.dense["cost"]
        _add(ratios["training consumption"], _TRAINING, run.best, own)
        _add(ratios["inference consumption"], _INFERENCE, dense, own)
        _add(ratios["acceleration"], {"decode": "decode_tok_s"}, own, dense)
    return {name: _track(ratios[name]) for name in TRACKS}


def least(entries: Iterable[Entry]) -> dict[str, float]:
    """Return the least time and memory that any of a model's compressions took.

    Args:
        entries: those of the compressed models.
    """
    costs = [entry["cost"] for entry in entries]
    found = {key: [c[key] for c in costs if c.get(key)] for key in _TRAINING.values()}
    return {key: min(values) for key, values in found.items() if values}


def _relatives(entry: Entry) -> Iterable[tuple[str, float]]:
    for task, damage in entry["tasks"].items():
        if damage["sensitive"] and damage["relative"] is not None:
            yield task, damage["relative"]


def _add(track: dict[str, list[float]], keys: Mapping[str, str], over: Entry, under: Entry) -> None:
    """Note ``over / under`` for every quantity that both sides have."""
    for name, key in keys.items():
        if over.get(key) and under.get(key):
            track[name].append(over[key] / under[key])


def _track(ratios: Mapping[str, Sequence[float]]) -> Track | None:
    if not ratios:
        return None
    means = {name: sum(values) / len(values) for name, values in ratios.items()}
    squares = sum(r * r for r in means.values()) / len(means)
    return Track(
        om=100 * math.sqrt(squares),
        geometric=100 * math.prod(means.values()) ** (1 / len(means)),
        ratios=means,
    )
