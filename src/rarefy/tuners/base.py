"""The tuner role: numbers moved by gradient, within a structure that stays.

A **block tuner** learns inside one decoder block, against the outputs of the dense block: SignRound
learns how to round, OmniQuant where to clip, norm tweaking the norms. A **model tuner** says which
numbers of the whole model move while an objective is lowered: adapters, scales, or all weights.

Both are frozen dataclasses. What moves is built by ``begin`` and ``adapt`` and belongs to the
engine, which owns the loop (``engine/fit.py``), the data, the masks of earlier stages and the
files. The conformance suite checks for every registered tuner that without a step nothing changes
beyond rounding, that the loss which it lowers falls, and that what is not declared to move is kept
bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from rarefy.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rarefy.engine.fit import Loop
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format, Grid, Packed
    from rarefy.statistics import Moments

Groups = list[dict[str, Any]]
"""Parameter groups as optimizers take them: ``params``, ``lr`` and other options."""


class Tuner(ABC):
    """Moves numbers by gradient; subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        needs: statistics of the linears' inputs ("gram", "moments") that it wants to see first.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def loop(self) -> Loop:
        """How many steps, how large, and how the learning rates fall."""

    def optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """What turns gradients into steps."""
        return torch.optim.AdamW(groups, weight_decay=0.0)


@dataclass(frozen=True)
class Start:
    """Where one matrix of a block begins.

    Attributes:
        weight: W, float [out, in].
        grid: the grid that it is to lie on.
        support: where it may differ from zero, bool [out, in]; None when everywhere.
        moments: of its input's channels, if the tuner asked for them.
    """

    weight: torch.Tensor
    grid: Grid
    support: torch.Tensor | None = None
    moments: Moments | None = None


@dataclass(frozen=True)
class FoldableEdge:
    """Channels whose scale may be moved from one side to the other.

    Attributes:
        name: of the edge.
        writers: parameter path -> rows or entries that write channel c, at index c.
        readers: parameter path -> for every column, the channel that it reads, int64 [in].
        width: number of channels.
        offsets: what is added to a norm's weight before it multiplies (Gemma's 1), where not 0.
    """

    name: str
    writers: dict[str, torch.Tensor]
    readers: dict[str, torch.Tensor]
    width: int
    offsets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockView:
    """What a block tuner sees of a block.

    Attributes:
        name: its path, for messages.
        index, depth: its position, and the number of blocks.
        matrices: path of a linear below the block -> where it begins.
        others: parameter path -> value of everything else: norms, biases, dense matrices.
        norms: the entries of ``others`` that are weights of norms.
        edges: whose scale may be moved, with both sides' parameters.
    """

    name: str
    index: int
    depth: int
    matrices: Mapping[str, Start]
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    edges: tuple[FoldableEdge, ...] = ()


@dataclass(frozen=True)
class Tuned:
    """What a block has become.

    Attributes:
        matrices: path of a linear -> (weight on its grid, grid).
        others: parameter path -> new value, of what moved beside them.
        facts: remarks for the manifest, JSON-ready.
    """

    matrices: dict[str, tuple[torch.Tensor, Grid]]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class BlockTuning(ABC):
    """The numbers of one block that move, and the block's parameters as a function of them."""

    @property
    @abstractmethod
    def groups(self) -> Groups:
        """The leaves, with their learning rates."""

    @abstractmethod
    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameter path -> value that the block is to run with, differentiable in the leaves.

        Matrices of linears as [out, in] under ``<path>.weight``.
        """

    @abstractmethod
    def finish(self) -> Tuned:
        """The members of the formats that the leaves have led to."""


class BlockTuner(Tuner):
    """Learns one block at a time.

    Attributes:
        stream: what the dense block that is to be matched was fed: "dense", outputs of the dense
            blocks before it, or "prefix", those of the compressed ones.
        rounds: whether it brings matrices into their formats; otherwise these stay as they are.
    """

    stream: Literal["dense", "prefix"] = "dense"
    rounds: ClassVar[bool] = True

    @abstractmethod
    def begin(self, block: BlockView) -> BlockTuning:
        """Make the numbers that move, at their start."""

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What is lowered: by default the mean squared error of the block's output [B, L, h]."""
        return F.mse_loss(output, target)


@dataclass(frozen=True)
class MatrixView:
    """What a model tuner sees of one linear.

    Attributes:
        name: full module path.
        weight: W as it is now, float [out, in].
        grid: the grid that it lies on, None for a dense matrix.
        support: where it may differ from zero, bool [out, in]; None when everywhere.
        scheme: the format that the stage asks for, None when it asks for none.
        packed: its stored tensors, None for a dense matrix.
        seed: for whatever is drawn at random.
    """

    name: str
    weight: torch.Tensor
    grid: Grid | None = None
    support: torch.Tensor | None = None
    scheme: Format | None = None
    packed: Packed | None = None
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of one matrix.

    Attributes:
        weight: float [out, in]; None if the stored tensors stay as they are.
        grid: what it lies on; None for a dense matrix.
        adapter: tensors that are saved apart, in peft's names (``lora_A.weight``).
    """

    weight: torch.Tensor | None = None
    grid: Grid | None = None
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


class Adapter(nn.Module, ABC):
    """One linear's matrix as a function of frozen and moving numbers.

    Parameters that require a gradient move. Frozen tensors are buffers.
    """

    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """W that the model runs with, float [out, in], differentiable in the parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T`` for x [..., in]."""
        return F.linear(x, self.matrix())

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """What the model goes on with, from ``forward``'s result with the linear's bias added."""
        return y

    def constrain(self) -> None:
        """Put the parameters back where they have to be, after every step."""

    @abstractmethod
    def finish(self) -> Outcome:
        """What is to be stored."""


class ModelTuner(Tuner):
    """Says which numbers of a model move.

    Attributes:
        rounds: whether it brings matrices into the formats of the stage's schemes.
    """

    rounds: ClassVar[bool] = False

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The largest learning rate."""

    @abstractmethod
    def adapt(self, matrix: MatrixView) -> Adapter | None:
        """What a linear becomes while it is trained; None leaves it frozen."""

    def moving(self, shape: tuple[int, int], form: Format | None) -> int:
        """How many numbers of a linear [out, in] move at most, before anything is read.

        Args:
            shape: (out, in). form: how it is stored, None for a dense matrix.
        """
        return shape[0] * shape[1]

    def moves(self, name: str, norm: bool) -> bool:
        """Whether a parameter outside the linears moves, too.

        Args:
            name: full parameter path. norm: whether it belongs to a norm.
        """
        return False

    def activation(self, name: str, given: Activation | None) -> Activation | None:
        """How the input of a linear is rounded in training; by default as it is stored."""
        return given


TUNERS: Registry[Tuner] = Registry("tuner", Tuner, "rarefy.tuners")  # type: ignore[type-abstract]
