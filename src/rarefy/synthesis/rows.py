"""Rows as tensors for training: the prompt is read, the completion is learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenRows:
    """N rows, padded on the right to the longest, L.

    Attributes:
        ids: int64 [N, L]; what lies beyond a row's length has no meaning.
        lengths: int64 [N].
        loss: bool [N, L]; True at the tokens to be predicted. The token at t is predicted by the
            logits at t - 1, so column 0 is never True.
        left_out: rows that were longer than allowed.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    loss: torch.Tensor
    left_out: int


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read ``rows.jsonl``, or the one in a folder.

    Raises:
        RarefyError: the file is missing or malformed.
    """
    file = path / "rows.jsonl" if path.is_dir() else path
    try:
        # Not splitlines(): JSON strings may hold line separators other than the newline.
        lines = file.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError) as error:
        raise RarefyError(f"the rows in {file} cannot be read: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not (
            {"prompt", "completion"} <= row.keys() or "ids" in row
        ):
            raise RarefyError(f"row {number} of {file} has neither prompt and completion nor ids")
    return rows


def token_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int
) -> TokenRows:
    """Turn rows into ids and the mask of the loss.

    Prompt and completion are tokenized apart and their ids joined, so the mask begins exactly where
    the completion does. EOS ends every completion and is learnt; nothing after the first EOS is.
    The mask comes from places, never from comparing ids: models often pad with EOS. Rows with
    ``ids`` are learnt from their second token on, and get no EOS, because one that lacks it was
    cut.

    Args:
        rows: with ``prompt`` and ``completion``, or with ``ids``.
        tokenizer: the student's own; for rows with ``ids`` it must be the teacher's too.
        length: longer rows are left out, not cut: a cut one would teach never to stop.

    Raises:
        RarefyError: the tokenizer has no EOS, or no row is short enough.
    """
    if tokenizer.eos_token_id is None:
        raise RarefyError("the tokenizer defines no EOS token: a student would never learn to stop")
    made = [_row(row, tokenizer) for row in rows]
    kept = [(ids, start) for ids, start in made if len(ids) <= length and start < len(ids)]
    if not kept:
        raise RarefyError(
            f"none of {len(made)} rows has at most {length} tokens: allow longer rows"
        )
    lengths = torch.tensor([len(ids) for ids, _ in kept])
    width = int(lengths.max())
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in kept])
    starts = torch.tensor([start for _, start in kept])[:, None]
    places = torch.arange(width)
    loss = (places >= starts) & (places < lengths[:, None])
    return TokenRows(ids, lengths, loss, len(made) - len(kept))


def _row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Ids, and where the part to be learnt begins."""
    eos = tokenizer.eos_token_id
    if "ids" in row:
        ids = list(row["ids"])
        return ids[:1] + _to_first(ids[1:], eos), 1
    prompt = _bos(tokenizer) + _encode(tokenizer, row["prompt"])
    completion = _to_first([*_encode(tokenizer, row["completion"]), eos], eos)
    if not prompt:
        # Without a token before it, the first one cannot be predicted.
        return completion, 1
    return prompt + completion, len(prompt)


def _to_first(ids: list[int], eos: Any) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, if the tokenizer puts it before text by default."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
