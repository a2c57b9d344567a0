"""Distance of a model's next-token distributions from the dense model's, on the same text.

Perplexity alone hides damage: tokens that became more likely cancel those that became less
likely. KL divergence and top-1 agreement do not cancel.

    KL_t = sum_v P_t(v) (ln P_t(v) - ln Q_t(v))

P is the dense model, Q the other; t is a position, v runs over the whole vocabulary. The dense
model against itself gives exactly 0 and agreement exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rarefy.evaluate.bootstrap import RESAMPLES, Estimate, cluster_bootstrap, cluster_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_ROWS = 256
_EDGES = np.logspace(-6, 2, 33)
_LARGEST_LOG = 700.0


@dataclass(frozen=True)
class TokenDistances:
    """What happened at each of T predictions; float64 tensors [T] on the CPU.

    Attributes:
        kl: KL(dense || other) in nats.
        agree: 1 where both models' most likely token is the same, else 0.
        nll_dense, nll_other: negative log-likelihood of the true token in nats.
        delta_p: probability of the true token, other minus dense.
    """

    kl: torch.Tensor
    agree: torch.Tensor
    nll_dense: torch.Tensor
    nll_other: torch.Tensor
    delta_p: torch.Tensor


@dataclass(frozen=True)
class Histogram:
    """Counts between log-spaced edges, and of what lies outside (an exact 0 lies below)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True)
class Quality:
    """Summary over all predictions; intervals are over documents, never over tokens.

    Attributes:
        perplexity_dense, perplexity: exp of the mean NLL over all predictions of all windows.
        perplexity_ratio: perplexity / perplexity_dense.
        log_perplexity_gap: ln of that ratio, in nats per token.
        kl_mean: in nats; ``kl_median`` ... ``kl_max`` are quantiles over tokens.
        agreement: share of positions with the same most likely token.
        delta_p_mean, delta_p_rms: change of the true token's probability.
        interval: how the intervals were made, or why there are none.
    """

    perplexity_dense: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    log_perplexity_gap: Estimate
    kl_mean: Estimate
    kl_median: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    kl_histogram: Histogram
    agreement: Estimate
    delta_p_mean: Estimate
    delta_p_rms: Estimate
    predictions: int
    documents: int
    interval: str


def compare_logits(
    dense: torch.Tensor, other: torch.Tensor, target: torch.Tensor
) -> TokenDistances:
    """Compare two models' logits position by position.

    Positions are taken a few hundred at a time, which bounds the extra memory to a few copies of
    [256, V] in float32. Rounding can leave a KL of about -1e-7 where the two distributions are
    nearly equal; KL is never negative, so such values are set to 0.

    Args:
        dense: [T, V] logits of the reference.
        other: [T, V] logits of the model under test.
        target: [T] the tokens that really follow.

    Raises:
        ValueError: the shapes differ.
    """
    if dense.shape != other.shape or target.shape != dense.shape[:1]:
        raise ValueError(f"shapes {dense.shape}, {other.shape} and {target.shape} do not fit")
    parts = [
        _compare_rows(dense[at : at + _ROWS], other[at : at + _ROWS], target[at : at + _ROWS])
        for at in range(0, len(target), _ROWS)
    ]
    return TokenDistances(*torch.cat(parts, dim=1).cpu().double().unbind())


def _compare_rows(dense: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return [5, rows]: the fields of ``TokenDistances`` in order, float32."""
    agree = dense.argmax(-1) == other.argmax(-1).to(dense.device)
    true = target.to(dense.device)[:, None]
    log_p = dense.float().log_softmax(-1)
    log_q = other.to(dense.device).float().log_softmax(-1)
    true_p, true_q = (log.gather(1, true)[:, 0] for log in (log_p, log_q))
    kl = log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(-1).clamp_min(0)
    return torch.stack([kl, agree.float(), -true_p, -true_q, true_q.exp() - true_p.exp()])


def summarise(windows: Sequence[TokenDistances], clusters: Sequence[int]) -> Quality:
    """Average over windows, with intervals over documents.

    Args:
        windows: one entry per text window.
        clusters: the document each window comes from; windows of one document move together.
    """
    rows = np.array([_sums(window) for window in windows])
    sums = cluster_sums(rows, clusters)
    kl = np.concatenate([window.kl.numpy() for window in windows])
    median, p95, p99 = (float(q) for q in np.quantile(kl, [0.5, 0.95, 0.99]))
    return Quality(
        perplexity_dense=cluster_bootstrap(sums, lambda s: _exp(s[:, 3] / s[:, 0])),
        perplexity=cluster_bootstrap(sums, lambda s: _exp(s[:, 4] / s[:, 0])),
        perplexity_ratio=cluster_bootstrap(sums, lambda s: _exp((s[:, 4] - s[:, 3]) / s[:, 0])),
        log_perplexity_gap=cluster_bootstrap(sums, lambda s: (s[:, 4] - s[:, 3]) / s[:, 0]),
        kl_mean=cluster_bootstrap(sums, lambda s: s[:, 1] / s[:, 0]),
        kl_median=median,
        kl_p95=p95,
        kl_p99=p99,
        kl_max=float(kl.max()),
        kl_histogram=_histogram(kl),
        agreement=cluster_bootstrap(sums, lambda s: s[:, 2] / s[:, 0]),
        delta_p_mean=cluster_bootstrap(sums, lambda s: s[:, 5] / s[:, 0]),
        delta_p_rms=cluster_bootstrap(sums, lambda s: np.sqrt(s[:, 6] / s[:, 0])),
        predictions=len(kl),
        documents=len(sums),
        interval=_interval(len(sums)),
    )


def _sums(window: TokenDistances) -> list[float]:
    """Return one window's additive quantities: count, KL, agreement, NLLs, delta-p, its square."""
    parts = (window.kl, window.agree, window.nll_dense, window.nll_other, window.delta_p)
    squares = window.delta_p.square()
    return [float(len(window.kl)), *(float(part.sum()) for part in (*parts, squares))]


def _exp(log: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponentiate; a ruined model's perplexity stays finite, as JSON knows no infinity."""
    return np.exp(np.minimum(log, _LARGEST_LOG))


def _histogram(kl: NDArray[np.float64]) -> Histogram:
    counts, edges = np.histogram(kl, _EDGES)
    return Histogram(
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        below=int((kl < edges[0]).sum()),
        above=int((kl > edges[-1]).sum()),
    )


def _interval(documents: int) -> str:
    if documents < 2:
        return "No interval: all windows come from one document"
    return (
        f"95 % percentile bootstrap over {documents} documents, {RESAMPLES} resamples; "
        "documents are resampled, not tokens"
    )
