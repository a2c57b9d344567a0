"""A tiny model, a text, two task files and three recipes, for the tests of the leaderboard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from tiny import save_tiny

from rarefy.engine.compress import Calibration
from rarefy.kick import job
from rarefy.kick.profiles import Profile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ROUND = {"solver": "nearest", "schemes": {"*": {"format": "int", "bits": 2, "group": 32}}}
PRUNE = {"solver": "wanda", "schemes": {"*": {"format": "sparse", "sparsity": 0.5}}}
TOO_MANY = {"surgery": "shortgpt", "blocks": 9}
QUESTIONS = 12


def make(folder: Path) -> Path:
    """Fill a folder with ``dense``, ``text.jsonl``, task files and recipes; return it."""
    save_tiny("llama", folder / "dense", max_position_embeddings=512)
    words = [f"{a} {b} {c}." for a in ("red", "blue") for b in ("sea", "sky") for c in range(400)]
    documents = [json.dumps({"text": " ".join(words[i::8])}) for i in range(8)]
    (folder / "text.jsonl").write_text("\n".join(documents))
    choices = [
        {"question": f"What is {n}?", "choices": [f"w{n}", f"{n}x", "z"], "answer": n % 3}
        for n in range(QUESTIONS)
    ]
    texts = [{"text": f"{n} green bottles"} for n in range(4)]
    for name, rows in (("quiz", choices), ("songs", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, stage in (("round", ROUND), ("prune", PRUNE), ("cut", TOO_MANY)):
        recipe = {"description": f"{name}, for a test", "stages": [stage]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def profile(folder: Path, **changes: Any) -> Profile:
    """The least that can be measured."""
    data = Calibration(str(folder / "text.jsonl"), 2, 64)
    least = {"text": str(folder / "text.jsonl"), "windows": 2, "length": 64, "speed": 0}
    return Profile("tiny", (), "full", data, **least | changes)


def run_here(
    folders: Sequence[Path], *, workers: int, keep: bool, tell: Any
) -> dict[Path, str | None]:
    """Stands in for processes, whose start takes seconds each."""
    outcome: dict[Path, str | None] = {}
    for folder in folders:
        try:
            job.run(folder, keep=keep)
            outcome[folder] = None
        except Exception as error:
            outcome[folder] = str(error)
        tell(folder.name, "job", 1, 1)
    return outcome
