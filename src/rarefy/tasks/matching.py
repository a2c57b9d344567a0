"""Fixed orders and wrong answers that look right: the same on every machine, whatever its Python.

Orders come from hashes rather than from a random generator, whose shuffles may change between
versions of Python.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, TypeVar

from rarefy.tasks.scorers import contains, normalise, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")

_SHARED = 8
_ASKING = ("who", "whom", "whose", "when", "where", "why", "which", "what", "how")


def shuffled(seed: str, items: Iterable[T], key: Callable[[T], str] = str) -> list[T]:
    """Return the items in an order that depends on the seed and on each item's key alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}\0{key(item)}".encode()).digest())


def options(question: str, answers: Sequence[str], others: Iterable[str], count: int) -> list[str]:
    """Return the first answer among ``count`` wrong ones, in an order fixed by the question.

    A wrong one never holds, nor lies within, any of the right answers; fewer come back where
    ``others`` has too few.
    """
    wrong: dict[str, str] = {}
    for other in others:
        if not (contains(other, answers) or any(contains(a, [other]) for a in answers)):
            wrong.setdefault(normalise(other), other)
    chosen = shuffled(f"wrong {question}", wrong.values())[:count]
    return shuffled(f"order {question}", [answers[0], *chosen])


def asks_for(question: str) -> tuple[str, str]:
    """Return the asking word and the word after it: ("which", "city"), ("who", "wrote").

    Questions that agree in both want the same type of answer; in the first, a similar one.
    """
    tokens = re.findall(r"\w+", question.lower())
    for i, token in enumerate(tokens):
        if token in _ASKING:
            return token, tokens[i + 1] if i + 1 < len(tokens) else ""
    return "", ""


def alike(answer: str, others: Iterable[str], count: int) -> list[str]:
    """Return the ``count`` others whose digits, number of words and length are nearest."""
    wanted = _shape(answer)
    distance = {
        other: tuple(abs(a - b) for a, b in zip(_shape(other), wanted, strict=True))
        for other in others
    }
    return sorted(distance, key=lambda other: (distance[other], other))[:count]


def _shape(answer: str) -> tuple[int, int, int]:
    return any(c.isdigit() for c in answer), len(answer.split()), len(answer)


def share(text: str, reference: str) -> bool:
    """Return whether two texts have a run of eight words in common."""
    return bool(_runs(text) & _runs(reference))


def _runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + _SHARED]) for i in range(len(found) - _SHARED + 1)}
