"""The teacher role: what a student may ask, in six levels from bare text to the weights.

A method declares the lowest level it needs. A call above a teacher's level is refused with
:class:`TeacherCapabilityError`; nothing is ever replaced by something weaker in silence.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

import torch

from rarefy.errors import RarefyError

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message]
"""Plain text, or chat messages with the keys ``role`` and ``content``."""

Choose: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids so far, int64 [B, t]; logits of the next token, float32 [B, V]) -> next ids, int64 [B]."""


class Level(IntEnum):
    """What a teacher lets one see; every level includes those below it."""

    T0 = 0
    T1 = 1
    T2 = 2
    T3 = 3
    T4 = 4
    T5 = 5


_MEANING = {
    Level.T0: ("generated text", "every teacher"),
    Level.T1: (
        "log-probabilities of generated tokens",
        "an endpoint with the option logprobs, or a local model",
    ),
    Level.T2: (
        "log-probabilities of a given text",
        "a vLLM endpoint with the option prompt_logprobs, or a local model",
    ),
    Level.T3: ("the logits of given ids", "a local model"),
    Level.T4: ("a say in the choice of every token", "a local model"),
    Level.T5: ("the weights", "a local model"),
}


class TeacherCapabilityError(RarefyError):
    """A call above the teacher's level.

    Attributes:
        needed, offered: the two levels.
    """

    def __init__(self, name: str, what: str, needed: Level, offered: Level) -> None:
        meaning, source = _MEANING[needed]
        super().__init__(
            f"{what} needs a teacher of level {needed.name} ({meaning}), and {name} is of level "
            f"{offered.name} ({_MEANING[offered][0]}): use {source}"
        )
        self.needed, self.offered = needed, offered


@dataclass(frozen=True)
class Sampling:
    """How text is drawn; the defaults are the raw policy, not a vendor's.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: smallest set of tokens with at least this much probability; 1 keeps all.
        top_k: this many most probable tokens; 0 keeps all.
        max_tokens: at most this many tokens are generated.
        stop: texts that end the answer; they are not part of it.
        seed: of the draws.
        logprobs: alternatives reported for every generated token (level T1); 0 for none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise RarefyError(
                "sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0, not "
                f"{self.temperature}, {self.top_p} and {self.top_k}"
            )
        if self.max_tokens < 1:
            raise RarefyError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True)
class Ask:
    """One sample of one prompt: the unit that is asked, cached and counted.

    Attributes:
        sample: index among the samples of this prompt.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0

    @property
    def stream(self) -> int:
        """The seed of this sample's own random numbers, below 2^31."""
        return digest_int(self.sampling.seed, self.sample)


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in nats, beside the most probable ones at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: without the prompt, the stop text and special tokens.
        finish_reason: ``stop`` when the teacher ended it, ``length`` when it was cut; or what an
            endpoint says instead.
        tokens: scores of the generated tokens, if they were asked for.
    """

    text: str
    finish_reason: str
    tokens: tuple[TokenScore, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Answer:
        """The inverse of :meth:`to_json`."""
        tokens = tuple(
            TokenScore(t["token"], t["logprob"], tuple((a, b) for a, b in t["top"]))
            for t in value["tokens"]
        )
        return cls(value["text"], value["finish_reason"], tokens)


class Teacher(ABC):
    """A model that is asked.

    Args:
        name: identifies the model in caches and provenance; never holds a secret.
        level: the highest level that it offers.
    """

    def __init__(self, name: str, level: Level) -> None:
        self.name = name
        self.level = level

    def require(self, needed: Level, what: str) -> None:
        """Refuse ``what`` if it needs more than this teacher offers.

        Raises:
            TeacherCapabilityError: the level is too low.
        """
        if self.level < needed:
            raise TeacherCapabilityError(self.name, what, needed, self.level)

    def generate(
        self, prompt: Prompt, n: int = 1, sampling: Sampling | None = None
    ) -> list[Answer]:
        """Draw ``n`` answers to one prompt (level T0; T1 if ``sampling.logprobs``)."""
        asks = [Ask(prompt, sampling or Sampling(), sample) for sample in range(n)]
        return [answer for _, answer in sorted(self.answers(asks), key=lambda pair: pair[0])]

    def answers(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Answer many asks, yielding (index, answer) as soon as each is known, in any order.

        Raises:
            TeacherCapabilityError: log-probabilities are asked of a teacher of level T0.
        """
        if any(ask.sampling.logprobs for ask in asks):
            self.require(Level.T1, "generate with logprobs")
        return self._answers(asks)

    @abstractmethod
    def _answers(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]: ...

    def render(self, prompt: Prompt) -> str:
        """The text that stands for a prompt in caches: what the model reads, if that is known."""
        return prompt if isinstance(prompt, str) else json.dumps(list(map(dict, prompt)))

    def score(self, prompt: Prompt, completion: str, top: int = 0) -> list[TokenScore]:
        """Score the tokens of a given completion (level T2).

        Args:
            prompt: what stands before it.
            completion: the text to be scored, tokenized apart from the prompt.
            top: most probable tokens reported at each place.
        """
        raise self._missing(Level.T2, "score")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the token after every position (level T3).

        Args:
            ids: int64 [B, L], without padding.

        Returns:
            float32 [B, L, V].
        """
        raise self._missing(Level.T3, "logits")

    @property
    def vocabulary(self) -> int:
        """How many token ids there are (level T3)."""
        raise self._missing(Level.T3, "vocabulary")

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text (level T3)."""
        raise self._missing(Level.T3, "ends")

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out (level T3)."""
        raise self._missing(Level.T3, "text")

    def decode(self, ids: torch.Tensor, choose: Choose, max_length: int) -> list[list[int]]:
        """Write on, with every token chosen by the caller (level T4).

        The caller's function may mix the teacher's distribution with another, subtract one, or
        take the maximum at some steps and draw at others.

        Args:
            ids: int64 [B, P], prompts of one length.
            choose: see :data:`Choose`; also called for rows that have ended.
            max_length: tokens of a row at most, the prompt included.

        Returns:
            B rows of ids, the prompt included; the first generated id of ``ends`` is the last.
        """
        raise self._missing(Level.T4, "decode")

    def weights(self) -> torch.nn.Module:
        """The model itself (level T5)."""
        raise self._missing(Level.T5, "weights")

    def _missing(self, needed: Level, what: str) -> RarefyError:
        self.require(needed, what)
        return RarefyError(f"{self.name} declares level {self.level.name} but has no {what}")


def digest_int(*parts: object) -> int:
    """Hash parts to an integer below 2^31, the same on every machine."""
    data = json.dumps(parts).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") >> 1


def sha256(text: str) -> str:
    """Hash of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
