"""Low rank: a matrix as the product of two thin ones.

    W [m, n]  ~  second [m, k]  first [k, n]         k (m + n) < m n

``fit`` truncates a singular value decomposition in the metric that it is given, which is the best
that rank k can do in that metric:

    none          SVD(W)                             least squared weight error
    [n] d         SVD(W diag(d)^1/2)                 weighted columns (ASVD)
    [n, n] H      SVD(W L),  H = L L^T               least output error E|Wx - W'x|^2 (SVD-LLM)

Factors are balanced (the square root of each singular value on either side) and stored as the
weights of two linears, so that later stages may compress them like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING, Self

import torch

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS, Format, Grid, Packed
from rarefy.formats.floating import Float

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class LowRankGrid(Grid):
    """The one member that was fitted.

    Attributes:
        second: [m, k]. first: [k, n]; both hold numbers of the stored type.
        form: the format.
    """

    second: torch.Tensor
    first: torch.Tensor
    form: LowRank

    def round(self, columns: torch.Tensor, at: int = 0) -> torch.Tensor:
        """Columns of the product, whatever is to be rounded; see :meth:`Grid.round`."""
        first = self.first[:, at : at + columns.shape[1]]
        return _product(self.second, first).to(columns.dtype)

    def encode(self, weight: torch.Tensor) -> Packed:
        """The two factors."""
        stored = self.form.factor.kind
        return {
            "first.weight": self.first.to(stored).contiguous(),
            "second.weight": self.second.to(stored).contiguous(),
        }

    def rows(self, start: int, stop: int) -> Self:
        """The product's rows."""
        return type(self)(self.second[start:stop], self.first, self.form)

    @classmethod
    def join(cls, grids: Sequence[Self]) -> Self:
        """A factorization has one span, so there is nothing to join."""
        [grid] = grids
        return grid


@FORMATS.register("low-rank", family="low-rank")
@dataclass(frozen=True)
class LowRank(Format):
    """Two thin matrices.

    Attributes:
        ratio: share of the parameters that is kept; the rank is ``floor(ratio m n / (m + n))``.
        rank: the rank itself, in place of a ratio.
        dtype: "float16", "bfloat16", "float32", or null for that of the checkpoint.

    Raises:
        ValueError: a field outside these values.
    """

    ratio: float = 0.8
    rank: int | None = None
    dtype: str | None = None

    rows_independent = False
    spans_independent = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie in (0, 1), and {self.ratio} does not")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        Float(self.dtype)  # refuses other types

    @property
    def factor(self) -> Float:
        """Format of each factor."""
        return Float(self.dtype)

    @property
    def density(self) -> float:  # type: ignore[override]
        """Share of the parameters that is kept."""
        return self.ratio

    @property
    def span(self) -> None:
        """All columns belong together."""
        return

    def with_density(self, density: float) -> Self:
        """Another share of the parameters."""
        return replace(self, ratio=density, rank=None)

    def inner_width(self, rows: int, columns: int) -> int:
        """The rank k."""
        return self.rank or max(1, floor(self.ratio * rows * columns / (rows + columns) + 1e-9))

    def misfit(self, rows: int, columns: int) -> str:
        """Factors must be smaller than what they replace."""
        rank = self.inner_width(rows, columns)
        if rank * (rows + columns) < rows * columns:
            return ""
        most = -(-rows * columns // (rows + columns)) - 1
        return f"rank {rank} saves nothing on a [{rows}, {columns}] matrix; give at most {most}"

    def fit(
        self,
        weight: torch.Tensor,
        importance: torch.Tensor | None = None,
        support: torch.Tensor | None = None,
    ) -> LowRankGrid:
        """Truncate the decomposition in the metric; see :meth:`Format.fit`.

        Raises:
            RarefyError: a factor does not fit into its type.
        """
        rank = self.inner_width(*weight.shape)
        second, first = truncate(weight, rank, importance)
        kind = self.factor.kind
        second, first = (f.to(kind).to(weight.dtype) for f in (second, first))
        if not bool(torch.isfinite(second).all() and torch.isfinite(first).all()):
            raise RarefyError(f"a factor is beyond the range of {kind}; give dtype bfloat16")
        return LowRankGrid(second, first, replace(self, rank=rank, dtype=self.dtype or "float16"))

    def decode(
        self, packed: Mapping[str, torch.Tensor], rows: slice | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Float32 product [m, n], for exports and checks; execution keeps the factors apart."""
        second = packed["second.weight"][slice(None) if rows is None else rows]
        return _product(second, packed["first.weight"])

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Stored tensors; see :meth:`Format.layout`."""
        rank = self.inner_width(rows, columns)
        shapes = {"first.weight": (rank, columns), "second.weight": (rows, rank)}
        kind = self.factor.label().upper()
        return {suffix: (shape, kind) for suffix, shape in shapes.items()}

    def for_dtype(self, dtype: str) -> Self:
        """The checkpoint's own type, unless one was asked for."""
        return replace(self, dtype=self.factor.for_dtype(dtype).dtype)

    def label(self) -> str:
        """For example ``low-rank 80% f16``."""
        what = f"rank {self.rank}" if self.rank else f"low-rank {100 * self.ratio:.4g}%"
        return f"{what} {self.factor.label()}"


def _product(second: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """``second first`` in float32, summed in float64 so that any part of it has the same bits."""
    return (second.double() @ first.double()).float()


def truncate(
    weight: torch.Tensor, rank: int, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors [m, k], [k, n] of the best rank-k matrix in a metric, in float64.

    The singular vectors come from the eigenvectors of the smaller of ``A^T A`` and ``A A^T``,
    A being the weight in the metric: faster than a decomposition of A, and exact enough in
    float64 for the leading part.

    Args:
        weight: [m, n]. rank: k. importance: None, [n] or [n, n].
    """
    W = weight.double()
    L = _root(importance, W)
    A = W if L is None else W * L if L.ndim == 1 else W @ L
    m, n = A.shape
    if m <= n:
        values, vectors = torch.linalg.eigh(A @ A.T)
        second = vectors[:, -rank:].flip(1)
        first = second.T @ W  # U^T (W L) L^-1
    else:
        values, vectors = torch.linalg.eigh(A.T @ A)
        V = vectors[:, -rank:].flip(1)
        second = A @ V
        first = V.T
        if L is not None:
            first = first / L if L.ndim == 1 else _solve(L, first)
    sigma = values[-rank:].flip(0).clamp(min=0).sqrt()
    root = sigma.clamp(min=float(sigma[0]) * 1e-12 + 1e-30).sqrt()
    # U Sigma V^T: one side carries Sigma already, the other has unit vectors.
    share = root if m <= n else 1 / root
    return second * share, first / share.unsqueeze(1)


def _root(importance: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """L with ``L L^T`` equal to the metric, [n] or lower triangular [n, n]."""
    if importance is None:
        return None
    metric = importance.to(like)
    if metric.ndim == 1:
        floor_ = 1e-12 * float(metric.max()) + 1e-30
        return metric.clamp(min=floor_).sqrt()
    mean = float(metric.diagonal().mean()) or 1.0
    eye = torch.eye(len(metric), dtype=like.dtype, device=like.device)
    for damping in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        root, info = torch.linalg.cholesky_ex(metric + damping * mean * eye)
        if not bool(info):
            found: torch.Tensor = root
            return found
    raise RarefyError(
        "the Gram matrix of the inputs is not positive definite; calibrate on more text"
    )


def _solve(L: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """``first L^-1`` by a triangular solve."""
    solved: torch.Tensor = torch.linalg.solve_triangular(L, first, upper=False, left=False)
    return solved
