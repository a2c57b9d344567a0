"""Rows of tokens, and which of them a loss counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A batch, padded on the right.

    Attributes:
        ids: int64 [B, L].
        counted: tokens whose prediction a loss counts, bool [B, L]: those of the completion, the
            end-of-text token included. Decided by position, never by comparing ids with a padding
            token, which may be the end-of-text token.
        valid: tokens that exist, bool [B, L].

    Raises:
        RarefyError: the shapes differ, or a counted token is padding or has nothing before it.
    """

    ids: Tensor
    counted: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        if not self.ids.shape == self.counted.shape == self.valid.shape or self.ids.ndim != 2:
            raise RarefyError("ids, counted and valid must be of one shape [rows, tokens]")
        before = torch.zeros_like(self.valid)
        before[:, 1:] = self.valid[:, :-1]
        if bool((self.counted & ~(self.valid & before)).any()):
            raise RarefyError(
                "a counted token is padding or the first of its row, which nothing predicts; "
                "count only tokens that follow another one"
            )

    @classmethod
    def text(cls, ids: Tensor) -> Rows:
        """Plain text, int64 [B, L]: everything but the first token of a row counts."""
        valid = torch.ones_like(ids, dtype=torch.bool)
        counted = valid.clone()
        counted[:, 0] = False
        return cls(ids, counted, valid)

    @classmethod
    def join(
        cls,
        prompts: Sequence[Tensor],
        completions: Sequence[Tensor],
        stop: Sequence[int] = (),
    ) -> Rows:
        """Put completions behind prompts; the completions count.

        Args:
            prompts: int64 [any length but 0] each. completions: int64 [any length] each.
            stop: a completion ends with the first of these; what follows is dropped.
        """
        halt = torch.tensor(list(stop), dtype=torch.int64)
        pairs = []
        for prompt, completion in zip(prompts, completions, strict=True):
            ends = torch.isin(completion, halt.to(completion.device)).nonzero()
            pairs.append((prompt, completion[: int(ends[0]) + 1] if len(ends) else completion))
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.int64, device=prompts[0].device)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        valid = torch.zeros_like(counted)
        for i, (prompt, completion) in enumerate(pairs):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.cat([prompt, completion])
            counted[i, len(prompt) : end] = True
            valid[i, :end] = True
        return cls(ids, counted, valid)

    @property
    def predicting(self) -> Tensor:
        """Positions whose logits predict a counted token: ``counted``, one to the left."""
        at = torch.zeros_like(self.counted)
        at[:, :-1] = self.counted[:, 1:]
        return at

    @property
    def labels(self) -> Tensor:
        """The counted tokens, int64 [N], row by row."""
        return self.ids[self.counted]

    @property
    def tokens(self) -> int:
        """N, how many tokens count."""
        return int(self.counted.sum())

    def spread(self, values: Tensor) -> Tensor:
        """Values [N] of the counted tokens at their places in [B, L], zeros elsewhere."""
        return values.new_zeros(self.ids.shape).masked_scatter(self.counted, values)

    def prompts(self, tokens: int = 0) -> tuple[Tensor, ...]:
        """What the model is to go on from, one int64 vector a row.

        Args:
            tokens: how many of a row's first tokens; 0 for all before the first counted one.
        """
        found = []
        for ids, counted, valid in zip(self.ids, self.counted, self.valid, strict=True):
            first = int(counted.int().argmax()) if bool(counted.any()) else int(valid.sum())
            found.append(ids[: min(tokens, int(valid.sum())) if tokens else first])
        return tuple(found)
