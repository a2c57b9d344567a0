"""What one job is to do, as plain data that fits in a file and travels to another machine.

A job's folder holds everything that the job reads: ``spec.json``, the recipe as ``recipe.yaml``
and the user's own tasks. Editing a recipe afterwards therefore changes nothing that has begun.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from rarefy.checkpoint.writer import write_json
from rarefy.engine.compress import Calibration  # noqa: TC001  (pydantic reads it)
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

DENSE = "dense"
SPEC, RECIPE, LOG, LOCK, MODEL = "spec.json", "recipe.yaml", "job.log", "job.lock", "model"
QUALITY, JOURNAL, RECORDS = "quality.json", "journal.jsonl", "records.jsonl"
COST, RESULT = "cost.json", "result.json"


@dataclass(frozen=True)
class Spec:
    """One job: compress, evaluate, score, count the cost.

    Attributes:
        recipe: its name; "dense" for the model as it is.
        source: the recipe as plain data; None for the dense model.
        model: the reference, a local one by its absolute path. fingerprint: of its weights.
        calibration: text for recipes that need data.
        text, windows, length: held-out text for perplexity and KL.
        tasks: task -> number of items, None for all. versions: of those tasks.
        local: the user's task files in the job's folder -> sha256 of each.
        speed: rounds of the speed measurement. energy: whether it is measured.
        dola: layers that DoLa contrasts while questions are asked, "low" or "high"; None: no DoLa.
        threads: of PyTorch; fixed, since sums in another order round differently.
        rarefy: version of this package.
    """

    recipe: str
    source: dict[str, Any] | None
    model: str
    fingerprint: str
    calibration: Calibration
    text: str
    windows: int
    length: int
    tasks: dict[str, int | None]
    versions: dict[str, int]
    local: dict[str, str]
    speed: int
    energy: bool
    threads: int
    rarefy: str
    dola: str | None = None

    @property
    def decisive(self) -> dict[str, Any]:
        """Everything that decides the result: not where the model lies."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del plain["model"]
        return plain

    @property
    def key(self) -> str:
        """Hash of everything that decides the result."""
        text = json.dumps(self.decisive, sort_keys=True)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the job's folder: the recipe's, with what file systems dislike replaced."""
        return re.sub(r"[^\w.@=,+-]+", "_", self.recipe).lstrip(".") or "_"


def read_spec(folder: Path) -> Spec:
    """Read the specification in a job's folder.

    Raises:
        RarefyError: there is none, or it is none of this version.
    """
    try:
        return TypeAdapter(Spec).validate_json((folder / SPEC).read_bytes())
    except (OSError, ValidationError) as error:
        raise RarefyError(
            f"{folder} holds no {SPEC} of this version; choose another --out or give --fresh"
        ) from error


def write_spec(folder: Path, spec: Spec) -> None:
    """Write ``spec.json`` and ``recipe.yaml`` (JSON, which is YAML too)."""
    if spec.source is not None:
        write_json(folder / RECIPE, spec.source)
    write_json(folder / SPEC, asdict(spec))


def differences(one: Spec, other: Spec) -> str:
    """Name the fields in which two specifications differ: "windows 4, now 16"."""
    old, new = one.decisive, other.decisive
    changed = [name for name in new if old[name] != new[name]]
    short = {name: (str(old[name]), str(new[name])) for name in changed}
    return "; ".join(
        f"{name} {before}, now {after}" if len(before + after) < 60 else f"another {name}"
        for name, (before, after) in short.items()
    )
