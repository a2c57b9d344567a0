"""A Hugging Face causal language model as a teacher, of every level.

The decoding loop is our own because transformers' ``generate`` draws all rows of a batch from one
stream of random numbers (so an answer would depend on its neighbours) and merges the model's
``generation_config`` into what the caller asks (so a vendor's top_k or repetition penalty would
slip into what is meant to be the raw policy).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.errors import RarefyError
from rarefy.teachers.base import Answer, Ask, Choose, Level, Prompt, Sampling, Teacher, TokenScore
from rarefy.teachers.sampling import Streams, draw, probabilities

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class LocalTeacher(Teacher):
    """A model and its tokenizer in memory.

    Args:
        model: a transformers causal LM; it is put into evaluation mode.
        tokenizer: the model's own.
        name: identifies the model in caches.
        batch: prompts answered at a time.
        level: lower it to hide what the model could do.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, batch: int = 8, level: Level = Level.T5
    ) -> None:
        super().__init__(name, level)
        self._model, self._tokenizer, self._batch = model.eval(), tokenizer, batch
        said = model.generation_config.eos_token_id
        said = tokenizer.eos_token_id if said is None else said
        self._ends = frozenset([said] if isinstance(said, int) else said or [])

    @classmethod
    def open(cls, ref: str | Path, batch: int = 8) -> LocalTeacher:
        """Load what ``ref`` names: a folder, a .gguf file, a hub id or ``demo``."""
        folder = resolve(ref)
        label = Path(ref).name if Path(ref).exists() else ref
        name = f"{label}@{Checkpoint(folder).fingerprint()[:12]}"
        return cls(load_model(folder), load_tokenizer(folder), name, batch)

    def render(self, prompt: Prompt) -> str:
        """Apply the chat template to messages; plain text stays as it is.

        Raises:
            RarefyError: messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return prompt
        if not self._tokenizer.chat_template:
            raise RarefyError(f"{self.name} has no chat template: ask it plain text, not messages")
        messages = [dict(message) for message in prompt]
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        # A chat template writes its own special tokens.
        plain = isinstance(prompt, str)
        encoded = self._tokenizer(self.render(prompt), add_special_tokens=plain, verbose=False)
        ids: list[int] = encoded["input_ids"]
        if not ids:
            raise RarefyError(f"an empty prompt cannot be asked of {self.name}: give it some text")
        return ids

    def _answers(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        prompts = [self._encode(ask.prompt) for ask in asks]
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for index in sorted(range(len(asks)), key=lambda index: len(prompts[index])):
            alike[asks[index].sampling].append(index)
        for sampling, members in alike.items():
            self._check_room(len(prompts[members[-1]]) + sampling.max_tokens)
            for start in range(0, len(members), self._batch):
                some = members[start : start + self._batch]
                writer = _Writer(self._tokenizer, self._ends, [asks[index] for index in some])
                ids, mask = _left_padded([prompts[index] for index in some])
                width = ids.shape[1]
                rows = self._run(ids, writer.choose, width + sampling.max_tokens, mask)
                for place, (index, row) in enumerate(zip(some, rows, strict=True)):
                    yield index, writer.answer(place, row[width:])

    def _check_room(self, length: int) -> None:
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None and length > room:
            raise RarefyError(
                f"{self.name} reads at most {room} tokens, and prompt and answer may take "
                f"{length}: shorten the prompt or allow fewer new tokens"
            )

    @torch.inference_mode()
    def score(self, prompt: Prompt, completion: str, top: int = 0) -> list[TokenScore]:
        """Score a completion's tokens (level T2); see :meth:`Teacher.score`."""
        self.require(Level.T2, "score")
        before = self._encode(prompt)
        after = self._tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        self._check_room(len(before) + len(after))
        logits = self._forward(torch.tensor([before + after]))[0, len(before) - 1 : -1]
        return [
            _token_score(self._tokenizer, *pair, top) for pair in zip(logits, after, strict=True)
        ]

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, L, V] of ids [B, L] (level T3)."""
        self.require(Level.T3, "logits")
        return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._model(ids.to(self._model.device), use_cache=False).logits
        return result.float().cpu()

    @property
    def vocabulary(self) -> int:
        """Ids that both the tokenizer and the model know (level T3)."""
        self.require(Level.T3, "vocabulary")
        return min(len(self._tokenizer), int(self._model.get_output_embeddings().weight.shape[0]))

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text (level T3)."""
        self.require(Level.T3, "ends")
        return self._ends

    def text(self, ids: Sequence[int]) -> str:
        """Decode without special tokens (level T3)."""
        self.require(Level.T3, "text")
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def decode(self, ids: torch.Tensor, choose: Choose, max_length: int) -> list[list[int]]:
        """Write on with a caller's choice (level T4); see :meth:`Teacher.decode`."""
        self.require(Level.T4, "decode")
        self._check_room(max_length)
        return self._run(ids, choose, max_length)

    @torch.inference_mode()
    def _run(
        self, ids: torch.Tensor, choose: Choose, max_length: int, mask: torch.Tensor | None = None
    ) -> list[list[int]]:
        start, device = ids.shape[1], self._model.device
        cache, fresh, ended = None, ids, torch.zeros(len(ids), dtype=torch.bool)
        ends = torch.tensor(sorted(self._ends), dtype=torch.int64)
        while ids.shape[1] < max_length and not ended.all():
            places = _places(mask, fresh.shape[1], device)
            out = self._model(
                fresh.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1, **places
            )
            cache = out.past_key_values
            fresh = choose(ids, out.logits[:, -1].float().cpu())[:, None]
            ids = torch.cat([ids, fresh], dim=1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(fresh)], dim=1)
            ended |= torch.isin(fresh[:, 0], ends)
        return [_until_end(row, start, self._ends) for row in ids.tolist()]

    def weights(self) -> torch.nn.Module:
        """The module itself (level T5)."""
        self.require(Level.T5, "weights")
        module: torch.nn.Module = self._model
        return module


