"""A language model as a distribution over next tokens: read it, or draw from it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rarefy.losses.base import Reading
from rarefy.losses.cross_entropy import log_likelihood
from rarefy.objectives.rows import Rows
from rarefy.objectives.sampling import Draw, Sample, sample

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from torch import Tensor


class Policy(ABC):
    """What objectives ask of a student and of a teacher.

    Attributes:
        stop: tokens that end a text.
        level: what it can be asked for, 0 to 5; see ``teachers/base.py``.
    """

    stop: tuple[int, ...] = ()
    level: int = 5

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the model computes; equal models have equal ones."""

    @abstractmethod
    def logits(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            ids: int64 [B, L]. valid: bool [B, L], False at padding on the right.

        Returns:
            At least float32, [B, L, V].
        """

    @abstractmethod
    def hidden(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [B, L, d]: of the embedding, then of every block, the last one normed."""

    def read(self, rows: Rows, layers: Sequence[int] = ()) -> Reading:
        """Logits, and hidden states of ``layers``, where counted tokens are predicted."""
        at = rows.predicting
        states = self.hidden(rows.ids, rows.valid) if layers else ()
        return Reading(
            self.logits(rows.ids, rows.valid)[at], tuple(states[layer][at] for layer in layers)
        )

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """Log-probability of each counted token, float [N]."""
        return log_likelihood(self.read(rows).logits, rows.labels)

    def decode(self, prompts: Sequence[Tensor]) -> Generator[Tensor, Tensor, None]:
        """Yield logits [B, V] behind the prompts, then behind each token [B] sent in."""
        texts = list(prompts)
        while True:
            rows = Rows.join(texts, [text[:0] for text in texts])
            last = rows.valid.sum(1) - 1
            every = self.logits(rows.ids, rows.valid)
            chosen = yield every[torch.arange(len(texts), device=last.device), last]
            texts = [
                torch.cat([text, token[None]]) for text, token in zip(texts, chosen, strict=True)
            ]

    def sample(
        self,
        prompts: Sequence[Tensor],
        draw: Draw,
        generator: torch.Generator,
        other: Policy | None = None,
    ) -> Sample:
        """Continue every prompt; see :func:`rarefy.objectives.sampling.sample`."""
        return sample(self, prompts, draw, generator, other)


class ModelPolicy(Policy):
    """A causal language model of the transformers library.

    Dropout, gradients and the device are the caller's business; so is the mode (train or eval).

    Args:
        model: with all of its weights, in float32.
        fingerprint: stands for the weights; their hash when it is not given.
    """

    def __init__(self, model: Any, fingerprint: str = "") -> None:
        self.model = model
        self._given = fingerprint
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = model.config.eos_token_id if ends is None else ends
        self.stop = (
            tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
        )

    @cached_property
    def fingerprint(self) -> str:
        """The given one, or a hash of all weights as they were when first asked for."""
        if self._given:
            return self._given
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _run(self, ids: Tensor, valid: Tensor, **options: Any) -> Any:
        # Without a mask attention takes its faster causal path.
        mask = None if bool(valid.all()) else valid.long()
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options)

    def logits(self, ids: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`Policy.logits`."""
        every: Tensor = self._run(ids, valid).logits
        return _precise(every)

    def hidden(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Policy.hidden`."""
        with _only(self.model.get_output_embeddings(), torch.zeros_like(valid)):
            states = self._run(ids, valid, output_hidden_states=True).hidden_states
        return tuple(states)

    def read(self, rows: Rows, layers: Sequence[int] = ()) -> Reading:
        """One forward pass; the head runs only where a counted token is predicted."""
        at = rows.predicting
        with _only(self.model.get_output_embeddings(), at):
            out = self._run(rows.ids, rows.valid, output_hidden_states=bool(layers))
        states = tuple(out.hidden_states[layer][at] for layer in layers)
        return Reading(_precise(out.logits.flatten(0, 1)), states)

    def decode(self, prompts: Sequence[Tensor]) -> Generator[Tensor, Tensor, None]:
        """Go on with a cache of keys and values; see :meth:`Policy.decode`."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=prompts[0].device)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = prompt
            mask[i, width - len(prompt) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        while True:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            chosen = yield _precise(out.logits[:, -1])
            ids, places = chosen[:, None], places[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _only(head: torch.nn.Module, at: Tensor) -> Iterator[None]:
    """Let a head see only the chosen positions of [B, L], as one row of tokens.

    The head itself runs, not its weight, so adapters, packed weights and whatever the model does
    with logits afterwards keep their effect.
    """
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][at].unsqueeze(0), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
