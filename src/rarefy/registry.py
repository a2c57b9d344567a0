"""One generic registry: methods announce themselves by a decorator and are found by a package scan.

Import errors propagate: a method that cannot be imported is a defect, not an absence.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

T = TypeVar("T")


@dataclass(frozen=True)
class Card(Generic[T]):
    """What the catalogue knows of a registered class.

    Attributes:
        name: the key in recipes and on the command line.
        role: the registry's role ("format", "solver", ...).
        family: the survey's family ("quantization", "pruning", ...).
        paper: citation, empty when the entry implements no single paper.
        arxiv: arXiv id, or empty.
        cls: the registered frozen dataclass; its fields are the options.
    """

    name: str
    role: str
    family: str
    paper: str
    arxiv: str
    cls: type[T]

    @property
    def file(self) -> str:
        """Source file below the package, for example ``solvers/gptq.py``."""
        path = Path(inspect.getfile(self.cls)).resolve()
        root = Path(__file__).resolve().parent
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name

    @property
    def options(self) -> dict[str, object]:
        """Field name -> default of every hyper-parameter (``...`` where it must be given)."""
        return {f.name: _default(f) for f in dataclasses.fields(self.cls)}  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ...


def suggest(word: str, known: list[str]) -> str:
    """Return ``'; did you mean X?'`` or the list of what is known, to close an error sentence."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


class Registry(Generic[T]):
    """Name -> frozen dataclass, for one role.

    Args:
        role: what the entries are ("solver"), used in messages.
        base: every entry must derive from it.
        package: scanned once, on the first look-up, so that adding a method is adding a file.
    """

    def __init__(self, role: str, base: type[T], package: str) -> None:
        self.role = role
        self._base = base
        self._package = package
        self._cards: dict[str, Card[T]] = {}
        self._scanned = False

    def register(
        self, name: str, *, family: str, paper: str = "", arxiv: str = ""
    ) -> Callable[[type[T]], type[T]]:
        """Class decorator: announce a frozen dataclass under ``name``.

        Raises:
            TypeError: the class is not a frozen dataclass derived from the role's base.
            ValueError: the name is taken.
        """

        def add(cls: type[T]) -> type[T]:
            params = getattr(cls, "__dataclass_params__", None)
            if params is None or not params.frozen or not issubclass(cls, self._base):
                raise TypeError(
                    f"{cls.__qualname__} must be a frozen dataclass derived from "
                    f"{self._base.__name__} to be registered as a {self.role}"
                )
            if name in self._cards:
                raise ValueError(
                    f"the {self.role} name {name!r} is taken by {self._cards[name].cls}"
                )
            self._cards[name] = Card(name, self.role, family, paper, arxiv, cls)
            return cls

        return add

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__, f"{self._package}."):
            importlib.import_module(module.name)

    def __iter__(self) -> Iterator[Card[T]]:
        self._scan()
        return iter(sorted(self._cards.values(), key=lambda c: c.name))

    def card(self, name: str) -> Card[T]:
        """Return the entry called ``name``.

        Raises:
            RarefyError: no such entry; the sentence suggests a neighbour.
        """
        self._scan()
        if name not in self._cards:
            raise RarefyError(
                f"there is no {self.role} called {name!r}{suggest(name, list(self._cards))}"
            )
        return self._cards[name]

    def holds(self, thing: object) -> bool:
        """Whether an object is an instance of a registered class."""
        self._scan()
        return any(card.cls is type(thing) for card in self._cards.values())

    def name_of(self, thing: T) -> str:
        """Return the registered name of an instance."""
        self._scan()
        return next(c.name for c in self._cards.values() if c.cls is type(thing))

    def build(self, name: str, options: Mapping[str, object], where: str) -> T:
        """Build the entry ``name`` from plain options, refusing unknown and badly typed ones.

        Args:
            name: a registered name.
            options: field -> value, as read from YAML.
            where: the place in the recipe, for the error sentence.

        Raises:
            RarefyError: an unknown, missing or unacceptable option.
        """
        card = self.card(name)
        known = card.options
        for key in options:
            if key not in known:
                raise RarefyError(
                    f"{where}: {key!r} is not an option of the {self.role} {name!r}"
                    f"{suggest(key, list(known))}"
                )
        missing = [k for k, v in known.items() if v is ... and k not in options]
        if missing:
            raise RarefyError(f"{where}: the {self.role} {name!r} needs {', '.join(missing)}")
        hints = {field.name: field.type for field in dataclasses.fields(card.cls)}  # type: ignore[arg-type]
        for key, value in options.items():
            if not _fits(value, str(hints.get(key, "object"))):
                raise RarefyError(
                    f"{where}: {key} of the {self.role} {name!r} must be {hints[key]}, "
                    f"and {value!r} is not"
                )
        try:
            return card.cls(**options)
        except ValueError as error:
            raise RarefyError(f"{where}: {error}") from error


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}


def _fits(value: object, annotation: str) -> bool:
    """Whether a YAML scalar fits a simple annotation such as ``int | None``."""
    parts = [part.strip() for part in annotation.split("|")]
    if any(part not in _KINDS for part in parts):
        return True
    if isinstance(value, bool):
        return "bool" in parts
    return any(isinstance(value, _KINDS[part]) for part in parts)
