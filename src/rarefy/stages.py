"""What a recipe says, once it is checked: stages, and what each is given.

``recipe.py`` reads these from YAML.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rarefy.solvers.base import SOLVERS, Solver
from rarefy.surgery.base import SURGERIES, Surgery
from rarefy.transforms.base import TRANSFORMS, Transform
from rarefy.tuners.base import TUNERS, Tuner

if TYPE_CHECKING:
    from rarefy.allocate.base import Allocator
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format
    from rarefy.objectives.base import Objective
    from rarefy.registry import Registry

ROLES: dict[str, Registry[Any]] = {
    "solver": SOLVERS,
    "transform": TRANSFORMS,
    "surgery": SURGERIES,
    "tuner": TUNERS,
}
_KINDS: dict[str, type] = {
    "solver": Solver, "transform": Transform, "surgery": Surgery, "tuner": Tuner,
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored, and how its input is rounded while the model runs.

    Attributes:
        weight: format of the matrix.
        input: format of the activations that it multiplies; None leaves them alone.
    """

    weight: Format
    input: Activation | None = None


@dataclass(frozen=True)
class Text:
    """What a model tuner is trained on, if not on the calibration rows.

    Attributes:
        rows, length: token rows, and tokens of each, drawn from the calibration's corpus; the
            documents are in another order than for calibration.
        file: prompts and completions (JSON Lines) instead; only completions count.
        pool: of so many times the rows of a step, those are taken whose loss exceeds the dense
            model's by most; 1 takes all.
        uniform: share of a step's rows that is drawn from the pool blindly all the same.

    Raises:
        ValueError: a field outside its values.
    """

    rows: int = 256
    length: int = 256
    file: str | None = None
    pool: int = 1
    uniform: float = 0.2

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 2 or self.pool < 1:
            raise ValueError("rows and pool must be at least 1, and length at least 2")
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform must lie in [0, 1], and {self.uniform} does not")


_SCORES = ("restoration", "local", "random")


@dataclass(frozen=True)
class Priority:
    """Which half-blocks a model tuner may move; see ``engine/priority.py``.

    Attributes:
        share: of all half-blocks.
        by: "restoration", "local", or "random" for a control.
        least: the least damaged ones instead, for another control.
        rows: calibration rows that damage is measured on.
        seed: of a random choice.

    Raises:
        ValueError: a field outside its values.
    """

    share: float = 0.2
    by: str = "restoration"
    least: bool = False
    rows: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], and {self.share} does not")
        if self.by not in _SCORES:
            raise ValueError(f"by must be one of {', '.join(_SCORES)}, not {self.by!r}")
        if self.rows < 1:
            raise ValueError("rows must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One step from checkpoint to checkpoint.

    Attributes:
        method: a solver, a transform, a surgery or a tuner.
        schemes: (glob, scheme or None to keep), first match wins. A transform has the table of
            the solver stage that follows it, so that it knows what it prepares for.
        allocator: shares the formats' budgets out among the matrices; None leaves them uniform.
        objective: what a model tuner lowers; None for the divergence from the dense model.
        text: what it is trained on; None for the calibration rows.
        priority: what of the model it may move; None for everything that the method moves.
    """

    method: Solver | Transform | Surgery | Tuner
    schemes: tuple[tuple[str, Scheme | None], ...] = ()
    allocator: Allocator | None = None
    objective: Objective | None = None
    text: Text | None = None
    priority: Priority | None = None

    @property
    def role(self) -> str:
        """The method's role: "solver", "transform", "surgery" or "tuner"."""
        return next(role for role, kind in _KINDS.items() if isinstance(self.method, kind))

    @property
    def rounds(self) -> bool:
        """Whether matrices are brought into formats, so that their weights may not be changed."""
        return self.role == "solver" or bool(self.schemes)

    @property
    def name(self) -> str:
        """The method's name in its registry."""
        return ROLES[self.role].name_of(self.method)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the stage reads; any of them needs calibration data."""
        static = any(s and s.input and s.input.static for _, s in self.schemes)
        moments = frozenset({"moments"} if static and self.role == "solver" else ())
        return self.method.needs | moments

    @property
    def needs_data(self) -> bool:
        """Whether the stage reads calibration data."""
        allocated = self.allocator is not None and self.allocator.needs
        return bool(self.role == "tuner" or self.needs or allocated)

    def scheme_for(self, name: str, *, inside: bool) -> Scheme | None:
        """The scheme of the matrix called ``name``, or None to leave it alone.

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
        return any(stage.needs_data for stage in self.stages)
