"""Perplexity of text read token by token through a cache, beside the full-precision cache.

Reading a window at once never meets a quantized cache: attention sees keys and values before they
are stored. Here all windows are read side by side, the first tokens at once and the rest one by
one (or a few at a time), as in generation, so that every prediction attends to what the cache
holds. All caches take the same step before any takes the next one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora, tokens
from rarefy.errors import RarefyError
from rarefy.evaluate.distances import Quality, TokenDistances, compare_logits, summarise
from rarefy.evaluate.run import LENGTH, SEQUENCES
from rarefy.runtime.kv_cache import kv_cache, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from rarefy.data.tokens import TokenSet
    from rarefy.formats.kv import KVFormat

    Progress = Callable[[str, int, int], None]

REFERENCE = "full"
_NEWS = 64  # tokens between two reports of progress


@dataclass(frozen=True)
class CacheReading:
    """What one cache does to predictions.

    Attributes:
        quality: against the model with its full-precision cache; ``perplexity_dense`` is the
            latter's.
        tokens: in the cache at the end, per window.
        bytes: of them, as stored. bytes_full: of the full-precision one, whose
            numbers are of the model's own type.
        seconds: of the steps after the first tokens, all windows side by side.
        seconds_full: of the same steps with the full-precision cache.
        format: how the cache is stored, in words.
    """

    quality: Quality
    tokens: int
    bytes: int
    bytes_full: int
    seconds: float
    seconds_full: float
    format: str


@torch.inference_mode()
def read_incrementally(
    model: Any,
    windows: TokenSet,
    formats: Mapping[str, KVFormat],
    *,
    step: int = 1,
    tell: Progress | None = None,
) -> dict[str, CacheReading]:
    """Measure caches on a text.

    Args:
        model: of transformers, on its device.
        windows: [N, L] tokens. The first R of each, R being the largest residual window of the
            formats, are read at once, and their predictions are not counted.
        formats: name -> format.
        step: tokens read at a time. Those of one step attend to each other exactly, so more than
            one flatters a format a little, in exchange for time.
        tell: called with (what, done, total).

    Raises:
        RarefyError: the windows do not outgrow the residual windows.
    """
    start = max(form.residual for form in formats.values())
    count, length = windows.ids.shape
    if length <= start + 1:
        raise RarefyError(
            f"windows of {length} tokens do not outgrow a residual window of {start}; "
            "give a larger length or a smaller residual"
        )
    ids = windows.ids.to(model.device)
    caches = {REFERENCE: kv_cache(model)}
    caches |= {name: kv_cache(model, form) for name, form in formats.items()}
    for cache in caches.values():
        model(ids[:, : start - 1], past_key_values=cache, logits_to_keep=1)
    seconds = dict.fromkeys(caches, 0.0)
    found: dict[str, list[TokenDistances]] = {name: [] for name in formats}
    for at in range(start - 1, length - 1, step):
        stop = min(at + step, length - 1)
        if tell is not None and (at + 1) % _NEWS < step:
            tell("tokens", at + 1, length)
        logits = {}
        for name, cache in caches.items():
            begin = _now(model)
            logits[name] = model(ids[:, at:stop], past_key_values=cache).logits.flatten(0, 1)
            seconds[name] += _now(model) - begin
        target = ids[:, at + 1 : stop + 1].flatten()
        for name in formats:
            found[name].append(compare_logits(logits[REFERENCE], logits[name], target))
    documents = windows.document.tolist()
    return {
        name: CacheReading(
            quality=summarise(_by_window(steps, count), documents),
            tokens=length - 1,
            bytes=stored_bytes(caches[name]) // count,
            bytes_full=stored_bytes(caches[REFERENCE]) // count,
            seconds=seconds[name],
            seconds_full=seconds[REFERENCE],
            format=formats[name].label(),
        )
        for name, steps in found.items()
    }


def _now(model: Any) -> float:
    """Seconds on a clock, after what the model's device has still to do."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def evaluate_cache(
    directory: str | Path,
    form: KVFormat,
    *,
    text: str = "wiki",
    sequences: int | None = None,
    length: int | None = None,
    progress: Progress | None = None,
) -> CacheReading:
    """Measure one cache on a model folder; the arguments are those of ``evaluate``.

    Raises:
        RarefyError: the text is too short, or the windows do not outgrow the residual window.
    """
    folder = resolve(str(directory))
    tokenizer = load_tokenizer(folder)
    windows = tokens.held_out(
        corpora.load(text, tokenizer),
        tokenizer,
        SEQUENCES if sequences is None else sequences,
        LENGTH if length is None else length,
    )
    model = load_model(folder)
    tokens.check_vocabulary(windows, model.get_input_embeddings().num_embeddings)
    return read_incrementally(model, windows, {"": form}, tell=progress)[""]


def _by_window(steps: Sequence[TokenDistances], count: int) -> list[TokenDistances]:
    """Sort distances of [count * t] predictions a step into one entry a window."""
    fields = [
        torch.cat([value.reshape(count, -1) for value in values], 1)
        for values in zip(*(vars(step).values() for step in steps), strict=True)
    ]
    return [TokenDistances(*rows) for rows in zip(*fields, strict=True)]
