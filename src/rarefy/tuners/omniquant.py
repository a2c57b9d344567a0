"""OmniQuant: learn where to clip the weights and how to share a channel's size with them.

Paper: Shao, Chen, Zhang, Xu, Zhao, Li, Zhang, Gao, Qiao, Luo, *OmniQuant: Omnidirectionally
Calibrated Quantization for Large Language Models*, ICLR 2024, arXiv 2308.13137.

    clipping (LWC)          a group of W spans  beta min(W) .. gamma max(W),   beta, gamma in (0, 1)
    transformation (LET)    Y = (X / s) (s W^T),   1 / s absorbed into what writes X

Symbols: beta and gamma are sigmoids of logits, two for each group of weights; s is one factor for
each channel of an edge, at first SmoothQuant's ``max|X|^alpha / max|W|^(1 - alpha)``. The block is
run with rounded weights against the output of the dense block; gradients pass straight through the
roundings (``formats/soft.py``). Nothing of it is left at run time: W is stored on the clipped grid,
and s is in the matrices, norms and biases on both sides of its edge.

With LET the weights move at every step, and so do the ranges that are clipped: the format chooses
them for the transformed W, and each end passes its gradient to the weight that sets it. Under the
rule "mse" the share of the range that the search keeps is constant in that gradient.

Where we differ, and why:
 * Every foldable edge of the block gets its s, the MLP's inner channels among them, which the
   paper leaves alone; in models with a gated MLP they are the hardest to round.
 * The reference code also scales queries against keys, each channel by its own factor and before
   the rotary embedding. That changes what the block computes, so it is left out.
 * Shifts are left out, too: they need biases, and few models have them everywhere.
 * A channel that is silent in calibration starts with s = 1; the reference code gives it 0.01, so
   that it is amplified a hundredfold when it speaks up later.
 * A symmetric grid follows gamma alone. In an asymmetric one the zero point passes gradients to
   both ends; in the reference code it passes none, so that gamma and beta move alike.
 * The second loss of the reference code's ``aug_loss``, the dense block on the compressed stream,
   is not added; ``stream: prefix`` puts it in the place of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import pad

from rarefy.engine.fit import Loop
from rarefy.errors import RarefyError
from rarefy.tuners.base import TUNERS, BlockTuner, BlockTuning, Tuned

if TYPE_CHECKING:
    from rarefy.formats.base import Grid
    from rarefy.tuners.base import BlockView, FoldableEdge, Groups

_LEAST = 1e-2  # of s, as in the reference code
_SMALLEST = 1e-5  # of weight maxima, as in the reference code
_SILENT = 1e-5  # of the loudest channel of an edge


@TUNERS.register(
    "omniquant",
    family="quantization",
    paper="Shao et al., OmniQuant, ICLR 2024",
    arxiv="2308.13137",
)
@dataclass(frozen=True)
class OmniQuant(BlockTuner):
    """Learn clipping factors, and channel factors where inputs are rounded, too.

    Attributes:
        steps: updates a block; 2560 are the paper's 20 epochs of 128 rows, it takes 5120 at 2 bits.
        rows: token rows of each.
        lwc: learn clipping.
        let: learn transformations; the paper does so only when activations are rounded.
        lwc_lr, let_lr: learning rates of logits and of channel factors.
        init: logits at the start. With 4 a grid spans 98 % of its weights before the first step;
            with 20 it spans all of them, but a sigmoid so flat hardly moves.
        alpha: exponent of the first s; 0 (by weights alone) to 1 (by activations alone).
        stream: see :class:`BlockTuner`.

    Raises:
        ValueError: a field outside these values, or nothing to learn.
    """

    steps: int = 2560
    rows: int = 1
    lwc: bool = True
    let: bool = False
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    init: float = 4.0
    alpha: float = 0.5
    stream: Literal["dense", "prefix"] = "dense"

    def __post_init__(self) -> None:
        if not (self.lwc or self.let):
            raise ValueError("lwc and let cannot both be false: nothing would be learned")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1, and {self.alpha} does not")
        if self.lwc_lr <= 0 or self.let_lr <= 0:
            raise ValueError("lwc_lr and let_lr must be above 0")
        if self.stream not in ("dense", "prefix"):
            raise ValueError(f"stream must be dense or prefix, not {self.stream!r}")
        _ = self.loop

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The first s asks for the loudest activation of every channel."""
        return frozenset({"moments"}) if self.let else frozenset()

    @property
    def loop(self) -> Loop:
        """At a constant rate, to the last step."""
        return Loop(self.steps, self.rows, schedule="constant")

    def begin(self, block: BlockView) -> OmniQuantTuning:
        """Logits for every group of weights, factors for every channel; see :class:`BlockTuner`.

        Raises:
            RarefyError: a matrix goes to a format without ranges, or no edge can be transformed.
        """
        for path, start in block.matrices.items():
            if not start.grid.form.learnable:
                raise RarefyError(
                    f"{block.name}.{path} goes to {start.grid.form.label()}, which has no range to "
                    "clip; give it the format int, or leave it out of omniquant's schemes"
                )
        if self.let and block.matrices and not block.edges:
            raise RarefyError(
                f"nobody knows which channels of {block.name} may be rescaled, as let does; "
                "set let: false"
            )
        return OmniQuantTuning(self, block)


