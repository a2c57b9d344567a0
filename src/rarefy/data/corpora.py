"""Corpora: lists of documents, from a file of the user or from a published package.

The named corpora are fixed by a package version, so that two people who name the same corpus have
the same text; the hash of the documents is in every report.

    web            OpenWebText, C4 and OSCAR documents; the default for calibration
    wiki           103 whole Wikipedia articles; the default for held-out perplexity
    wiki-passages  1,000 short Wikipedia passages

Several corpora joined by ``+`` are one: ``web+wiki-passages``.
"""

from __future__ import annotations

import bz2
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from jinja2 import TemplateError

from rarefy.data.packages import member, open_member
from rarefy.data.wikitext import plain_text
from rarefy.errors import RarefyError
from rarefy.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

_EVALS = ("evals", "3.0.1.post1")
_EVALS_DATA = "evals/registry/data"
_GENSIM = ("gensim", "4.4.0")
_WIKI_DUMP = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_STUB_BYTES = 2000


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Attributes:
        name: the known name, or the file's name.
        documents: non-empty texts.
        sha256: hash of the documents joined by NUL, in hexadecimal.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str


def load(ref: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """Load a corpus by its known name or from a file.

    Args:
        ref: ``web``, ``wiki``, ``wiki-passages``, or the path of a UTF-8 file: ``.txt`` (the whole
            file is one document) or ``.jsonl`` (one document a line, an object with ``text``, or
            with ``messages`` for the chat template), or several of these joined by ``+``. Blank
            documents are dropped.
        tokenizer: renders ``messages``; needed for nothing else.

    Raises:
        RarefyError: an unknown name, or a file that is missing, empty or malformed.
    """
    if ref in _NAMED:
        return _corpus(ref, _NAMED[ref]())
    path = Path(ref).expanduser()
    if len(refs := ref.split("+")) > 1 and all(refs) and not path.exists():
        parts = [load(part, tokenizer) for part in refs]
        name = "+".join(part.name for part in parts)
        return _corpus(name, [document for part in parts for document in part.documents])
    if path.suffix not in _READERS and len(path.parts) == 1 and not path.exists():
        raise RarefyError(
            f"there is no corpus called {ref!r}{suggest(ref, list(_NAMED))}; "
            f"or give a .txt or .jsonl file"
        )
    if not path.is_file():
        raise RarefyError(f"the corpus file {path} does not exist or is not a file")
    if path.suffix not in _READERS:
        raise RarefyError(f"the corpus file {path} must end in .txt or .jsonl")
    return _corpus(path.name, _READERS[path.suffix](path, _read(path), tokenizer))


def _corpus(name: str, documents: Iterable[str]) -> Corpus:
    kept = tuple(document for document in documents if document.strip())
    if not kept:
        raise RarefyError(f"the corpus {name} holds no text: give a file with some")
    try:
        data = "\0".join(kept).encode()
    except UnicodeEncodeError as error:
        raise RarefyError(f"the corpus {name} holds text that is not Unicode: {error}") from error
    return Corpus(name, kept, hashlib.sha256(data).hexdigest())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RarefyError(
            f"the corpus file {path} is not UTF-8 (byte {error.start}): convert it first"
        ) from error
    except OSError as error:
        raise RarefyError(f"the corpus file {path} cannot be read: {error.strerror}") from error


def _from_txt(_: Path, text: str, __: PreTrainedTokenizerBase | None) -> Iterator[str]:
    yield text


def _from_jsonl(path: Path, text: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold line separators other than the newline.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(f"{path}, line {number}", line, tokenizer)


def _document(where: str, line: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RarefyError(f"{where} is not JSON: {error.msg}") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return _render(where, record["messages"], tokenizer)
    raise RarefyError(f"{where} needs a string 'text' or a list 'messages'")


def _render(where: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        raise RarefyError(
            f"{where} has 'messages', but the model's tokenizer has no chat template: "
            f"give 'text' instead"
        )
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RarefyError(f"{where}: every message needs 'role' and 'content'")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise RarefyError(f"{where}: the chat template refuses the messages ({error})") from error


def _jsonl_member(path: str) -> list[dict[str, Any]]:
    content = member(*_EVALS, f"{_EVALS_DATA}/{path}").decode()
    return [json.loads(line) for line in content.split("\n") if line]


def _passages(file: str) -> list[str]:
    # The keys "1" to "10" hold the same passage with its sentences shuffled.
    return [record["0"] for record in _jsonl_member(f"schelling_point/{file}")]


def _web() -> Iterable[str]:
    samples = _jsonl_member("text_compression/samples.jsonl")
    documents = _passages("owt_5.jsonl")
    for kind in ("c4", "oscar", "openwebtext"):
        documents += [sample["text"] for sample in samples if sample["type"] == kind]
    return dict.fromkeys(documents)


def articles() -> Iterator[tuple[str, str]]:
    """Titles and markup of the encyclopaedia articles behind ``wiki``, stubs included."""
    with open_member(*_GENSIM, _WIKI_DUMP) as packed, bz2.open(packed) as dump:
        for _, page in ElementTree.iterparse(dump):  # noqa: S314 - as at the import
            if page.tag.endswith("}page") and page.findtext("{*}ns") == "0":
                yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""


def _wiki() -> Iterator[str]:
    for _, markup in articles():
        if len(markup.encode()) > _STUB_BYTES:
            yield plain_text(markup)


_NAMED: dict[str, Callable[[], Iterable[str]]] = {
    "web": _web,
    "wiki": _wiki,
    "wiki-passages": lambda: _passages("wikipedia_5.jsonl"),
}
_READERS: dict[str, Callable[[Path, str, PreTrainedTokenizerBase | None], Iterator[str]]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
}
