"""Scores of generated text. Every one sees the continuation only, never the prompt.

Two rules guard against the ways in which such scores are known to flatter a broken model: an empty
answer never scores, and an answer counts as contained only where whole words match.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_NOT_WORD = re.compile(r"[\W_]+")
_ARTICLES = {"a", "an", "the"}


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Return lower-case words parted by single spaces, without accents, punctuation and articles.

    The articles stay where nothing else would be left, so that "A" remains an answer.
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    words = _NOT_WORD.sub(" ", bare.lower()).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def first_line(text: str) -> str:
    """Return the text before the first newline, stripped: the answer, without what rambles on."""
    return text.split("\n", 1)[0].strip()


def exact_match(output: str, answers: Iterable[str]) -> float:
    """Return 1 if the normalised output is one of the normalised answers, else 0."""
    found = normalise(output)
    return float(bool(found) and any(found == normalise(answer) for answer in answers))


def contains(output: str, answers: Iterable[str]) -> float:
    """Return 1 if an answer stands in the output as a run of whole words, else 0.

    Only in this direction: an output that is a fragment of the answer does not count.
    """
    found = f" {normalise(output)} "
    wanted = (normalise(answer) for answer in answers)
    return float(any(answer and f" {answer} " in found for answer in wanted))


def token_f1(output: str, answers: Iterable[str]) -> float:
    """Return the best F1 of the words of the output, as a multiset, over the answers."""
    return max((_f1(normalise(output).split(), normalise(a).split()) for a in answers), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def rouge(output: str, reference: str) -> dict[str, float]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (stemmed), from 0 to 1.

    Raises:
        RarefyError: the package rouge-score is missing.
    """
    scores = _rouge_scorer().score(reference, output)
    return {
        "rouge1": float(scores["rouge1"].fmeasure),
        "rouge2": float(scores["rouge2"].fmeasure),
        "rouge_l": float(scores["rougeL"].fmeasure),
    }


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RarefyError("ROUGE needs more packages: pip install 'rarefy[eval]'") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def chrf(output: str, reference: str) -> float:
    """Return chrF2 (character n-grams up to 6), from 0 to 1; 0 for an output without words.

    Raises:
        RarefyError: the package sacrebleu is missing.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise RarefyError("chrF needs more packages: pip install 'rarefy[eval]'") from error
    if not words(output) or not words(reference):
        return 0.0
    return float(sacrebleu.sentence_chrf(output, [reference]).score) / 100


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, articles and accents kept."""
    return [word for word in _NOT_WORD.split(text.lower()) if word]


def ngrams(text: str, n: int) -> Sequence[tuple[str, ...]]:
    """Return every n of a text's words that follow each other, in order."""
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(text: str, n: int) -> float:
    """Return distinct-n: different n-grams of words over all of them; 0 if there are none."""
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(text: str, n: int = 4) -> float:
    """Return the share of n-grams of words that occurred before in the text.

    A text without words has the worst value, 1; a text of fewer than n words repeats nothing, 0.
    """
    grams = ngrams(text, n)
    if grams:
        return 1 - len(set(grams)) / len(grams)
    return 0.0 if words(text) else 1.0


def unique_tokens(text: str) -> int:
    """Return how many different words the text has."""
    return len(set(words(text)))
