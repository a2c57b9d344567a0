"""Sentences to judge, from GLUE and SuperGLUE, also with typing errors in them.

The errors stand in for AdvGLUE: the same items twice, so that what they cost can be read off.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from rarefy.tasks.frozen import ident
from rarefy.tasks.loaders import loader, row
from rarefy.tasks.sources import arrow

if TYPE_CHECKING:
    from rarefy.tasks.frozen import Row

_WORD = re.compile(r"[A-Za-z]{5,}")
_MISSPELT = 0.3


def misspell(text: str) -> str:
    """Put typing errors into about a third of the longer words of a text, one each, at least one.

    Two neighbouring letters change places, or one is dropped or doubled. First and last letters
    stay, so that a person still reads the text without effort. The same text gets the same errors.

    Args:
        text: any text; returned as it is where no word has five letters.
    """
    lots = random.Random(text)  # noqa: S311  (no secret)
    words = list(_WORD.finditer(text))
    hit = [word for word in words if lots.random() < _MISSPELT] or words[:1]
    for word in reversed(hit):
        text = text[: word.start()] + _slip(word.group(), lots) + text[word.end() :]
    return text


def _slip(word: str, lots: random.Random) -> str:
    # Of a generator's methods only random() is promised to stay the same in every Python.
    at = 1 + int(lots.random() * (len(word) - 3))
    a, b = word[at], word[at + 1]
    # Equal neighbours that change places would be no error.
    slips = [a, a + a + b, *([b + a] if a != b else [])]
    return word[:at] + slips[int(lots.random() * len(slips))] + word[at + 2 :]


@loader("rte", items=277)
def rte() -> list[Row]:
    """RTE: ``gold`` 0 says that the ``premise`` entails the ``hypothesis``, 1 that it does not."""
    docs = arrow("glue/rte/validation")
    return [_pair(doc["sentence1"], doc["sentence2"], doc["label"]) for doc in docs]


@loader("cb", items=56)
def cb() -> list[Row]:
    """CommitmentBank: ``gold`` 0 entails, 1 contradicts, 2 neither."""
    docs = arrow("super_glue/cb/validation")
    return [_pair(doc["premise"], doc["hypothesis"], doc["label"]) for doc in docs]


def _pair(premise: str, hypothesis: str, gold: int) -> Row:
    premise, hypothesis = premise.strip(), hypothesis.strip()
    return row(
        {"premise": premise, "hypothesis": hypothesis, "gold": gold},
        noisy_premise=misspell(premise),
        noisy_hypothesis=misspell(hypothesis),
    )


@loader("sst2", items=200)
def sst2() -> list[Row]:
    """SST-2: ``gold`` 0 is negative, 1 is positive."""
    return [
        row(
            {"sentence": doc["sentence"].strip(), "gold": doc["label"]},
            noisy_sentence=misspell(doc["sentence"].strip()),
        )
        for doc in arrow("glue/sst2/validation")
    ]


@loader("boolq", items=200)
def boolq() -> list[Row]:
    """BoolQ: ``gold`` 1 says yes to a question on a ``passage``; cluster: the passage."""
    return [
        row(
            {
                "passage": doc["passage"],
                "question": doc["question"],
                "gold": int(doc["answer"]),
            },
            cluster=ident({"passage": doc["passage"]}),
        )
        for doc in arrow("boolq/none/validation")
    ]


@loader("copa", items=100)
def copa() -> list[Row]:
    """COPA: which of two sentences is the cause or the effect of a ``premise``."""
    return [_copa(doc) for doc in arrow("super_glue/copa/validation")]


def _copa(doc: dict[str, Any]) -> Row:
    return row(
        {
            "premise": doc["premise"].strip().rstrip("."),
            "connective": {"cause": "because", "effect": "therefore"}[doc["question"]],
            "choices": [_inside(doc["choice1"]), _inside(doc["choice2"])],
            "gold": doc["label"],
        }
    )


def _inside(sentence: str) -> str:
    """The sentence as it reads after a connective: in lower case, unless it begins with "I"."""
    return sentence if re.match(r"I\b", sentence) else sentence[0].lower() + sentence[1:]
