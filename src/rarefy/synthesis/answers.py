"""Answers in free text: what a text answers, and whether that is right.

The rule of the extractor has a version, because a filter that keeps other rows makes another data
set. Version 1, after the code of Ho et al. (arXiv 2212.10071): the first candidate after the first
answer marker; where there is no marker, the last candidate. An empty marker stands before the whole
text, as when the marker was the end of the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from rarefy.errors import RarefyError
from rarefy.tasks.scorers import exact_match, first_line

VERSION = 1
Kind = Literal["number", "letter", "yes-no", "text"]
KINDS: tuple[Kind, ...] = ("number", "letter", "yes-no", "text")

# A comma or a dollar sign that stands in a number is no end of it.
_DECORATION = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|\$")
_CANDIDATE = {
    # The minus of "5-3" is no sign.
    "number": re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)"),
    # A capital on its own; not the article that begins "A dog".
    "letter": re.compile(r"\b[A-H]\b(?!['’]|\s+[a-z])"),
    "yes-no": re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE),
}
_SAME = {"true": "yes", "false": "no"}


class Reason(StrEnum):
    """Why a sample is not kept."""

    TRUNCATED_RATIONALE = "the rationale was cut before its end"
    EMPTY_RATIONALE = "the rationale is empty"
    MARKED_RATIONALE = "the rationale holds a mark of the row format"
    NO_ANSWER = "no answer was found"
    TRUNCATED_ANSWER = "the answer was cut and may go on"
    WRONG_ANSWER = "the answer is wrong"


@dataclass(frozen=True)
class Extractor:
    """Finds and compares answers.

    Attributes:
        kind: "number"; "letter", A to H; "yes-no", also true and false; "text", the first line.
        tolerance: largest difference of two equal numbers.

    Raises:
        ValueError: an unknown kind or a negative tolerance.
    """

    kind: Kind = "number"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.tolerance < 0:
            raise ValueError(f"tolerance must not be negative, not {self.tolerance}")

    def find(self, text: str, marker: str | None = None) -> str | None:
        """Return the answer in a text, or None.

        >>> Extractor().find("He had 5, then 1,250. --> $1,250 END", "-->")
        '1250'
        """
        at = -1 if marker is None else text.find(marker)
        tail = text[at + len(marker or "") :] if at >= 0 else text
        candidates = self._candidates(tail)
        if not candidates:
            return None
        return candidates[0] if at >= 0 else candidates[-1]

    def _candidates(self, text: str) -> list[str]:
        if self.kind == "text":
            lines = [first_line(line).rstrip(".").strip() for line in text.split("\n")]
            return [line for line in lines if line]
        if self.kind == "number":
            text = _DECORATION.sub("", text)
        found = [match.group() for match in _CANDIDATE[self.kind].finditer(text)]
        if self.kind == "yes-no":
            return [_SAME.get(word.lower(), word.lower()) for word in found]
        return found

    def agrees(self, found: str, gold: str) -> bool:
        """Whether an answer that was found is the right one."""
        if self.kind == "text":
            return exact_match(found, [gold]) == 1
        wanted = self.find(gold, "")
        if wanted is None:
            return False
        if self.kind == "number":
            return abs(float(found) - float(wanted)) <= self.tolerance
        return found == wanted

    def check_gold(self, name: str, gold: str) -> None:
        """Refuse a right answer that holds no answer of this kind, before anything is paid for.

        Raises:
            RarefyError: nothing could ever agree with it.
        """
        if self.find(gold, "") is None:
            raise RarefyError(
                f"the answer {gold!r} of question {name} is no {self.kind}: mend it, or choose "
                f"another kind ({', '.join(KINDS)})"
            )

    def judge(self, text: str, gold: str, *, complete: bool) -> tuple[str | None, Reason | None]:
        """Judge a text that goes on where the prompt's marker ended.

        Args:
            text: the completion.
            gold: the right answer.
            complete: whether the text was not cut.

        Returns:
            The answer found, and why it does not count; None if it does.
        """
        found = self.find(text, "")
        if found is None:
            return None, Reason.NO_ANSWER
        if not complete and _DECORATION.sub("", text).removesuffix(".").endswith(found):
            return found, Reason.TRUNCATED_ANSWER
        return found, None if self.agrees(found, gold) else Reason.WRONG_ANSWER
