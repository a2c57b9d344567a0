"""How outputs are scored: what the YAML files refer to by ``!function scoring.NAME``.

Each function takes a row and the results of its requests, and returns every metric of the item.
The results hold what the model wrote or the log-probabilities it gave, never the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rarefy.tasks import scorers
from rarefy.tasks.constraints import met

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Row = Mapping[str, Any]
    Metrics = dict[str, float]


def short_answer(doc: Row, results: Sequence[str]) -> Metrics:
    """Score the first line of an output against all ``answers``."""
    output, answers = scorers.first_line(results[0]), doc["answers"]
    return {
        "contains": scorers.contains(output, answers),
        "exact_match": scorers.exact_match(output, answers),
        "f1": scorers.token_f1(output, answers),
    }


def follows_context(doc: Row, results: Sequence[str]) -> Metrics:
    """As ``short_answer``, for a passage that was made false; and whether the truth was told."""
    truth = scorers.contains(scorers.first_line(results[0]), doc["true"])
    return {**short_answer(doc, results), "contains_true": truth}


def ranked(doc: Row, results: Sequence[tuple[float, bool]]) -> Metrics:
    """Rank ``choices`` by log-probability; ``mrr`` is one over the place of the right one."""
    logprobs = [logprob for logprob, _ in results]
    # Over characters, as the harness defines acc_norm.
    normed = [p / len(choice) for p, choice in zip(logprobs, doc["choices"], strict=True)]
    place, place_norm = (_place(scores, doc["gold"]) for scores in (logprobs, normed))
    return {"acc": float(place == 1), "acc_norm": float(place_norm == 1), "mrr": 1 / place}


def _place(scores: Sequence[float], gold: int) -> int:
    right = scores[gold]
    # Of equals the first is chosen, as by argmax. Asking for what is behind, not for what is ahead,
    # leaves the right one last among NaNs.
    behind = (s < right or (s == right and i > gold) for i, s in enumerate(scores))
    return len(scores) - sum(behind)


def text(_: Row, results: Sequence[str]) -> Metrics:
    """Measure how varied a text is; no reference."""
    output = results[0].strip()
    return {
        "unrepeated": 1 - scorers.repeated_ngrams(output),
        "distinct_1": scorers.distinct(output, 1),
        "distinct_2": scorers.distinct(output, 2),
        "unique_tokens": float(scorers.unique_tokens(output)),
    }


def referenced(doc: Row, results: Sequence[str]) -> Metrics:
    """Compare a text with its ``reference``, and measure how varied it is."""
    output = results[0].strip()
    overlap = scorers.rouge(output, doc["reference"])
    return {**overlap, "chrf": scorers.chrf(output, doc["reference"]), **text(doc, results)}


def constraints_met(doc: Row, results: Sequence[str]) -> Metrics:
    """Return the share of the ``constraints`` that an output obeys, and whether it obeys all."""
    obeyed = met(results[0], doc["constraints"])
    return {"share_met": sum(obeyed) / len(obeyed), "all_met": float(all(obeyed))}
