"""Divergences between two distributions over the vocabulary, whole or shortened to k + 1 buckets.

With q = softmax(z) and any D(p, q), write h_v = dD / d log q_v, the log-probabilities taken as
free. Then, because log q_v = z_v - log sum exp z,

    dD / dz_v = h_v - q_v sum_u h_u                        whole vocabulary
    dD / dz_v = (q_v / q_b) h_b - q_v sum_c h_c            v in bucket b

A divergence is therefore D and h; adding c q to h changes nothing. Buckets are the k entries of
the target and one tail with all others: merging outcomes never raises a divergence, so the
shortened loss is a lower bound of the whole one, and equal to it at k = V.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from rarefy.errors import RarefyError
from rarefy.losses.base import Loss, Reading, Target, TopK, kinds, refuse_unfit
from rarefy.losses.rowwise import rowwise

if TYPE_CHECKING:
    from rarefy.losses.rowwise import Rule

# Stands for log 0: finite, so that 0 log 0 is 0; a mismatch of supports still gives a huge loss.
FLOOR = -1e30


class Divergence(Loss):
    """A divergence D(P, Q) of the teacher's P and the student's Q; 0 where they are equal."""

    accepts: ClassVar[frozenset[str]] = frozenset({"logits", "top-k"})

    @abstractmethod
    def compare(
        self, log_p: torch.Tensor, log_q: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope.

        Args:
            log_p: log-probabilities of the teacher, [n, m]. log_q: of the student. q: exp(log_q).

        Returns:
            D [n], and a new tensor h [n, m], up to a multiple of q.
        """

    def per_token(self, reading: Reading, target: Target, temperature: float = 1.0) -> torch.Tensor:
        """``T² D(softmax(t / T), softmax(z / T))``; see :meth:`Loss.per_token`."""
        refuse_unfit(self, kinds(target))
        if target.top is not None:
            return rowwise(reading.logits, self._buckets(target.top, temperature))
        assert target.logits is not None
        if target.logits.shape != reading.logits.shape:
            raise RarefyError(
                f"the teacher's logits are {list(target.logits.shape)} and the student's "
                f"{list(reading.logits.shape)}; both must share one vocabulary"
            )
        return rowwise(reading.logits, self._whole(target.logits, temperature))

    def _whole(self, logits: torch.Tensor, temperature: float) -> Rule:
        def rule(z: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            log_p = log_softmax(logits[part].to(z.dtype), temperature)
            log_q = log_softmax(z, temperature)
            q = log_q.exp()
            loss, h = self.compare(log_p, log_q, q)
            slope = h.sub_(q.mul_(h.sum(-1, keepdim=True)))
            return _scaled(loss, slope, temperature)

        return rule

    def _buckets(self, top: TopK, temperature: float) -> Rule:
        if top.temperature != temperature:
            raise RarefyError(
                f"the stored distributions have temperature {top.temperature} and the loss "
                f"{temperature}; use one temperature for both, or write them again"
            )

        def rule(z: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            indices, log_p = top.indices[part], _with_tail(top, part, z.dtype)
            log_q = log_softmax(z, temperature)
            others = log_q.scatter(1, indices, -torch.inf)
            tail = others.logsumexp(-1, keepdim=True).clamp_(min=FLOOR)
            buckets = torch.cat([log_q.gather(1, indices), tail], 1)
            loss, h = self.compare(log_p, buckets, buckets.exp())
            slope = others.sub_(tail).exp_().mul_(h[:, -1:])
            slope.scatter_add_(1, indices, h[:, :-1])
            slope.sub_(log_q.exp_().mul_(h.sum(-1, keepdim=True)))
            return _scaled(loss, slope, temperature)

        return rule


def _scaled(
    loss: torch.Tensor, slope: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if temperature == 1:
        return loss, slope
    return loss * temperature**2, slope.mul_(temperature)


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [n, V] with log 0 replaced by a finite number; a new tensor."""
    scaled = logits if temperature == 1 else logits / temperature
    return torch.log_softmax(scaled, -1).clamp_(min=FLOOR)


def _with_tail(top: TopK, part: slice, dtype: torch.dtype) -> torch.Tensor:
    """The teacher's buckets, [n, k + 1]; without a tail the entries are made to sum to 1."""
    entries = top.log_probs[part].to(dtype)
    if top.tail is not None:
        return torch.cat([entries, top.tail[part, None].to(dtype)], 1).clamp_(min=FLOOR)
    empty = entries.new_full((len(entries), 1), FLOOR)
    return torch.cat([log_softmax(entries), empty], 1)


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0, *, tail: bool = True) -> TopK:
    """Shorten distributions given by their logits.

    Args:
        logits: float [N, V].
        k: entries to keep; all of them where the vocabulary is smaller.
        temperature: divides the logits.
        tail: keep the mass of the others.
    """
    width = min(k, logits.shape[1])
    entries, places, rest = [], [], []
    for chunk in torch.split(logits, 64):
        log_p = log_softmax(chunk.to(torch.promote_types(chunk.dtype, torch.float32)), temperature)
        values, indices = log_p.topk(width)
        entries.append(values)
        places.append(indices)
        if tail:
            rest.append(log_p.scatter_(1, indices, -torch.inf).logsumexp(-1).clamp_(min=FLOOR))
    mass = torch.cat(rest) if tail else None
    return TopK(torch.cat(entries), torch.cat(places), mass, temperature)
