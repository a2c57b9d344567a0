"""A teacher made of tables or functions: for tests, and to replay answers made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rarefy.errors import RarefyError
from rarefy.teachers.base import Answer, Ask, Level, Prompt, Teacher, TokenScore

if TYPE_CHECKING:
    import torch

Script: TypeAlias = Mapping[str, str | Sequence[str]] | Callable[[Ask], str | Answer]
"""Rendered prompt -> text, or one text a sample; or a function of the ask."""


class ScriptedTeacher(Teacher):
    """Answers from a script.

    Args:
        script: see :data:`Script`; plain text finishes with ``stop``.
        name: the model's name.
        level: T0 to T3; T2 needs ``scores`` and T3 needs ``logits`` too.
        scores: (rendered prompt, completion, top) -> scores of the completion's tokens.
        logits: int64 [B, L] -> float32 [B, L, V].
    """

    def __init__(
        self,
        script: Script,
        name: str = "scripted",
        level: Level = Level.T0,
        scores: Callable[[str, str, int], list[TokenScore]] | None = None,
        logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        top = Level.T1 if scores is None else Level.T2 if logits is None else Level.T3
        if level > top:
            raise RarefyError(
                f"a scripted teacher of level {level.name} needs "
                f"{'scores' if scores is None else 'logits, and stops at T3'}"
            )
        super().__init__(name, level)
        self._script, self._scores, self._logits = script, scores, logits

    def _answers(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        for index, ask in enumerate(asks):
            said = self._script(ask) if callable(self._script) else self._look_up(ask)
            answer = Answer(said, "stop") if isinstance(said, str) else said
            if ask.sampling.logprobs and not answer.tokens:
                raise RarefyError(f"the script of {self.name} has no log-probabilities")
            yield index, answer

    def _look_up(self, ask: Ask) -> str:
        assert isinstance(self._script, Mapping)
        prompt = self.render(ask.prompt)
        texts = self._script.get(prompt, ())
        if isinstance(texts, str):
            return texts
        if ask.sample >= len(texts):
            raise RarefyError(
                f"the script of {self.name} has no answer {ask.sample} to {prompt[:80]!r}"
            )
        return texts[ask.sample]

    def score(self, prompt: Prompt, completion: str, top: int = 0) -> list[TokenScore]:
        """What the script gives (level T2)."""
        self.require(Level.T2, "score")
        assert self._scores is not None
        return self._scores(self.render(prompt), completion, top)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """What the script gives (level T3)."""
        self.require(Level.T3, "logits")
        assert self._logits is not None
        return self._logits(ids)
