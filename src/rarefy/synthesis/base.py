"""The synthesizer role: make training text with a teacher, and keep the provenance of every row.

A synthesizer is a frozen dataclass of hyper-parameters. It declares the level of teacher that it
needs and turns questions into rows and rejects through a :class:`Desk`, which makes no call twice.
Files, resuming and refusals belong to :func:`rarefy.synthesis.engine.synthesize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rarefy.registry import Registry
from rarefy.teachers.base import Answer, Ask, Level, Prompt, Teacher, sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from rarefy.synthesis.questions import Question
    from rarefy.teachers.cache import Ledger, Make, Request


@dataclass(frozen=True)
class Provenance:
    """Where a row comes from.

    Attributes:
        question: id of the question, or of the seed text.
        sample: index among the samples of this question.
        teacher: name of the model; empty when none was asked.
        prompts: SHA-256 of every rendered prompt, in the order asked; the ledger holds the texts.
        finish_reasons: of the answers to those prompts.
    """

    question: str
    sample: int
    teacher: str
    prompts: tuple[str, ...]
    finish_reasons: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One training example.

    Attributes:
        content: ``prompt`` and ``completion``, or ``text`` and ``ids``.
        provenance: see there.
        reason: why it is not kept; None for a row that is.
    """

    content: Mapping[str, Any]
    provenance: Provenance
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON: the content's keys, ``provenance``, and ``reason`` if there is one."""
        why = {} if self.reason is None else {"reason": str(self.reason)}
        return {**why, **self.content, "provenance": asdict(self.provenance)}


@dataclass(frozen=True)
class Desk:
    """What a synthesizer works with: the teacher, the ledger before it, and the seed.

    Attributes:
        teacher: never called but through the ledger.
        ledger: keeps every outcome.
        seed: of all draws.
    """

    teacher: Teacher
    ledger: Ledger
    seed: int

    def ask(self, asks: Sequence[Ask], what: str) -> list[Answer]:
        """Answer asks in their order; ``what`` names them in the progress."""
        return self.ledger.answers(self.teacher, asks, what)

    def once(self, requests: Sequence[Request], make: Make, what: str) -> list[dict[str, Any]]:
        """Outcomes of other work with the teacher; see :meth:`Ledger.once`."""
        return self.ledger.once(requests, make, what)

    def digest(self, prompt: Prompt) -> str:
        """Hash of a prompt as the teacher reads it."""
        return sha256(self.teacher.render(prompt))


class Synthesizer(ABC):
    """Makes training rows; subclasses are frozen dataclasses.

    Attributes:
        needs: the lowest level of teacher that will do.
        asks: whether it is given questions.
    """

    needs: ClassVar[Level] = Level.T0
    asks: ClassVar[bool] = True

    @abstractmethod
    def check(self, questions: Sequence[Question], teacher: Teacher) -> None:
        """Refuse what cannot work, before the first call.

        Raises:
            RarefyError: questions or options that cannot work.
        """

    @abstractmethod
    def rows(self, questions: Sequence[Question], desk: Desk) -> Iterator[Row]:
        """Yield every row, kept or not, in an order that does not depend on the run."""

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Figures of this method for ``summary.json``, from all rows, kept or not."""
        return {}


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows each question has, in order of appearance."""
    made: dict[str, int] = {}
    for row in rows:
        made[row.provenance.question] = made.get(row.provenance.question, 0) + 1
    return made


SYNTHESIZERS: Registry[Synthesizer] = Registry(
    "synthesizer",
    Synthesizer,  # type: ignore[type-abstract]
    "rarefy.synthesis",
)
