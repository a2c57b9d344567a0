"""Texts to summarise: bodies of encyclopaedia articles, whose lead is the reference, and news.

The reference stands apart from the prompt: a body that repeats a run of words of its lead is left
out. News come without a reference; there a summary is compared with the dense model's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rarefy.data.corpora import articles
from rarefy.data.wikitext import plain_text
from rarefy.tasks.loaders import loader, row
from rarefy.tasks.matching import share
from rarefy.tasks.sources import requests

if TYPE_CHECKING:
    from rarefy.tasks.frozen import Row

_LEAD_WORDS = range(60, 501)
_LEAST_BODY = 500
_SHOWN = 300
_REFERENCE = 80
_NEWS_WORDS = range(120, 301)
_PROSE = 20
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


@loader("wiki_leads", items=40)
def wiki_leads() -> list[Row]:
    """Articles: ``title, text`` (the body's first sentences), ``reference`` (the lead's).

    The text has up to 300 words, the reference up to 80, about what a model is let write.
    """
    rows = []
    for title, markup in articles():
        lead, heading, body = markup.partition("\n==")
        lead = plain_text(lead).replace("\n\n", " ")
        # A heading, a list item or a caption is no sentence.
        prose = [p for p in plain_text(heading + body).split("\n\n") if len(p.split()) >= _PROSE]
        text = " ".join(prose)
        fit = len(lead.split()) in _LEAD_WORDS and len(text.split()) >= _LEAST_BODY
        shown = _first_sentences(text, _SHOWN)
        if fit and not share(shown, lead):
            reference = _first_sentences(lead, _REFERENCE)
            rows.append(row({"title": title, "text": shown, "reference": reference}))
    return rows


@loader("news", items=30)
def news() -> list[Row]:
    """Short news stories: ``text``."""
    stories = {
        " ".join(doc["story"].split())
        for doc in requests("coqa/bpb_0shot")
        if doc["source"] == "cnn"
    }
    return [row({"text": story}) for story in sorted(stories) if len(story.split()) in _NEWS_WORDS]


def _first_sentences(text: str, count: int) -> str:
    taken: list[str] = []
    for sentence in _SENTENCE.split(text):
        if taken and sum(len(s.split()) for s in taken) + len(sentence.split()) > count:
            break
        taken.append(sentence)
    return " ".join(taken)
