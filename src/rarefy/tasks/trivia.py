"""Trivia questions with every alias of their answers, as in LLM-KICK's closed-book set."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rarefy.tasks.loaders import loader, row
from rarefy.tasks.matching import alike, asks_for, options, shuffled
from rarefy.tasks.sources import arrow

if TYPE_CHECKING:
    from rarefy.tasks.frozen import Row

_WRONG = 9
_NEAR = 30
# Only so many are made ready: 200 of them are frozen.
_CANDIDATES = 400
_LONGEST_ANSWER = 5
# Not "(West) Sussex", "A) Felix Leiter" or "ALI McGRAW".
_PLAIN = re.compile(r"(?!.*[A-Z]{3})[A-Z0-9][\w' .-]*\w")
# After "which", these say nothing of the type of the answer.
_TYPELESS = {
    "american", "are", "british", "can", "did", "do", "does", "english", "european", "famous",
    "first", "former", "had", "has", "have", "is", "kind", "name", "of", "other", "part", "popular",
    "sort", "term", "the", "two", "three", "type", "us", "was", "were", "word", "",
}  # fmt: skip


@loader("trivia", items=200)
def trivia() -> list[Row]:
    """Questions of TriviaQA: ``question, answers`` (all aliases), ``choices`` (ten), ``gold``.

    The wrong choices answer other questions for the same thing ("who", "which city").
    """
    docs = [doc for doc in arrow("trivia_qa/rc.wikipedia.nocontext/validation") if _usable(doc)]
    groups: dict[str, list[str]] = {}
    for doc in docs:
        groups.setdefault(_type(doc), []).append(doc["answer"]["value"])
    docs = [doc for doc in docs if _type(doc) and len(groups[_type(doc)]) > _NEAR]
    rows = []
    for doc in shuffled("trivia", docs, key=lambda doc: str(doc["question"]))[:_CANDIDATES]:
        answers = list(dict.fromkeys([doc["answer"]["value"], *doc["answer"]["aliases"]]))
        near = alike(answers[0], groups[_type(doc)], _NEAR)
        choices = options(doc["question"], answers, near, _WRONG)
        if len(choices) == _WRONG + 1:
            item = {"question": doc["question"], "answers": answers, "choices": choices}
            rows.append(row({**item, "gold": choices.index(answers[0])}))
    return rows


def _usable(doc: Row) -> bool:
    value = str(doc["answer"]["value"])
    return len(value.split()) <= _LONGEST_ANSWER and bool(_PLAIN.fullmatch(value))


def _type(doc: Row) -> str:
    asked, thing = asks_for(doc["question"])
    if asked in ("which", "what"):
        return "" if thing in _TYPELESS else thing
    return {"who": "who", "whom": "who", "when": "when", "where": "where"}.get(asked, "")
