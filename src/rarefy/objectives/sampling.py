"""Text drawn from a policy, or token by token from a mixture of two.

The raw distribution is sampled: no top-k, nucleus or repetition penalty, whatever a model's
generation settings say. Mixing is the last step before drawing, and each side keeps its own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rarefy.objectives.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.objectives.policy import Policy


@dataclass(frozen=True)
class Draw:
    """How to sample.

    Attributes:
        tokens: the most that are drawn for a row.
        temperature: divides the logits of both sides.
        alpha: share of the other policy in the mixture ``alpha P + (1 - alpha) Q``.
    """

    tokens: int
    temperature: float = 1.0
    alpha: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Prompts with what was drawn behind them.

    Attributes:
        rows: the drawn tokens count, up to and including the first end-of-text token.
        log_prob: of each counted token under the distribution that it was drawn from, float [N].
    """

    rows: Rows
    log_prob: torch.Tensor


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[torch.Tensor],
    draw: Draw,
    generator: torch.Generator,
    other: Policy | None = None,
) -> Sample:
    """Continue every prompt.

    Args:
        policy: Q.
        prompts: int64 [any length but 0] each.
        draw: how.
        generator: the only source of chance; on the device of the logits.
        other: P, if ``draw.alpha`` is not zero.
    """
    sides = [policy] if other is None or draw.alpha == 0 else [policy, other]
    shares = [1.0] if len(sides) == 1 else [1 - draw.alpha, draw.alpha]
    streams = [side.decode(prompts) for side in sides]
    logits = [next(stream) for stream in streams]
    stop = torch.tensor(policy.stop, dtype=torch.int64, device=logits[0].device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=logits[0].device)
    tokens, log_probs, drawn = [], [], []
    while True:
        mixed = sum(
            share * torch.softmax(z / draw.temperature, -1)
            for share, z in zip(shares, logits, strict=True)
        )
        assert isinstance(mixed, torch.Tensor)
        chosen = torch.multinomial(mixed, 1, generator=generator)
        tokens.append(chosen[:, 0])
        log_probs.append(mixed.gather(1, chosen)[:, 0].log())
        drawn.append(alive)
        alive = alive & ~torch.isin(chosen[:, 0], stop)
        if len(tokens) == draw.tokens or not alive.any():
            break
        logits = [stream.send(chosen[:, 0]) for stream in streams]
    completions = torch.stack(tokens, 1)
    rows = Rows.join(prompts, list(completions), policy.stop)
    return Sample(rows, torch.stack(log_probs, 1)[torch.stack(drawn, 1)])
