"""The model as the lm-evaluation-harness sees it: its own rules, our arithmetic and a journal.

Encoding, truncation, windows of long texts and generation are the harness's ``HFLM``. Only the
forward pass that ranks options is ours (:mod:`rarefy.evaluate.tree`), and only where a trial has
shown that it gives the same numbers.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from rarefy.errors import RarefyError
from rarefy.evaluate import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rarefy.evaluate.journal import Journal

    Progress = Callable[[str, int, int], None]
    Encoded = tuple[tuple[str, str] | None, list[int], list[int]]

_LABELS = {
    "loglikelihood": "options",
    "loglikelihood_rolling": "texts",
    "generate_until": "answers",
}
# Batches are cut here, so the harness shall not cut them again.
_UNCUT = 1_000_000
# The plain path makes logits at every position, and they take far more memory than the rest.
_LOGITS = 4
_TEXTS, _ANSWERS = 16, 16  # requests of one batch


class HarnessModel(HFLM):  # type: ignore[misc]
    """A causal language model whose answers are journalled."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        journal: Journal,
        tell: Progress,
        batch_tokens: int,
    ) -> None:
        super().__init__(model, "causal", tokenizer=tokenizer, batch_size=_UNCUT)
        self._journal, self._tell, self._batch_tokens = journal, tell, batch_tokens
        self._what, self._done, self._total = "", 0, 0
        # The harness tells its cache hook every answer as soon as it is known.
        self.cache_hook = self

    def add_partial(self, attr: str, req: Sequence[Any], res: Any) -> None:
        """Keep one answer; called by the harness."""
        self._journal.add(self._journal.key(attr, req), res)
        self._done += 1
        self._tell(self._what, self._done, self._total)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return summed log-probability in nats and greediness of (context, continuation) pairs."""

        def run(missing: list[Any]) -> None:
            HFLM.loglikelihood(self, missing, disable_tqdm=disable_tqdm)

        answers = self._answers("loglikelihood", requests, run)
        return [(_number(logprob), greedy) for logprob, greedy in answers]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-probability of whole texts, in nats."""

        def run(missing: list[Any]) -> None:
            for start in range(0, len(missing), _TEXTS):
                some = missing[start : start + _TEXTS]
                HFLM.loglikelihood_rolling(self, some, disable_tqdm=disable_tqdm)

        return [_number(one) for one in self._answers("loglikelihood_rolling", requests, run)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return greedy continuations.

        Raises:
            RarefyError: a task asks for sampling.
        """

        def size(request: Any) -> tuple[str, int]:
            context, options = request.args
            return json.dumps(options, sort_keys=True), len(self.tok_encode(context))

        def run(missing: list[Any]) -> None:
            for some in _cut(missing, size, _LOGITS * self._batch_tokens, _ANSWERS):
                HFLM.generate_until(self, some, disable_tqdm=disable_tqdm)

        for request in requests:
            if request.args[1].get("do_sample"):
                raise RarefyError(
                    f"task {request.task_name} samples its answers, which cannot be compared "
                    "between models; set do_sample: false in its generation_kwargs"
                )
        return self._answers("generate_until", requests, run)

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing: the harness would ask the hub about a model that is not from there."""
        return {}

    def _answers(
        self, kind: str, requests: Sequence[Any], run: Callable[[list[Any]], None]
    ) -> list[Any]:
        """Let ``run`` answer what the journal does not, each question once."""
        keys = [self._journal.key(kind, request.args) for request in requests]
        missing = {
            key: request
            for key, request in zip(keys, requests, strict=True)
            if key not in self._journal
        }
        self._what, self._total = _LABELS[kind], len(set(keys))
        self._done = self._total - len(missing)
        self._tell(self._what, self._done, self._total)
        if missing:
            run(list(missing.values()))
        return [self._journal[key] for key in keys]

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Score encoded requests, in trees where the model takes them."""
        pairs = [self._fitted(context, tokens) for _, context, tokens in requests]
        reach = self._reach
        short = [i for i, (context, tokens) in enumerate(pairs) if len(context + tokens) <= reach]
        answers: dict[int, tuple[float, bool]] = {}
        rows = tree.rows_of([pairs[i] for i in short], self._batch_tokens)
        for batch in tree.batches_of(rows, self._batch_tokens):
            for number, answer in tree.score_batch(self.model, batch).items():
                answers[short[number]] = answer
                if requests[short[number]][0] is not None:
                    self.add_partial("loglikelihood", requests[short[number]][0] or (), answer)

        def size(index: int) -> tuple[str, int]:
            return "", len(pairs[index][0] + pairs[index][1])

        rest = [i for i in range(len(pairs)) if i not in answers]
        for some in _cut(rest, size, self._batch_tokens // _LOGITS, _UNCUT):
            plain = super()._loglikelihood_tokens([requests[i] for i in some], disable_tqdm=True)
            answers.update(zip(some, plain, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _fitted(self, context: list[int], tokens: list[int]) -> tuple[list[int], list[int]]:
        """Cut a context from the left, as the harness does, so that the model can read the pair."""
        if not 0 < len(tokens) <= self.max_length:
            raise RarefyError(
                f"an option has {len(tokens)} tokens and the model reads 1 to {self.max_length}; "
                "change the task's options or leave the task out"
            )
        return (context + tokens)[-(self.max_length + 1) : -len(tokens)], tokens

    @cached_property
    def _reach(self) -> float:
        """How many tokens a context and a continuation may have to be scored in a tree."""
        objection = tree.objection(self.model)
        if objection:
            self._what = f"{self._what}, one by one: {objection}"
            self._tell(self._what, self._done, self._total)
            return 0
        return tree.window(self.model) or math.inf


def _cut(
    items: Iterable[Any], size: Callable[[Any], tuple[str, int]], limit: int, most: int
) -> Iterator[list[Any]]:
    """Yield batches of one kind and similar length.

    Args:
        items: in any order.
        size: an item's kind and its length in tokens.
        limit: tokens of a batch, padding included; a longer item is alone.
        most: items of a batch.
    """
    batch: list[Any] = []
    first = ("", 0)
    for item, its in sorted(((item, size(item)) for item in items), key=lambda pair: pair[1])[::-1]:
        full = len(batch) == most or (len(batch) + 1) * first[1] > limit
        if batch and (full or its[0] != first[0]):
            yield batch
            batch = []
        if not batch:
            first = its
        batch.append(item)
    if batch:
        yield batch


def _number(logprob: float) -> float:
    if math.isnan(logprob):
        raise RarefyError(
            "the model gives probabilities that are not numbers; its weights are damaged, "
            "compress it again with a milder recipe"
        )
    return logprob
