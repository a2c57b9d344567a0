"""Helpers for transforms: planted outliers, one transform stage alone, and what it was shown."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tiny import save_tiny

from rarefy.checkpoint.load import load_model
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.writer import Writer
from rarefy.data.tokens import TokenSet
from rarefy.engine.absorb import run_transform
from rarefy.engine.stage import StageRun, Watcher
from rarefy.evaluate.planted import plant
from rarefy.stages import Scheme, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rarefy.formats.base import Format
    from rarefy.transforms.base import EdgeView, Scaling, Transform

IDS = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(5))


def planted(family: str, folder: Path, kappa: float, **overrides: Any) -> Path:
    """A tiny model's folder with outlier channels of size ``kappa``."""
    name = f"{family}-planted-{kappa:g}"
    plant(save_tiny(family, folder / f"{name}-source", **overrides), folder / name, kappa)
    return folder / name


def transformed(
    source: Path,
    out: Path,
    transform: Transform,
    fmt: Format | None = None,
    watcher: Watcher = Watcher(),  # noqa: B008  (frozen)
) -> Path:
    """Run one transform stage; ``fmt`` is what the matrices are to be rounded to afterwards."""
    stage = Stage(transform, () if fmt is None else (("*", Scheme(fmt)),))
    tokens = TokenSet(IDS, torch.arange(len(IDS)), "test", "", "")
    writer = Writer(out, "key")
    run = StageRun(Checkpoint(source), stage, tokens, writer, watcher, torch.device("cpu"))
    run_transform(run, {"key": "key"})
    return out


@contextmanager
def watching(cls: type[Transform]) -> Iterator[list[tuple[EdgeView, Scaling | None]]]:
    """Collect what a transform is shown, and what it answers."""
    seen: list[tuple[EdgeView, Scaling | None]] = []
    fit = cls.fit

    def watched(self: Transform, edge: EdgeView) -> Scaling | None:
        kept = replace(edge, readers=tuple(W.clone() for W in edge.readers))
        answer = fit(self, edge)
        seen.append((kept, answer))
        return answer

    cls.fit = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        cls.fit = fit  # type: ignore[method-assign]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """fp32 logits of a folder on the calibration rows, opened as a user would."""
    found: torch.Tensor = load_model(folder, torch.device("cpu"))(IDS, use_cache=False).logits
    return found


def moved(folder: Path, other: Path) -> float:
    """Largest change of any logit as a share of the largest logit."""
    a, b = logits(folder), logits(other)
    return float((a - b).abs().max() / a.abs().max())


def write_recipe(folder: Path, *stages: dict[str, Any], name: str = "recipe") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"stages": list(stages)}, sort_keys=False))
    return file


def write_text(folder: Path) -> Path:
    """Some pseudo-random words to calibrate on."""
    g = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=g).tolist()
    file = folder / "words.txt"
    file.write_text("".join(" " if i % 6 == 5 else chr(c) for i, c in enumerate(letters)))
    return file
