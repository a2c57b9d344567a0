"""Recipes: YAML in, checked stages out.

A recipe is a list of stages. A stage names a method by its role and gives the method's options:

    name: mixed
    description: smooth first; then 8 bits where it hurts, 4 elsewhere
    stages:
      - transform: smoothquant
        alpha: 0.5
      - solver: gptq
        damping: 0.01
        schemes:
          "*.mlp.down_proj": {format: int, bits: 8, group: 64}
          "lm_head": {format: int, bits: 8}
          "model.layers.0.*": keep
          "*": {format: int, bits: 4, group: 64, input: {format: int, bits: 8}}

The roles are ``solver`` (with ``schemes``, and ``allocate`` if layers are to differ),
``transform``, ``surgery`` and ``tuner`` (with ``schemes`` if it brings matrices into a format;
without them it goes on with what earlier stages made). A tuner of the whole model may name its
``objective``, for example ``{method: distil, distance: {method: jsd, beta: 0.5}}``, and the size of
its own training ``text``, ``{rows: 400, length: 256}``. A scheme table has ordered globs over the
names of weight matrices, first match wins. A bare ``*`` means every linear of the decoder blocks;
embeddings and the output head are left alone unless a pattern spells them out. Everything is
checked before anything is computed.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rarefy.allocate.base import ALLOCATORS, Allocator
from rarefy.errors import RarefyError
from rarefy.formats.activation import ACTIVATIONS, Activation
from rarefy.formats.base import FORMATS, Format
from rarefy.losses.base import LOSSES
from rarefy.objectives.base import OBJECTIVES, Objective
from rarefy.registry import suggest
from rarefy.signals.base import SIGNALS
from rarefy.stages import ROLES, Priority, Recipe, Scheme, Stage, Text
from rarefy.tuners.base import ModelTuner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rarefy.registry import Registry

KEEP = "keep"
_T = TypeVar("_T")
_WITH_SCHEMES = ("solver", "tuner")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str = ""
    stages: list[dict[str, Any]]


def presets() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    folder = Path(__file__).with_name("recipes")
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_recipe(ref: str | Path) -> Recipe:
    """Read a preset by name or a recipe file by path, and check it.

    Args:
        ref: ``wanda-50``, ``mine.yaml``, or either with other values for options that it sets,
            ``wanda-50@sparsity=0.3`` or ``gptq-int4-g64@bits=3,group=32``.

    Raises:
        RarefyError: no such recipe, not YAML, or a key or value that does not fit.
    """
    known = presets()
    path, edits = known.get(str(ref), Path(ref)), ""
    if not path.is_file():
        base, _, edits = str(ref).partition("@")
        path = known.get(base, Path(base))
    if not path.is_file():
        raise RarefyError(f"there is no recipe {str(ref)!r}{suggest(str(ref), list(known))}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        flat = " ".join(str(error).split())
        raise RarefyError(f"{path} is not valid YAML: {flat}") from error
    if not isinstance(data, dict):
        raise RarefyError(f"{path} must be a mapping with the key stages")
    if not edits:
        return parse_recipe(data, path.stem)
    for edit in edits.split(","):
        key, _, value = edit.partition("=")
        if not value or not _replace(data.get("stages"), key.strip(), yaml.safe_load(value)):
            raise RarefyError(
                f"recipe {ref}: {edit!r} is not key=value with a key that {path.stem} sets"
            )
    name = f"{path.stem}@{edits}"
    return parse_recipe(data | {"name": name}, name)


def _replace(data: object, key: str, value: object) -> bool:
    """Set ``key`` wherever plain data has it; whether it has it anywhere."""
    if isinstance(data, list):
        return sum(_replace(item, key, value) for item in data) > 0
    if not isinstance(data, dict):
        return False
    below = sum(_replace(item, key, value) for item in data.values())
    if key in data:
        data[key] = value
    return key in data or below > 0


def parse_recipe(data: dict[str, Any], name: str) -> Recipe:
    """Check a recipe given as plain data; see :func:`load_recipe`."""
    try:
        document = _Document.model_validate(data)
    except ValidationError as error:
        raise RarefyError(f"recipe {name}: {_sentence(error)}") from error
    if not document.stages:
        raise RarefyError(f"recipe {name}: stages is empty; give at least one")
    stages = [
        _stage(stage, f"recipe {name}, stage {i}") for i, stage in enumerate(document.stages, 1)
    ]
    _check_order(stages, name)
    for i, stage in enumerate(stages):
        if stage.role == "transform":
            table = next((s.schemes for s in stages[i:] if s.schemes), ())
            stages[i] = dataclasses.replace(stage, schemes=table)
    return Recipe(document.name or name, document.description, tuple(stages), data)


def _check_order(stages: list[Stage], name: str) -> None:
    """Transforms and surgeries change weights, so they come before anything is rounded."""
    solved = 0
    for i, stage in enumerate(stages, 1):
        if stage.rounds:
            solved = solved or i
        elif solved and stage.role != "tuner":
            raise RarefyError(
                f"recipe {name}: stage {i} ({stage.name}) would change weights that stage {solved} "
                "has brought into their format; put it first"
            )


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
    roles = [role for role in ROLES if role in options]
    if len(roles) > 1:
        raise RarefyError(f"{where}: {' and '.join(roles)} in one stage; give each a stage")
    if not roles:
        near = [m for key in options for m in difflib.get_close_matches(key, list(ROLES), n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        *most, last = ROLES
        known = f"{', '.join(most)} or {last}"
        raise RarefyError(f"{where}: the key {known} is missing{hint}")
    [role] = roles
    name = str(options.pop(role))
    schemes, allocate = options.pop("schemes", None), options.pop("allocate", None)
    training = {key: options.pop(key, None) for key in ("objective", "text", "priority")}
    if role not in _WITH_SCHEMES and schemes is not None:
        raise RarefyError(f"{where}: schemes belongs to a solver or tuner stage; a {role} has none")
    if role not in _WITH_SCHEMES and allocate is not None:
        raise RarefyError(
            f"{where}: allocate belongs to a solver or tuner stage; a {role} has none"
        )
    wanted = role == "solver" or schemes is not None
    if wanted and (not isinstance(schemes, dict) or not schemes):
        raise RarefyError(f"{where}: give schemes, a mapping from name patterns to formats")
    method = ROLES[role].build(name, options, where)
    if allocate is not None and (schemes is None or isinstance(method, ModelTuner)):
        raise RarefyError(
            f"{where}: allocate shares out what the schemes of a block-wise stage take, and {name} "
            "has none; leave it out"
        )
    stray = next((key for key, value in training.items() if value is not None), None)
    if stray is not None and not isinstance(method, ModelTuner):
        raise RarefyError(f"{where}: {stray} belongs to a tuner of the whole model, not to {name}")
    table = ((str(p), _scheme(s, f"{where}, {p!r}")) for p, s in (schemes or {}).items())
    return Stage(
        method,
        tuple(table),
        _allocator(allocate, where),
        _objective(training["objective"], f"{where}, objective"),
        _plain(Text, training["text"], f"{where}, text"),
        _plain(Priority, training["priority"], f"{where}, priority"),
    )


def _objective(data: object, where: str) -> Objective | None:
    built: Objective | None = None if data is None else _named(OBJECTIVES, data, where)
    return built


_NESTED: dict[str, Registry[Any]] = {"Signal": SIGNALS, "Loss": LOSSES, "Objective": OBJECTIVES}


def _named(registry: Registry[Any], data: object, where: str) -> Any:
    """An entry from its name, or from a mapping with the key ``method``; nested ones likewise."""
    data = {"method": data} if isinstance(data, str) else data
    if not isinstance(data, dict) or "method" not in data:
        raise RarefyError(f"{where}: give a name, or a mapping with the key method")
    name = str(data["method"])
    hints = {field.name: field.type for field in dataclasses.fields(registry.card(name).cls)}
    options = {
        key: _named(_NESTED[str(hints[key])], value, f"{where}, {key}")
        if str(hints.get(key)) in _NESTED
        else value
        for key, value in data.items()
        if key != "method"
    }
    return registry.build(name, options, where)


def _plain(kind: type[_T], data: object, where: str) -> _T | None:
    """A dataclass from a mapping."""
    if data is None:
        return None
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(data, dict):
        raise RarefyError(f"{where} must be a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise RarefyError(f"{where}: unknown key {key!r}{suggest(str(key), known)}")
    try:
        return kind(**data)
    except (TypeError, ValueError) as error:
        raise RarefyError(f"{where}: {error}") from error


def _allocator(data: object, where: str) -> Allocator | None:
    if data is None:
        return None
    if not isinstance(data, dict) or "method" not in data:
        raise RarefyError(f"{where}: allocate must be a mapping with the key method")
    options = {k: v for k, v in data.items() if k != "method"}
    return ALLOCATORS.build(str(data["method"]), options, f"{where}, allocate")


def _scheme(data: object, where: str) -> Scheme | None:
    if data == KEEP:
        return None
    if not isinstance(data, dict) or "format" not in data:
        raise RarefyError(f"{where}: give 'keep' or a mapping with the key format")
    rest = {k: v for k, v in data.items() if k != "input"}
    rounding = data.get("input")
    if rounding is not None and (not isinstance(rounding, dict) or "format" not in rounding):
        raise RarefyError(f"{where}: input must be a mapping with the key format")
    activation = None if rounding is None else _build(ACTIVATIONS, rounding, f"{where}, input")
    return Scheme(_build(FORMATS, rest, where), activation)


def _build(registry: Registry[Any], data: Mapping[str, Any], where: str) -> Any:
    """An entry from plain data; options that are formats themselves are built first."""
    options = {
        key: _build(FORMATS, value, f"{where}, {key}")
        if isinstance(value, dict) and "format" in value
        else value
        for key, value in data.items()
        if key != "format"
    }
    return registry.build(str(data["format"]), options, where)


def describe(fmt: Format | Activation) -> dict[str, Any]:
    """A format as plain data, the inverse of reading it from a recipe."""
    registry: Registry[Any] = FORMATS if isinstance(fmt, Format) else ACTIVATIONS
    fields = ((f.name, getattr(fmt, f.name)) for f in dataclasses.fields(fmt))  # type: ignore[arg-type]
    return {"format": registry.name_of(fmt)} | {
        name: describe(value) if isinstance(value, Format) else value for name, value in fields
    }


def format_from(data: Mapping[str, Any]) -> Format:
    """Build a format from :func:`describe`'s output."""
    fmt: Format = _build(FORMATS, data, "stored format")
    return fmt


def activation_from(data: Mapping[str, Any]) -> Activation:
    """Build an activation format from :func:`describe`'s output."""
    activation: Activation = _build(ACTIVATIONS, data, "stored activation format")
    return activation


def iterate_formats(recipe: Recipe) -> Iterator[Format]:
    """Every format that the recipe mentions, those inside others included."""

    def walk(fmt: Format) -> Iterator[Format]:
        yield fmt
        for f in dataclasses.fields(fmt):  # type: ignore[arg-type]
            if isinstance(inner := getattr(fmt, f.name), Format):
                yield from walk(inner)

    for stage in recipe.stages:
        for _, scheme in stage.schemes:
            if scheme is not None:
                yield from walk(scheme.weight)


def iterate_objectives(recipe: Recipe) -> Iterator[tuple[Registry[Any], Any]]:
    """Every objective that the recipe mentions, and what it is made of, with their registries."""

    def walk(part: Any) -> Iterator[tuple[Registry[Any], Any]]:
        registry = next((r for r in _NESTED.values() if r.holds(part)), None)
        if registry is not None:
            yield registry, part
            for f in dataclasses.fields(part):
                yield from walk(getattr(part, f.name))

    for stage in recipe.stages:
        yield from walk(stage.objective)
