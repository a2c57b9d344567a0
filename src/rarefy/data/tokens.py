"""Token rows of equal length: seeded for calibration, inside documents for evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from rarefy.data.corpora import Corpus

_SAMPLE_CHARACTERS = 200


@dataclass(frozen=True, eq=False)
class TokenSet:
    """N rows of L tokens, without padding.

    Attributes:
        ids: int64 [N, L].
        document: int64 [N], the index in the corpus of the document in which the row begins; rows
            of one document are one cluster of a bootstrap.
        corpus: name of the corpus.
        sha256: hash of shape and ids, in hexadecimal.
        sample: the first row as text, shortened, so that a person can see what was used.
    """

    ids: torch.Tensor
    document: torch.Tensor
    corpus: str
    sha256: str
    sample: str

    @property
    def tokens(self) -> int:
        """N * L."""
        return self.ids.numel()


def calibration(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int, seed: int
) -> TokenSet:
    """Cut shuffled, concatenated documents into rows.

    Between two documents stands the tokenizer's BOS token, or its EOS token if it defines no BOS,
    or nothing if it defines neither. No other special token is added.

    Args:
        corpus: source of text.
        tokenizer: the model's own.
        sequences: N, the rows wanted.
        length: L, the tokens of a row.
        seed: of the order of the documents.

    Returns:
        N rows that fill [N, L] exactly.

    Raises:
        RarefyError: the corpus is too short; the sentence says what would work.
    """
    _check_request(sequences, length)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(corpus.documents), generator=generator).tolist()
    rows, document = _pack(corpus, tokenizer, order, sequences, length)
    return _token_set(corpus, tokenizer, rows, document)


def held_out(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int
) -> TokenSet:
    """Cut windows for evaluation, spread over as many documents as possible.

    A window lies inside one document. The first windows of all documents that are long enough
    come first, in the order of the corpus, then the second windows, and so on. If no document is
    long enough, consecutive documents are concatenated as in ``calibration``.

    Every window begins with BOS if the tokenizer adds it by default, and is plain text otherwise.

    Args:
        corpus: source of text.
        tokenizer: the model's own.
        sequences: N, the windows wanted.
        length: L, the tokens of a window, BOS included.

    Returns:
        N windows [N, L].

    Raises:
        RarefyError: the corpus is too short; the sentence says what would work.
    """
    _check_request(sequences, length)
    prefix = _default_prefix(tokenizer)
    room = length - len(prefix)
    long: list[tuple[int, list[int]]] = []
    for index, text in enumerate(corpus.documents):
        ids = _encode(tokenizer, text)
        if len(ids) >= room:
            long.append((index, ids))
        if len(long) == sequences:
            break
    if long:
        rows, document = _windows(long, sequences, room)
        if len(rows) < sequences:
            raise RarefyError(
                f"the corpus {corpus.name} has {len(rows)} windows of {length} tokens inside one "
                f"document, and {sequences} were asked for: use --sequences {len(rows)}, a smaller "
                f"--length or a longer corpus"
            )
    else:
        order = range(len(corpus.documents))
        rows, document = _pack(corpus, tokenizer, order, sequences, room)
    return _token_set(corpus, tokenizer, [prefix + row for row in rows], document)


def check_vocabulary(tokens: TokenSet, vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        RarefyError: an id is not below ``vocab_size``: the tokenizer is another model's.
    """
    highest = int(tokens.ids.max())
    if highest >= vocab_size:
        raise RarefyError(
            f"the text of {tokens.corpus} has the token id {highest}, but the model knows only "
            f"{vocab_size} tokens: this is the wrong tokenizer, use the one saved with the model"
        )


def _check_request(sequences: int, length: int) -> None:
    if sequences < 1:
        raise RarefyError(f"--sequences must be at least 1, not {sequences}")
    if length < 2:
        raise RarefyError(f"--length must be at least 2 tokens, not {length}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: rows are cut afterwards, so the warning on the model's length does not apply.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def _pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    order: Iterable[int],
    sequences: int,
    length: int,
) -> tuple[list[list[int]], list[int]]:
    """Concatenate documents until there are enough tokens, and cut them into rows."""
    separator = _separator(tokenizer)
    stream: list[int] = []
    source: list[int] = []
    for index in order:
        ids = _encode(tokenizer, corpus.documents[index])
        if not ids:
            continue
        stream += separator + ids if stream else ids
        source += [index] * (len(stream) - len(source))
        if len(stream) >= sequences * length:
            break
    starts = range(0, len(stream) - length + 1, length)[:sequences]
    if len(starts) < sequences:
        _refuse_short(corpus, len(stream), sequences, length)
    return [stream[at : at + length] for at in starts], [source[at] for at in starts]


def _refuse_short(corpus: Corpus, tokens: int, sequences: int, length: int) -> None:
    if tokens == 0:
        raise RarefyError(
            f"the tokenizer makes no token of the corpus {corpus.name}: check the tokenizer"
        )
    whole = tokens // length
    mend = f"use --sequences {whole}" if whole else f"use a --length of at most {tokens}"
    raise RarefyError(
        f"the corpus {corpus.name} has {tokens} tokens, but {sequences} sequences of {length} "
        f"need {sequences * length}: {mend}, or a longer corpus"
    )


def _windows(
    documents: list[tuple[int, list[int]]], sequences: int, length: int
) -> tuple[list[list[int]], list[int]]:
    """Take the first window of every document, then every second window, and so on."""
    places = sorted(
        (at, index, ids[at : at + length])
        for index, ids in documents
        for at in range(0, len(ids) - length + 1, length)
    )[:sequences]
    return [row for _, _, row in places], [index for _, index, _ in places]


def _token_set(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    document: list[int],
) -> TokenSet:
    ids = torch.tensor(rows, dtype=torch.int64)
    digest = hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
    text = " ".join(str(tokenizer.decode(rows[0])).split())
    short = text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + "…"
    return TokenSet(ids, torch.tensor(document, dtype=torch.int64), corpus.name, digest, short)
