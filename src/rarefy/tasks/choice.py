"""Questions with options of their own.

The right option is told by the source's own label, never by its position. Where a source keeps the
right answer apart, the options get an order that is drawn from the question: a model that finds
all options equally likely, and so takes the first, then scores chance.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rarefy.tasks.frozen import ident
from rarefy.tasks.loaders import loader, row
from rarefy.tasks.sources import arrow, folders, requests

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rarefy.tasks.frozen import Row

_TITLE = re.compile(r"([.?!]?)\s*\[title\]\s*")
_MARKER = re.compile(r"\[(header|step|substeps)\]\s*")


def _asked(docs: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of documents with "question", "choices" and "gold".

    Those with equal options are left out: nobody can tell which of the two is right.
    """
    keys = ("question", "choices", "gold")
    return [
        row({key: doc[key] for key in keys})
        for doc in docs
        if len(set(doc["choices"])) == len(doc["choices"])
    ]


def _labelled(path: str, question: str = "question") -> list[Row]:
    """Rows of a set whose options carry labels, "A" to "E" or "1" to "4"."""
    return _asked(
        {
            "question": doc[question],
            "choices": doc["choices"]["text"],
            "gold": doc["choices"]["label"].index(doc["answerKey"]),
        }
        for doc in arrow(path)
    )


@loader("mmlu", items=342, spread=True)
def mmlu() -> list[Row]:
    """MMLU's test questions, six from each of the 57 subjects; cluster: the subject."""
    return [
        {**found, "cluster": subject, "subject": subject.replace("_", " ")}
        for subject in folders("hails/mmlu_no_train")
        for found in _asked(
            {**doc, "gold": doc["answer"]} for doc in arrow(f"hails/mmlu_no_train/{subject}/test")
        )
    ]


@loader("sciq", items=300)
def sciq() -> list[Row]:
    """SciQ's questions that come with a ``support``: a paragraph that holds the answer."""
    support = {doc["question"]: doc["support"].strip() for doc in arrow("sciq/none/validation")}
    found = _asked(_sciq(doc) for doc in arrow("sciq/none/validation"))
    return [
        {**one, "support": support[one["question"]]} for one in found if support[one["question"]]
    ]


def _sciq(doc: dict[str, Any]) -> dict[str, Any]:
    right = doc["correct_answer"]
    options = [right, *(doc[f"distractor{number}"] for number in (1, 2, 3))]
    choices = sorted(options, key=lambda option: ident({doc["question"]: option}))
    return {"question": doc["question"], "choices": choices, "gold": choices.index(right)}


@loader("arc_easy", items=300)
def arc_easy() -> list[Row]:
    """ARC-Easy."""
    return _labelled("ai2_arc/ARC-Easy/validation")


@loader("arc_challenge", items=299)
def arc_challenge() -> list[Row]:
    """ARC-Challenge."""
    return _labelled("ai2_arc/ARC-Challenge/validation")


@loader("openbookqa", items=200)
def openbookqa() -> list[Row]:
    """OpenBookQA, without its book."""
    return _labelled("openbookqa/main/validation", question="question_stem")


@loader("commonsense_qa", items=200)
def commonsense_qa() -> list[Row]:
    """CommonsenseQA, five options each."""
    return _labelled("tau/commonsense_qa/none/validation")


@loader("common_knowledge", items=300)
def common_knowledge() -> list[Row]:
    """Very easy questions, made for small models."""
    return _asked(requests("basic_skills_common_knowledge/rc_5shot"))


@loader("piqa", items=200)
def piqa() -> list[Row]:
    """PIQA: which of two ways reaches a goal."""
    return _asked(
        {
            "question": doc["goal"].strip(),
            "choices": [doc["sol1"].strip(), doc["sol2"].strip()],
            "gold": doc["label"],
        }
        for doc in arrow("piqa/plain_text/validation")
    )


@loader("hellaswag", items=200)
def hellaswag() -> list[Row]:
    """HellaSwag: which ``choices`` goes on from a ``context``; cluster: the film or article."""
    return [_hellaswag(doc) for doc in arrow("hellaswag/none/validation")]


def _hellaswag(doc: dict[str, Any]) -> Row:
    begun = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    choices = [_plain(ending) for ending in doc["endings"]]
    content = {"context": _plain(begun), "choices": choices, "gold": int(doc["label"])}
    return row(content, cluster=doc["source_id"])


def _plain(text: str) -> str:
    """Drop wikiHow's markers; what stands before a title is a sentence of its own."""
    text = _TITLE.sub(lambda match: f"{match[1] or '.'} ", text.strip())
    return re.sub(r"\s+", " ", _MARKER.sub("", text)).removeprefix(". ").strip()


@loader("winogrande", items=200)
def winogrande() -> list[Row]:
    """WinoGrande: as ``choices`` the text up to and with each option, and the shared ``ending``.

    Cluster: the two options, because the set is made of twin sentences over the same two.
    """
    return [_winogrande(doc) for doc in arrow("winogrande/winogrande_xl/validation")]


def _winogrande(doc: dict[str, Any]) -> Row:
    before, after = doc["sentence"].split("_", 1)
    options = [doc["option1"], doc["option2"]]
    content = {
        "choices": [before + option for option in options],
        "ending": after.rstrip(),
        "gold": int(doc["answer"]) - 1,
    }
    return row(content, cluster=ident({"options": sorted(options)}))
