"""Score many continuations of one context in a single row (tree attention).

A row holds the context once and then every continuation. Each continuation's tokens see the
context and their own past, not the other continuations, and their positions go on from the
context's end. The log-probabilities are those of separate rows, at a fraction of the cost.

Rows are padded on the left, so that all logits that matter are the last ones of every row and the
model's own ``logits_to_keep`` computes no others, whatever its head does besides multiplying.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    # Tokens of a context and of its continuation; neither is empty.
    Pair = tuple[Sequence[int], Sequence[int]]

TOLERANCE = 1e-4
# Where inputs are rounded while the model runs, the last digit of a sum can become a whole step.
_ROUNDED = 0.05
# Logits take far more memory than hidden states, so fewer of them are made at a time.
_LOGITS = 4
_PADDING, _CONTEXT = -1, 0


@dataclass
class Row:
    """A context and its continuations.

    Attributes:
        context: its tokens. continuations: tokens of each; the last token of each is predicted
            but not read.
        indices: the number of each continuation's request.
    """

    context: Sequence[int]
    continuations: list[Sequence[int]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """How many positions, the last ones, predict something: the context's end and later."""
        return 1 + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def length(self) -> int:
        """How many tokens the model reads."""
        return len(self.context) + self.kept - 1


def rows_of(pairs: Iterable[Pair], limit: int) -> list[Row]:
    """Pack continuations of equal contexts into rows of at most ``limit`` tokens where possible."""
    open_rows: dict[tuple[int, ...], Row] = {}
    rows = []
    for index, (context, continuation) in enumerate(pairs):
        key = tuple(context)
        row = open_rows.get(key)
        if row is None or row.length + len(continuation) - 1 > limit:
            row = open_rows[key] = Row(context)
            rows.append(row)
        row.continuations.append(continuation)
        row.indices.append(index)
    return rows


def batches_of(rows: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Yield rows of similar length that together, padding included, have ``limit`` tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.length, row.kept), reverse=True):
        wider = [*batch, row]
        kept = len(wider) * max(one.kept for one in wider)
        if batch and (len(wider) * batch[0].length > limit or kept > limit // _LOGITS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(model: Any, batch: Sequence[Row]) -> dict[int, tuple[float, bool]]:
    """Read one batch.

    Returns:
        For every request's number the summed log-probability of its continuation, in nats, and
        whether greedy decoding would have written it.
    """
    width, kept = max(row.length for row in batch), max(row.kept for row in batch)
    tokens, positions, branches = _tensors(batch, width, model.device)
    logits = model(
        input_ids=tokens,
        attention_mask=_mask(branches, model.dtype),
        position_ids=positions,
        logits_to_keep=kept,
        use_cache=False,
    ).logits[:, -kept:]
    answers = {}
    for row, own in zip(batch, logits, strict=True):
        own = own[kept - row.kept :].float()
        best, total = own.argmax(-1), own.logsumexp(-1)
        start = 1
        for index, continuation in zip(row.indices, row.continuations, strict=True):
            end = start + len(continuation) - 1
            at = torch.tensor([0, *range(start, end)], device=own.device)
            target = torch.tensor(continuation, device=own.device)
            logprob = (own[at, target] - total[at]).sum()
            answers[index] = (float(logprob), bool((best[at] == target).all()))
            start = end
    return answers


def _tensors(batch: Sequence[Row], width: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B, width] token ids, position ids, and the branch that a token belongs to."""
    made = []
    for row in batch:
        space = [0] * (width - row.length)
        size = len(row.context)
        tokens, positions = [*space, *row.context], [*space, *range(size)]
        branches = [_PADDING] * len(space) + [_CONTEXT] * size
        for number, continuation in enumerate(row.continuations, start=1):
            tokens += continuation[:-1]
            positions += range(size, size + len(continuation) - 1)
            branches += [number] * (len(continuation) - 1)
        made.append((tokens, positions, branches))
    ids, places, of = torch.tensor(made, device=device).unbind(1)
    return ids, places, of


def _mask(branches: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask [B, 1, width, width] of [B, width] branches."""
    query, key = branches[:, :, None], branches[:, None, :]
    # Padding sees itself, because a row of the mask that allows nothing gives no numbers.
    allowed = ((key == query) | ((key == _CONTEXT) & (query != _PADDING))).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=branches.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def window(model: Any) -> int | None:
    """How far back the model's most short-sighted layer can see, in tokens; None: to the start.

    A window is cut by index in a row, which is no distance in a tree.
    """
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    names = ("sliding_window", "attention_chunk_size", "window_size")
    sizes = [size for name in names if isinstance(size := getattr(config, name, None), int)]
    return min(sizes, default=None)


@torch.inference_mode()
def objection(model: Any) -> str | None:
    """Try trees on a small example; return why this model cannot take them, or None if it can."""
    size, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(size, (count,), generator=generator).tolist()

    long, short = some(7), some(4)
    rounded = any(getattr(module, "rounding", None) is not None for module in model.modules())
    tolerance = _ROUNDED if rounded else TOLERANCE
    pairs = [(long, some(1)), (long, some(3)), (long, some(4)), (short, some(2))]
    try:
        answers = score_batch(model, rows_of(pairs, 100))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"the model takes no tree masks ({type(error).__name__})"
    for index, (context, continuation) in enumerate(pairs):
        ids = torch.tensor([[*context, *continuation]], device=model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        at = torch.arange(len(context), ids.shape[1], device=model.device)
        expected = float(logprobs[at - 1, ids[0, at]].sum())
        # Also true of what is not a number.
        if not abs(answers[index][0] - expected) <= tolerance * max(1.0, abs(expected)):
            return "the model gives other numbers in trees"
    return None
