"""A conversation with a model: its chat template, its answers as pieces of text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rarefy.runtime.decoder import stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rarefy.runtime.decoder import Loop
    from rarefy.runtime.sampling import Sampling

_BROKEN = "\ufffd"  # what bytes decode to before the character is complete


@dataclass
class Conversation:
    """Turns of a user and a model.

    Attributes:
        loop: makes the tokens; it holds what was said, so that a turn reads only what is new.
        tokenizer: with the model's chat template; without one, texts follow each other plainly.
        sampling: rules of every answer; its stops are extended by the model's own.
        system: what the model is told first, or None.
        messages: what was said, as the template takes it.
        made: tokens of the last answer.
    """

    loop: Loop
    tokenizer: Any
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.loop.reset()
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def say(self, text: str) -> Iterator[str]:
        """Say something; yields the answer in pieces that are whole characters.

        Raises:
            RarefyError: the conversation has grown beyond what there is room for.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids: list[int] = []
        shown = ""
        for token in stream(self.loop, self.prompt(asked), self.sampling):
            ids.append(token)
            whole = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not whole.endswith(_BROKEN):
                yield whole[len(shown) :]
                shown = whole
        self.made = len(ids)
        self.messages = [*asked, {"role": "assistant", "content": shown}]

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the model is to continue."""
        if self.tokenizer.chat_template is None:
            said = "\n".join(message["content"] for message in messages) + "\n"
            ids: list[int] = self.tokenizer(said)["input_ids"]
            return ids
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def with_stops(sampling: Sampling, folder: Path, tokenizer: Any) -> Sampling:
    """The rules with the tokens at which a model folder says that an answer ends."""
    file = folder / "generation_config.json"
    known = json.loads((file if file.is_file() else folder / "config.json").read_text())
    ends = known.get("eos_token_id")
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return replace(sampling, stops=sampling.stops | (found - {None}))
