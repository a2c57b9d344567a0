"""Plain text from MediaWiki markup: what a reader of the article would read, and nothing else.

This is a cleaner, not a parser. It removes from the inside out, because templates, tables and
links nest, and it prefers losing a fragment to leaving markup.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TAIL = re.compile(
    r"^==\s*(?:See also|Notes|Footnotes|References|Further reading|External links)\s*==\s*$.*",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_SELF_CLOSED = re.compile(r"<(?:ref|references|br|hr)\b[^<>]*/>|<br\s*>", re.IGNORECASE)
_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|imagemap|source|syntaxhighlight|score|chem|hiero|pre)\b[^<>]*>"
    r".*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"^[ :]*\{\|(?:(?!^[ :]*\{\|).)*?^[ :]*\|\}", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NOT_PROSE = re.compile(r"\s*(?:(?i:File|Image|Category|Media)|[a-z]{2,3}(?:-[a-z]+)?)\s*:")
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_TABLE_ROW = re.compile(r"^[ \t]*[|!].*$", re.MULTILINE)
_SWITCH = re.compile(r"__[A-Z]+__")
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;:]*\)")
_AFTER_BRACKET = re.compile(r"(?<=\()[ ,;]+")
_BEFORE_COMMA = re.compile(r"[ \t]+(?=[,;])")
_STRAY_LINK = re.compile(r"\[\[|\]\]")

# Templates whose text belongs to the sentence around them, with the arguments that are the text.
_SPEAKING = {
    "convert": slice(0, 2),
    "cvt": slice(0, 2),
    "lang": slice(1, 2),
    "transl": slice(-1, None),
    "nowrap": slice(0, 1),
    "quote": slice(0, 1),
    "blockquote": slice(0, 1),
    "val": slice(0, 1),
    "circa": slice(0, 1),
}


def plain_text(markup: str) -> str:
    """Return the prose of an article: paragraphs and headings, separated by blank lines.

    Comments, footnotes, formulas, templates, tables, pictures, categories and the closing
    sections of links are dropped; links and list items keep their text.
    """
    text = _TAIL.sub("", _COMMENT.sub("", markup))
    text = _SELF_CLOSED.sub(" ", text)
    text = _ELEMENT.sub("", text)
    text = _inside_out(_TEMPLATE, _template, text)
    text = _inside_out(_TABLE, lambda _: "", text)
    text = _WEB_LINK.sub(r"\1", text)
    text = _inside_out(_LINK, _link, text)
    for pattern in (_TAG, _SWITCH, _TABLE_ROW, _LIST_MARK, _STRAY_LINK):
        text = pattern.sub("", text)
    text = _HEADING.sub(r"\n\1\n", re.sub(r"'{2,}", "", text))
    text = html.unescape(text).replace("\xa0", " ")
    for pattern in (_EMPTY_BRACKETS, _AFTER_BRACKET, _BEFORE_COMMA):
        text = pattern.sub("", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n\n".join(line for line in lines if line)


def _inside_out(
    pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str
) -> str:
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def _template(match: re.Match[str]) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    spoken = _SPEAKING.get(name.lower())
    positional = [a for a in arguments if not re.match(r"[\w-]+\s*=", a)]
    return " ".join(positional[spoken]) if spoken else ""


def _link(match: re.Match[str]) -> str:
    if _NOT_PROSE.match(match[1]):
        return ""
    return match[1].rpartition("|")[2].lstrip(":")
