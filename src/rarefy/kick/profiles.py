"""Profiles: how much is compressed and measured, so that two leaderboards are comparable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rarefy.engine.compress import Calibration
from rarefy.errors import RarefyError
from rarefy.registry import suggest


@dataclass(frozen=True)
class Profile:
    """What every job of a leaderboard has in common.

    Attributes:
        name: in files and titles.
        recipes: run when the user names none; see :mod:`rarefy.kick.choose`.
        items: which of the catalogue's item counts, and with them which tasks.
        calibration: text for recipes that need data; the seed is replaced by the run's.
        text, windows, length: held-out text for perplexity and KL.
        speed: rounds of measuring latency, decode rate and peak memory, each in a process of its
            own; 0 for none, and a single one is short. energy: measure joules per token.
        limit: of items per task, beside what ``items`` says; None for none.
    """

    name: str
    recipes: tuple[str, ...]
    items: Literal["smoke", "full"]
    calibration: Calibration
    text: str = "wiki"
    windows: int = 16
    length: int = 512
    speed: int = 2
    energy: bool = False
    limit: int | None = None


_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_PRUNERS = ("magnitude-50", "wanda-50", "sparsegpt-50")

SMOKE = Profile(
    name="smoke",
    # Every family once, and only what compresses the default model within half a minute.
    recipes=(
        "rtn-int4-g64@bits=8",
        "rtn-int4-g64",
        "rtn-int3-g64",
        "magnitude-50",
        "wanda-50",
        "shortgpt-6",
        "l2-20",
        "svd-80",
    ),
    items="smoke",
    calibration=Calibration(sequences=8, length=512),
    windows=2,
    speed=1,
)
FULL = Profile(
    name="full",
    recipes=(
        "rtn-w8a8",
        "rtn-int4-g64",
        "rtn-int3-g64",
        "awq-int4-g64",
        "gptq-int4-g64",
        "gptq-int3-g64",
        *(f"{pruner}@sparsity={level}" for pruner in _PRUNERS for level in _LEVELS),
        "wanda-2of4",
        "sparsegpt-2of4",
        "svd-llm-80",
        "shortgpt-6",
        "llm-pruner-20",
        "wanda-2of4-gptq-int4-g64",
    ),
    items="full",
    calibration=Calibration(),
    energy=True,
)
PROFILES = {profile.name: profile for profile in (SMOKE, FULL)}


def find_profile(name: str) -> Profile:
    """Return a profile by name.

    Raises:
        RarefyError: there is none of that name.
    """
    if name not in PROFILES:
        raise RarefyError(f"there is no profile {name!r}{suggest(name, list(PROFILES))}")
    return PROFILES[name]
