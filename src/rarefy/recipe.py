"""Recipes: YAML in, checked stages out.

A recipe is a list of stages. A stage names a solver, gives its options, and a scheme table: ordered
globs over the names of weight matrices, first match wins.

    name: mixed
    description: 8 bits where it hurts, 4 elsewhere
    stages:
      - solver: gptq
        damping: 0.01
        schemes:
          "*.mlp.down_proj": {format: int, bits: 8, group: 64}
          "lm_head": {format: int, bits: 8}
          "model.layers.0.*": keep
          "*": {format: int, bits: 4, group: 64}

A bare ``*`` means every linear of the decoder blocks. Embeddings and the output head are left
alone unless a pattern spells them out. Everything is checked before anything is computed.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, Format
from rarefy.registry import suggest
from rarefy.solvers.base import SOLVERS, Solver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KEEP = "keep"


@dataclass(frozen=True)
class Stage:
    """One step from checkpoint to checkpoint.

    Attributes:
        solver: how each matrix is solved.
        schemes: (glob, format or None to keep), first match wins.
    """

    solver: Solver
    schemes: tuple[tuple[str, Format | None], ...]

    def scheme_for(self, name: str, *, inside: bool) -> Format | None:
        """The format of the matrix called ``name``, or None to leave it alone.

        Args:
            name: module path, ``model.layers.0.mlp.down_proj``.
            inside: whether it is a linear of a decoder block; a bare ``*`` means only those.
        """
        for pattern, scheme in self.schemes:
            if (pattern == "*" and inside) or (pattern != "*" and fnmatchcase(name, pattern)):
                return scheme
        return None


@dataclass(frozen=True)
class Recipe:
    """A named list of stages.

    Attributes:
        name: file name without suffix, or the recipe's own ``name``.
        description: one sentence.
        stages: in order.
        source: the recipe as plain data, for the manifest and the hash.
    """

    name: str
    description: str
    stages: tuple[Stage, ...]
    source: dict[str, Any]

    @property
    def needs_data(self) -> bool:
        """Whether any stage reads calibration data."""
        return any(stage.solver.needs_gram for stage in self.stages)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str = ""
    stages: list[dict[str, Any]]


def presets() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    packaged = Path(str(resources.files("rarefy"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_recipe(ref: str | Path) -> Recipe:
    """Read a preset by name or a recipe file by path, and check it.

    Raises:
        RarefyError: no such recipe, not YAML, or a key or value that does not fit.
    """
    known = presets()
    path = known.get(str(ref), Path(ref))
    if not path.is_file():
        raise RarefyError(f"there is no recipe {str(ref)!r}{suggest(str(ref), list(known))}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        flat = " ".join(str(error).split())
        raise RarefyError(f"{path} is not valid YAML: {flat}") from error
    if not isinstance(data, dict):
        raise RarefyError(f"{path} must be a mapping with the key stages")
    return parse_recipe(data, path.stem)


def parse_recipe(data: dict[str, Any], name: str) -> Recipe:
    """Check a recipe given as plain data; see :func:`load_recipe`."""
    try:
        document = _Document.model_validate(data)
    except ValidationError as error:
        raise RarefyError(f"recipe {name}: {_sentence(error)}") from error
    if not document.stages:
        raise RarefyError(f"recipe {name}: stages is empty; give at least one")
    stages = tuple(
        _stage(stage, f"recipe {name}, stage {i}") for i, stage in enumerate(document.stages, 1)
    )
    return Recipe(document.name or name, document.description, stages, data)


def _sentence(error: ValidationError) -> str:
    # A misspelt key is also a missing one; the misspelling is what the reader must hear of.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(_Document.model_fields), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known: name, description, stages"
        return f"unknown key {key!r}; {hint}"
    return f"{key}: {first['msg'].lower()}"


def _stage(data: Mapping[str, Any], where: str) -> Stage:
    options = dict(data)
    solver = options.pop("solver", None)
    schemes = options.pop("schemes", None)
    if solver is None:
        near = difflib.get_close_matches("solver", list(options), n=1)
        hint = f"; did you mean 'solver' where it says {near[0]!r}?" if near else ""
        raise RarefyError(f"{where}: the key solver is missing{hint}")
    if not isinstance(schemes, dict) or not schemes:
        raise RarefyError(f"{where}: give schemes, a mapping from name patterns to formats")
    built = SOLVERS.build(str(solver), options, where)
    return Stage(built, tuple((str(p), _scheme(s, f"{where}, {p!r}")) for p, s in schemes.items()))


def _scheme(data: object, where: str) -> Format | None:
    if data == KEEP:
        return None
    if not isinstance(data, dict) or "format" not in data:
        raise RarefyError(f"{where}: give 'keep' or a mapping with the key format")
    options = {k: v for k, v in data.items() if k != "format"}
    return FORMATS.build(str(data["format"]), options, where)


def describe(fmt: Format) -> dict[str, Any]:
    """A format as plain data, the inverse of reading it from a recipe."""
    return {"format": FORMATS.name_of(fmt), **dataclasses.asdict(fmt)}  # type: ignore[call-overload]


def format_from(data: Mapping[str, Any]) -> Format:
    """Build a format from :func:`describe`'s output."""
    options = {k: v for k, v in data.items() if k != "format"}
    return FORMATS.build(str(data["format"]), options, "stored format")


def iterate_formats(recipe: Recipe) -> Iterator[Format]:
    """Every format that the recipe mentions."""
    for stage in recipe.stages:
        yield from (scheme for _, scheme in stage.schemes if scheme is not None)
