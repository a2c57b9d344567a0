"""The tokenizer of a checkpoint folder in GGUF's terms.

llama.cpp cuts text before merging by a rule that it knows by name, and a wrong name gives wrong
tokens without any error. So the rule is recognised from ``tokenizer.json`` itself, and what is not
recognised is refused. Only byte-level BPE is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import SpecialVocab, TokenType

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFWriter

_NUMBERED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_NUMBERED % r"\p{N}{1,3}": "llama-bpe", _NUMBERED % r"\p{N}": "qwen2"}


@dataclass(frozen=True)
class Words:
    """A vocabulary.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: by id, filled up to the rows of the embedding.
        special: merges, special ids and the chat template.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    special: Any

    def write(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to a file's keys."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        self.special.add_to_gguf(writer, quiet=True)


def read_words(folder: Path, rows: int) -> Words:
    """Read a folder's tokenizer.

    Args:
        folder: holds tokenizer.json. rows: of the embedding.

    Raises:
        RarefyError: there is none, it is of another kind, or it knows more tokens than the model.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise RarefyError(f"{folder} has no tokenizer.json, which a GGUF file needs")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise RarefyError(
            f"the tokenizer of {folder} is not byte-level BPE, the only kind that rarefy writes "
            "into GGUF; export dense and use llama.cpp's own converter"
        )
    pre = _pre_tokenizer(data.get("pre_tokenizer"), folder)
    tokens = {number: text for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in data.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["id"]] = kind
    if max(tokens) >= rows:
        raise RarefyError(
            f"the tokenizer of {folder} numbers its tokens up to {max(tokens)} and the model has "
            f"{rows} embeddings; use the tokenizer saved with the model"
        )
    return Words(
        pre,
        [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
        [int(types.get(i, TokenType.UNUSED)) for i in range(rows)],
        SpecialVocab(folder, load_merges=True, n_vocab=rows),
    )


def _pre_tokenizer(data: dict[str, Any] | None, folder: Path) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    steps = [] if data is None else data.get("pretokenizers", [data])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise RarefyError(
        f"the tokenizer of {folder} cuts text in a way that rarefy has no GGUF name for "
        f"({', '.join(kinds) or 'nothing'}); export dense and use llama.cpp's own converter"
    )
