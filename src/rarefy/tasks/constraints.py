"""Constraints on an answer that a program can verify: how they are worded and how they are checked.

Every constraint fails on a text of fewer than three different words. Otherwise silence, or one
word repeated for ever, would obey "write in lower case" and "avoid this word".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rarefy.errors import RarefyError
from rarefy.tasks.scorers import contains, normalise, unique_tokens, words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_FEWEST_WORDS = 3
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """A kind of constraint.

    Attributes:
        wording: the sentence in the prompt, with ``{value}``.
        check: whether a text obeys it, given the value.
    """

    wording: str
    check: Callable[[str, str], bool]


def _ends_with(text: str, value: str) -> bool:
    return f" {normalise(text)}".endswith(f" {normalise(value)}")


CONSTRAINTS: dict[str, Constraint] = {
    "at_most": Constraint(
        "Use at most {value} words.", lambda text, value: len(words(text)) <= int(value)
    ),
    "at_least": Constraint(
        "Use at least {value} words.", lambda text, value: len(words(text)) >= int(value)
    ),
    "lower_case": Constraint("Write only in lower-case letters.", lambda text, _: text.islower()),
    "upper_case": Constraint("Write only in capital letters.", lambda text, _: text.isupper()),
    "include": Constraint(
        'Use the word "{value}".', lambda text, value: bool(contains(text, [value]))
    ),
    "avoid": Constraint(
        'Do not use the word "{value}".', lambda text, value: not contains(text, [value])
    ),
    "bullets": Constraint(
        "Give exactly {value} bullet points, each on its own line that starts with a hyphen.",
        lambda text, value: len(_BULLET.findall(text)) == int(value),
    ),
    "end": Constraint('End with the words "{value}".', _ends_with),
    "begin": Constraint(
        'Begin with the word "{value}".',
        lambda text, value: normalise(text).split()[:1] == [normalise(value)],
    ),
    "no_commas": Constraint("Do not use commas.", lambda text, _: "," not in text),
}


def met(text: str, constraints: Sequence[Mapping[str, str]]) -> list[bool]:
    """Return for each constraint whether the text obeys it.

    Args:
        text: the continuation.
        constraints: ``{"kind": ..., "value": ...}``, kinds from ``CONSTRAINTS``.

    Raises:
        RarefyError: an unknown kind.
    """
    for constraint in constraints:
        if constraint["kind"] not in CONSTRAINTS:
            raise RarefyError(f"there is no constraint called {constraint['kind']!r}")
    if unique_tokens(text) < _FEWEST_WORDS:
        return [False] * len(constraints)
    return [CONSTRAINTS[c["kind"]].check(text.strip(), c["value"]) for c in constraints]
