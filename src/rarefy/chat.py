"""``rarefy chat``: turns are read line by line, answers appear as they are made.

On a terminal the answers of two models grow next to each other; where the output is a file or a
pipe, each turn is printed when it is complete.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from rarefy import console
from rarefy.checkpoint.load import load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.report.words import number
from rarefy.runtime.conversation import Conversation, with_stops
from rarefy.runtime.decoder import open_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rarefy.formats.kv import KVFormat
    from rarefy.runtime.sampling import Sampling

_REFRESH = 12  # times a second


@dataclass
class Voice:
    """One model in the chat.

    Attributes:
        name: over its answers. conversation: with it.
        text: of its answer so far. seconds: spent on it.
    """

    name: str
    conversation: Conversation
    text: str = ""
    seconds: float = 0.0
    pieces: Iterator[str] | None = field(default=None, repr=False)

    def begin(self, said: str) -> None:
        """Start an answer."""
        self.text, self.seconds, self.pieces = "", 0.0, self.conversation.say(said)

    def advance(self) -> str | None:
        """Make a little more of the answer; None when it is complete."""
        assert self.pieces is not None
        start = time.perf_counter()
        piece = next(self.pieces, None)
        self.seconds += time.perf_counter() - start
        self.text += piece or ""
        return piece

    @property
    def pace(self) -> str:
        """How many tokens at which rate, the reading of the turn included."""
        made = self.conversation.made
        return f"{made} tokens, {number(made / self.seconds)} tokens/s"


def open_voice(
    model: str,
    sampling: Sampling,
    system: str | None,
    kv: KVFormat | None = None,
    int8: bool = False,
) -> Voice:
    """Open a model for chatting; says so when it runs without the native decoder.

    Raises:
        RarefyError: see :func:`rarefy.runtime.decoder.open_loop`.
    """
    folder = resolve(model)
    loop, obstacle = open_loop(folder, kv=kv, int8=int8)
    if obstacle:
        console.say(f"{model} runs through transformers: {obstacle}")
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        console.say(f"{model} has no chat template; it continues the text that you type")
    rules = with_stops(sampling, folder, tokenizer)
    return Voice(model, Conversation(loop, tokenizer, rules, system))


def chat(voices: list[Voice]) -> None:
    """Talk until the input ends or says /quit; /clear begins anew."""
    console.say("/clear forgets the conversation, /quit ends it")
    for line in _lines():
        said = line.strip()
        if said == "/quit":
            return
        if said == "/clear":
            for voice in voices:
                voice.conversation.clear()
            console.say("forgotten")
        elif said:
            _turn(voices, said)


def _lines() -> Iterator[str]:
    """Lines of the input, asked for where somebody types."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # where there is one, it gives the prompt its editing keys
        import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _turn(voices: list[Voice], said: str) -> None:
    """One question and its answers."""
    for voice in voices:
        voice.begin(said)
    if len(voices) == 1:
        [voice] = voices
        while (piece := voice.advance()) is not None:
            console.out.print(Text(piece), end="", soft_wrap=True)
        console.out.print()
        console.say(voice.pace)
        return
    if not console.out.is_terminal:
        _finish(voices)
        console.out.print(_columns(voices, done=True))
        return
    with Live(console=console.out, refresh_per_second=_REFRESH) as live:
        for _ in _alternate(voices):
            live.update(_columns(voices))
        live.update(_columns(voices, done=True))


def _finish(voices: list[Voice]) -> None:
    for _ in _alternate(voices):
        pass


def _alternate(voices: list[Voice]) -> Iterator[None]:
    """Advance every answer in turn until all are complete."""
    open_ones = list(voices)
    while open_ones:
        open_ones = [voice for voice in open_ones if voice.advance() is not None]
        yield


def _columns(voices: list[Voice], done: bool = False) -> Table:
    """The answers next to each other."""
    table = Table(expand=True)
    for voice in voices:
        pace = Text(voice.pace if done else "")
        table.add_column(Text(voice.name), footer=pace, ratio=1, overflow="fold")
    table.show_footer = done
    table.add_row(*(Text(voice.text) for voice in voices))
    return table
