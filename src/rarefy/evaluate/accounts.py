"""Turn the lm-evaluation-harness's account of an item into a record."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from rarefy.errors import RarefyError
from rarefy.evaluate.records import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rarefy.tasks.base import TaskInfo

# The harness gives these as (log-probability, units) and divides at the end.
_PER_UNIT = ("bits_per_byte", "byte_perplexity", "word_perplexity")
_SHOWN = 300  # characters of a question or an answer


def record_of(task: Any, info: TaskInfo, row: Mapping[str, Any]) -> Record:
    """Return the record of one item.

    Args:
        task: the harness's task object.
        info: what we know of the task.
        row: one of the harness's logged samples.

    Raises:
        RarefyError: the task does not give its main metric.
    """
    doc = row["doc"]
    metrics = _metrics(row)
    if info.metric not in metrics:
        raise RarefyError(
            f"task {info.name} gives {', '.join(metrics) or 'no metric'} but not its main metric "
            f"{info.metric}; correct the task's metadata"
        )
    item = str(doc.get("id", row["doc_hash"][:16]))
    cluster = doc.get("cluster")
    choice: int | None = None
    gold: int | None = None
    logprobs: tuple[float, ...] = ()
    texts: list[str] = []
    if task.OUTPUT_TYPE == "multiple_choice":
        texts = task.doc_to_choice(doc)
        logprobs = tuple(float(logprob) for logprob, _ in row["filtered_resps"])
        choice = _choice(info.metric, logprobs, texts)
        logprobs = logprobs[: len(texts)]
        gold = _gold(task.doc_to_text(doc) if task.multiple_input else row["target"], texts, choice)
    return Record(
        task=info.name,
        item=item,
        cluster=item if cluster is None else str(cluster),
        score=metrics[info.metric],
        metrics=metrics,
        choice=choice,
        gold=gold,
        logprobs=logprobs,
        output=row["resps"][0][0] if task.OUTPUT_TYPE == "generate_until" else None,
        question=_question(doc, row),
        answer=_answer(doc, row, None if gold is None else texts[gold]),
    )


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers of one item; the harness keeps others as parts."""
    metrics = {}
    for name in row["metrics"]:
        value = row[name]
        if name in _PER_UNIT and isinstance(value, tuple):
            logprob, units = value
            bits = -logprob / math.log(2) / max(units, 1)
            # A broken model's perplexity can be more than a float holds.
            metrics[name] = bits if name == "bits_per_byte" else 2.0 ** min(bits, 1000.0)
        elif not isinstance(value, (str, tuple, list, dict)):
            metrics[name] = float(value)
    return metrics


def _choice(metric: str, logprobs: Sequence[float], texts: Sequence[str]) -> int:
    """Return the option that the metric takes for chosen; the first of equals."""
    values = list(logprobs[: len(texts)])
    if metric == "acc_norm":
        values = [value / max(len(text), 1) for value, text in zip(values, texts, strict=True)]
    elif metric == "acc_bytes":
        sizes = [max(len(text.encode()), 1) for text in texts]
        values = [value / size for value, size in zip(values, sizes, strict=True)]
    elif metric == "acc_mutual_info":
        # The second half of the answers is without the question.
        alone = logprobs[len(texts) :]
        values = [value - other for value, other in zip(values, alone, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def _gold(target: Any, texts: Sequence[str], choice: int) -> int | None:
    """Return the right option; of several the chosen one, if it is among them."""
    if isinstance(target, list):
        target = choice if choice in target else next(iter(target), None)
    if isinstance(target, str):
        target = texts.index(target) if target in texts else None
    return target if isinstance(target, int) and 0 <= target < len(texts) else None


def _question(doc: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the question; where the item names none, the end of the prompt."""
    asked = doc.get("question")
    if isinstance(asked, str) and asked:
        return textwrap.shorten(asked, _SHOWN, placeholder=" ...")
    prompt = " ".join(str(row["arguments"][0][0]).split())
    return prompt if len(prompt) <= _SHOWN else f"... {prompt[-_SHOWN:]}"


def _answer(doc: Mapping[str, Any], row: Mapping[str, Any], option: str | None) -> str:
    """Return what is right; an option's text rather than its number."""
    answer = doc.get("answer")
    if option is not None and not isinstance(answer, str):
        answer = option
    if isinstance(answer, list):
        answer = next(iter(answer), "")
    answer = row["target"] if answer is None else answer
    return textwrap.shorten(str(answer), _SHOWN, placeholder=" ...")
