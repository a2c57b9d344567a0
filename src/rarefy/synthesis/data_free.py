"""Data-free text: what the model itself writes, one text from every token it knows.

Paper: Liu et al., *LLM-QAT: Data-Free Quantization Aware Training for Large Language Models*,
arXiv 2305.17888 (Findings of ACL 2024), section 2.1.

    for every token id i and every L in {3, 4, 5}:
        x_1 = i;   x_2 .. x_L = argmax p(. | x_<t);   then x_t ~ p(. | x_<t) until EOS or the end

A few greedy tokens find a likely beginning; drawing afterwards keeps the texts different. Drawing
is at temperature 1 among the 50 most probable tokens, the default of the library that the authors
used.

Where we differ, and why: fewer rows than 3 V may be asked; first tokens then lie evenly over the
vocabulary and the three lengths take turns. The ids are kept beside the text, because text does
not always tokenize back to them. A text ends at its first EOS even within the greedy part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rarefy.errors import RarefyError
from rarefy.synthesis.base import SYNTHESIZERS, Desk, Provenance, Row, Synthesizer
from rarefy.teachers.base import Level, Teacher, digest_int, sha256
from rarefy.teachers.sampling import Streams, draw, probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rarefy.synthesis.questions import Question
    from rarefy.teachers.cache import Request

LENGTHS = (3, 4, 5)


@SYNTHESIZERS.register(
    "data-free",
    family="quantization",
    paper="Liu et al., LLM-QAT, Findings of ACL 2024",
    arxiv="2305.17888",
)
@dataclass(frozen=True)
class DataFree(Synthesizer):
    """Texts that the teacher writes from single tokens.

    Attributes:
        texts: how many; None for all 3 V.
        max_length: tokens of a text at most, the first one included.
        temperature: of what is drawn.
        top_k: drawn among this many most probable tokens; 0 for all.
        batch: texts written at a time; does not change them.

    Raises:
        ValueError: an option out of range.
    """

    needs: ClassVar[Level] = Level.T4
    asks: ClassVar[bool] = False

    texts: int | None = None
    max_length: int = 2048
    temperature: float = 1.0
    top_k: int = 50
    batch: int = 16

    def __post_init__(self) -> None:
        if self.texts is not None and self.texts < 1:
            raise ValueError(f"texts must be at least 1, not {self.texts}")
        if self.max_length < max(LENGTHS):
            raise ValueError(f"max_length must be at least {max(LENGTHS)}, not {self.max_length}")
        if self.temperature <= 0 or self.top_k < 0 or self.batch < 1:
            raise ValueError("data-free text needs temperature > 0, top_k >= 0 and batch >= 1")

    def check(self, questions: Sequence[Question], teacher: Teacher) -> None:
        """Refuse more texts than there are beginnings."""
        most = len(LENGTHS) * teacher.vocabulary
        if self.texts is not None and self.texts > most:
            raise RarefyError(
                f"{teacher.name} has {most} beginnings (token and greedy length), and "
                f"{self.texts} texts were asked for: ask for fewer"
            )

    def rows(self, questions: Sequence[Question], desk: Desk) -> Iterator[Row]:
        """One row for each beginning, in the order of the first tokens."""
        starts = beginnings(desk.teacher.vocabulary, self.texts)
        requests = [self._request(desk, first, length) for first, length in starts]

        def make(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for at in range(0, len(missing), self.batch):
                some = missing[at : at + self.batch]
                written = self._write(desk, [starts[index] for index in some])
                yield from ((i, {"ids": ids}) for i, ids in zip(some, written, strict=True))

        outcomes = desk.once(requests, make, "texts")
        for (first, length), outcome in zip(starts, outcomes, strict=True):
            ids = outcome["ids"]
            source = Provenance(
                f"token {first}, greedy to {length}",
                0,
                desk.teacher.name,
                (sha256(str(first)),),
                ("stop" if len(ids) > 1 and ids[-1] in desk.teacher.ends else "length",),
            )
            yield Row({"text": desk.teacher.text(ids), "ids": ids}, source)

    def _request(self, desk: Desk, first: int, length: int) -> Request:
        return {
            "model": desk.teacher.name,
            "first": first,
            "greedy": length,
            "max_length": self.max_length,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "seed": desk.seed,
        }

    def _write(self, desk: Desk, starts: list[tuple[int, int]]) -> list[list[int]]:
        streams = Streams([digest_int(desk.seed, *start) for start in starts])
        greedy = torch.tensor([length for _, length in starts])

        def choose(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            best = logits.argmax(-1)
            if ids.shape[1] < min(LENGTHS):
                return best
            drawn = draw(probabilities(logits, self.temperature, self.top_k), streams.uniform())
            return torch.where(ids.shape[1] < greedy, best, drawn)

        ids = torch.tensor([[first] for first, _ in starts])
        return desk.teacher.decode(ids, choose, self.max_length)


def beginnings(vocabulary: int, texts: int | None = None) -> list[tuple[int, int]]:
    """Pairs of first token and greedy length, spread evenly; all of them if ``texts`` is None.

    >>> beginnings(10, 4)
    [(0, 3), (2, 4), (5, 5), (7, 3)]
    """
    count = len(LENGTHS) * vocabulary if texts is None else texts
    return [(k * vocabulary // count, LENGTHS[k % len(LENGTHS)]) for k in range(count)]
