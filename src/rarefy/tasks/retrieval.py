"""The same questions without and with the passage that answers them, and with a false passage.

Closed against open book separates what a model has forgotten from what it can no longer read. The
false passage names another answer than the true one: who reads it answers with that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rarefy.tasks.loaders import loader, row
from rarefy.tasks.matching import alike, asks_for, options
from rarefy.tasks.scorers import contains
from rarefy.tasks.sources import requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rarefy.tasks.frozen import Row

_NEAR = 10
# Questions whose answers can be swapped for one another and leave a passage that makes sense.
_SWAPPED = {"who", "when", "where", "how many"}
_LONGEST_ANSWER = 3
_FIELDS = re.compile(r"^Title: .*?\nBackground: (.*)\nQuestion: (.*)\nAnswer:$", re.DOTALL)


@loader("squad", items=200, spread=True)
def squad() -> list[Row]:
    """Questions of SQuAD: ``question, answers, passage, title, target``; cluster: the title."""
    return [row(item, item["title"], target=f" {item['answers'][0]}") for item in _squad()]


@loader("wrong_context", items=100, spread=True)
def wrong_context() -> list[Row]:
    """Questions of SQuAD whose ``passage`` has a false answer in place of the ``true`` ones.

    ``answers`` holds the false one: that of a question on another subject that asks for the same.
    """
    found = [
        item
        for item in _squad()
        if _type(item) and len(item["answers"][0].split()) <= _LONGEST_ANSWER
    ]
    rows = []
    for item in found:
        false = _false_answer(item, found)
        passage = _swap(item["passage"], item["answers"], false) if false else ""
        if passage:
            swapped = {"passage": passage, "answers": [false], "true": item["answers"]}
            rows.append(row({**item, **swapped}, item["title"]))
    return rows


def _false_answer(item: Row, found: Sequence[Row]) -> str:
    text = f"{item['passage']} {item['question']}"
    others = [
        other["answers"][0]
        for other in found
        if other["title"] != item["title"]
        and _type(other) == _type(item)
        and not contains(text, other["answers"])
    ]
    near = alike(item["answers"][0], others, _NEAR)
    choices = options(item["question"], item["answers"], near, 1)
    return next((choice for choice in choices if choice != item["answers"][0]), "")


def _type(item: Row) -> str:
    asked, following = asks_for(item["question"])
    found = f"{asked} {following}" if asked == "how" else asked
    return found if found in _SWAPPED else ""


def _squad() -> Iterator[Row]:
    for doc in requests("squad/bpb_5shot"):
        fields = _FIELDS.match(doc["query"])
        if fields:
            yield {
                "title": doc["title"].replace("_", " "),
                "passage": fields[1],
                "question": fields[2].strip(),
                "answers": list(dict.fromkeys(doc["answers_text"])),
            }


def _swap(passage: str, answers: Sequence[str], other: str) -> str:
    """Return the passage with the other answer throughout, or "" if a right one would remain."""
    for answer in sorted(answers, key=len, reverse=True):
        passage = re.sub(rf"(?<!\w){re.escape(answer)}(?!\w)", lambda _: other, passage)
    swapped = contains(passage, [other]) and not contains(passage, answers)
    return passage if swapped else ""