class OmniQuantTuning(BlockTuning):
    """The numbers of one block, in the paper's symbols.

    Attributes:
        gamma, beta: path of a linear -> logits of its upper and lower clipping factors, [m, G].
        s: name of an edge -> its channel factors, [width].
    """

    def __init__(self, tuner: OmniQuant, block: BlockView) -> None:
        self.tuner, self.block = tuner, block
        self.gamma: dict[str, torch.Tensor] = {}
        self.beta: dict[str, torch.Tensor] = {}
        self.s: dict[str, torch.Tensor] = {}
        self._symmetric = {path: _symmetric(m.grid) for path, m in block.matrices.items()}
        for path, start in block.matrices.items() if tuner.lwc else ():
            logits = torch.full_like(start.grid.pitch, tuner.init)
            self.gamma[path] = logits.clone().requires_grad_()
            if not self._symmetric[path]:
                self.beta[path] = logits.requires_grad_()
        for edge in block.edges if tuner.let else ():
            s = _first(edge, block, tuner.alpha)
            if s is not None:
                self.s[edge.name] = s.requires_grad_()

    @property
    def groups(self) -> Groups:
        """Clipping and channel factors, each with their rate."""
        lwc: dict[str, Any] = {"lr": self.tuner.lwc_lr}
        lwc["params"] = [*self.gamma.values(), *self.beta.values()]
        let = {"params": list(self.s.values()), "lr": self.tuner.let_lr}
        return [group for group in (lwc, let) if group["params"]]

    def parameters(self) -> dict[str, torch.Tensor]:
        """Transformed, then rounded to clipped grids; see :meth:`BlockTuning.parameters`."""
        values = self._transformed()
        for path in self.block.matrices:
            W = values[f"{path}.weight"]
            grid = self._grid(path, W)
            values[f"{path}.weight"] = grid.soft(W, *self._factors(path, W, grid))
        return values

    @torch.no_grad()
    def finish(self) -> Tuned:
        """What ``parameters`` gives now, with its grids; see :meth:`BlockTuning.finish`."""
        values = self._transformed()
        matrices = {}
        for path in self.block.matrices:
            W = values[f"{path}.weight"]
            grid = self._grid(path, W)
            grid = grid.adjusted(*self._factors(path, W, grid))
            matrices[path] = grid.round(W), grid
        others = {
            name: values[name]
            for name, before in self.block.others.items()
            if values[name] is not before
        }
        clipped = {"gamma": self.gamma, "beta": self.beta}
        facts: dict[str, Any] = {
            name: {path: float(x.sigmoid().mean()) for path, x in logits.items()}
            for name, logits in clipped.items()
            if logits
        }
        if self.s:
            facts["s"] = {name: [float(s.min()), float(s.max())] for name, s in self.s.items()}
        return Tuned(matrices, others, facts)

    def _transformed(self) -> dict[str, torch.Tensor]:
        """All parameters of the block after LET, before any rounding."""
        values = dict(self.block.others)
        values |= {f"{path}.weight": m.weight for path, m in self.block.matrices.items()}
        for edge in self.block.edges:
            if edge.name not in self.s:
                continue
            leaf = self.s[edge.name]
            s = leaf + (leaf.clamp(min=_LEAST) - leaf).detach()
            for name, rows in edge.writers.items():
                values[name] = _divided(values[name], rows, s, edge.offsets.get(name, 0.0))
            for name, channels in edge.readers.items():
                values[name] = values[name] * s[channels.to(s.device)]
        return values

    def _grid(self, path: str, W: torch.Tensor) -> Grid:
        """The grid whose ends are clipped: that of W as it is now."""
        start = self.block.matrices[path]
        if W is start.weight:
            return start.grid
        support = start.support if start.grid.support is None else start.grid.support
        return start.grid.form.fit(W.detach(), support=support)

    def _factors(self, path: str, W: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the grid's lower and upper ends, [m, G]."""
        ones = torch.ones_like(grid.pitch)
        low = self.beta[path].sigmoid() if path in self.beta else ones
        high = self.gamma[path].sigmoid() if path in self.gamma else ones
        if W.requires_grad:
            lo, hi = _extremes(W, grid)
            if self._symmetric[path]:
                hi = torch.maximum(-lo, hi)
            low, high = low * _unit(lo), high * _unit(hi)
        return low, high


def _first(edge: FoldableEdge, block: BlockView, alpha: float) -> torch.Tensor | None:
    """SmoothQuant's factors [width]; None when nobody who reads the edge is rounded."""
    X = W = None
    for name, channels in edge.readers.items():
        start = block.matrices.get(name.removesuffix(".weight"))
        if start is None or start.moments is None:
            continue
        at = channels.to(start.weight.device)
        loudest, largest = (
            columns.new_zeros(edge.width).scatter_reduce(0, at, columns, "amax")
            for columns in (start.moments.peak.to(start.weight), start.weight.abs().amax(0))
        )
        X = loudest if X is None else torch.maximum(X, loudest)
        W = largest if W is None else torch.maximum(W, largest)
    if X is None or W is None:
        return None
    silent = X.le(_SILENT * X.max())
    s = X**alpha / W.clamp(min=_SMALLEST) ** (1 - alpha)
    return torch.where(silent, torch.ones_like(s), s.clamp(min=_LEAST))


def _divided(
    value: torch.Tensor, rows: torch.Tensor, s: torch.Tensor, offset: float
) -> torch.Tensor:
    """``value + offset`` with some rows (or entries) divided by s, less the offset again."""
    factors = s.new_ones(value.shape[0]).index_copy(0, rows.to(s.device), 1 / s)
    scaled = value * (factors if value.ndim == 1 else factors[:, None])
    return scaled + offset * (factors - 1) if offset else scaled


def _extremes(W: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest weight of each group, or zero where it has but one sign; [m, G]."""
    count, columns = grid.pitch.shape[1], W.shape[1]
    numbers = torch.arange(count, dtype=W.dtype, device=W.device)
    width = int((grid.spread(numbers[None], columns) == 0).sum())
    groups = pad(W, (0, count * width - columns)).reshape(-1, count, width)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Ones with the derivative of log|x|; where x is zero, that of x."""
    value = x.detach()
    return 1 + (x - value) / torch.where(value == 0, torch.ones_like(value), value)


def _symmetric(grid: Grid) -> bool:
    """Whether the lower factor is without effect."""
    ones = torch.ones_like(grid.pitch)
    half, whole = grid.adjusted(ones / 2, ones), grid.adjusted(ones, ones)
    return torch.equal(half.scales, whole.scales) and torch.equal(half.pitch, whole.pitch)