class _Writer:
    """Chooses the tokens of one batch of asks, and makes answers of what was written."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], asks: list[Ask]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._sampling = asks[0].sampling
        self._streams = Streams([ask.stream for ask in asks])
        self._written: list[list[int]] = [[] for _ in asks]
        self._scores: list[list[TokenScore]] = [[] for _ in asks]

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Take the most probable token, or draw one; end rows that reached a stop text."""
        how = self._sampling
        if how.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            p = probabilities(logits, how.temperature, how.top_k, how.top_p)
            chosen = draw(p, self._streams.uniform())
        for row, token in enumerate(chosen.tolist()):
            if how.logprobs:
                score = _token_score(self._tokenizer, logits[row], token, how.logprobs)
                self._scores[row].append(score)
            self._written[row].append(token)
            if self._ends and how.stop and self._stop_at(self._written[row]) is not None:
                chosen[row] = min(self._ends)
        return chosen

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _stop_at(self, ids: list[int]) -> int | None:
        text = self._text(ids)
        places = [text.find(stop) for stop in self._sampling.stop]
        return min((place for place in places if place >= 0), default=None)

    def answer(self, row: int, ids: list[int]) -> Answer:
        """Cut the row's text at its stop text and say why it ended."""
        written = self._written[row][: len(ids)]
        at = self._stop_at(written)
        ended = at is not None or (bool(ids) and ids[-1] in self._ends)
        scores = tuple(self._scores[row][: len(ids)])
        return Answer(self._text(written)[:at], "stop" if ended else "length", scores)


def _left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return ids [B, P] that end together, and which of them are real (None where all are)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids, None if mask.all() else mask


def _places(mask: torch.Tensor | None, fresh: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Arguments that hide the padding: the mask, and positions counted without it."""
    if mask is None:
        return {}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -fresh:]
    return {"attention_mask": mask.to(device), "position_ids": positions.to(device)}


def _until_end(row: list[int], start: int, ends: frozenset[int]) -> list[int]:
    """Cut a row after the first generated id that ends a text."""
    last = next((at for at in range(start, len(row)) if row[at] in ends), len(row) - 1)
    return row[: last + 1]


def _token_score(tokenizer: Any, logits: torch.Tensor, token: int, top: int) -> TokenScore:
    """Score one token; the raw policy's log-probability, whatever the temperature."""
    logp = logits.log_softmax(-1)
    best = logp.topk(min(top, len(logp)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    names = tuple((str(tokenizer.decode([i])), value) for i, value in pairs)
    return TokenScore(str(tokenizer.decode([token])), float(logp[token]), names)
