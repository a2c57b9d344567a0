"""The loss role: one number per counted token, from what a student says and what it should say.

Losses know no model and no teacher. ``N`` counts tokens, ``V`` the vocabulary, ``k`` the entries
of a shortened distribution, ``d`` the channels of a hidden state. The conformance suite checks
every registered loss of distributions against a naive implementation and its autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rarefy.errors import RarefyError
from rarefy.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TopK:
    """The largest probabilities of each distribution, and the mass of all others together.

    Attributes:
        log_probs: of the entries, float [N, k], at ``temperature``.
        indices: where they are in the vocabulary, int64 [N, k].
        tail: log of the other entries' mass, float [N]; None when it was not kept, and the
            entries are then read as the whole distribution.
        temperature: by which the logits were divided. The mass of the tail at another one cannot
            be had from these numbers.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor
    tail: torch.Tensor | None
    temperature: float = 1.0


@dataclass(frozen=True)
class Target:
    """What is known about the counted tokens of a batch; a signal fills in what it has.

    Attributes:
        logits: float [N, V].
        top: the shortened distribution.
        states: hidden states of some layers, float [N, d] each.
        labels: the tokens themselves, int64 [N].
    """

    logits: torch.Tensor | None = None
    top: TopK | None = None
    states: tuple[torch.Tensor, ...] = ()
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What a model says about the counted tokens of a batch.

    Attributes:
        logits: that predict the tokens, float [N, V].
        states: hidden states of the layers asked for, where those logits come from, [N, d] each.
    """

    logits: torch.Tensor
    states: tuple[torch.Tensor, ...] = ()


class Loss(ABC):
    """Compares a reading with a target; subclasses are frozen dataclasses.

    Attributes:
        accepts: the kinds of target that it can use, any one of which is enough: "logits",
            "top-k" (with its tail), "top-k without tail", "states", "labels".
    """

    accepts: ClassVar[frozenset[str]]

    @abstractmethod
    def per_token(self, reading: Reading, target: Target, temperature: float = 1.0) -> torch.Tensor:
        """Loss of each token, in nats where it compares distributions.

        Args:
            reading: the student's; the result is differentiable in it.
            target: the same tokens', in the same order.
            temperature: T, divides the logits of both sides; the loss is multiplied by T², which
                keeps the size of its gradient. Losses that compare no distributions ignore it.

        Returns:
            Float [N].

        Raises:
            RarefyError: the target does not fit the loss or the reading.
        """


def kinds(target: Target) -> frozenset[str]:
    """The kinds of information in a target, in the words of :attr:`Loss.accepts`."""
    found = {
        "logits": target.logits is not None,
        "top-k": target.top is not None and target.top.tail is not None,
        "top-k without tail": target.top is not None and target.top.tail is None,
        "states": bool(target.states),
        "labels": target.labels is not None,
    }
    return frozenset(kind for kind, there in found.items() if there)


def refuse_unfit(loss: Loss, given: frozenset[str]) -> None:
    """Refuse a loss whose target has nothing that it accepts.

    Raises:
        RarefyError: naming both sides.
    """
    if not loss.accepts & given:
        needed, there = " or ".join(sorted(loss.accepts)), ", ".join(sorted(given)) or "nothing"
        raise RarefyError(
            f"the loss {LOSSES.name_of(loss)!r} needs {needed}, and the signal gives {there}; "
            "choose another loss or another signal"
        )


LOSSES: Registry[Loss] = Registry("loss", Loss, "rarefy.losses")  # type: ignore[type-abstract]
