"""DoLa: decode what the last layers add to an earlier one (arXiv 2309.03883).

At every position the output head reads the final hidden state, q_N, and the hidden states of some
earlier ("premature") layers, q_j. The premature layer that differs most, M = argmax JSD(q_N, q_j),
is divided out: F = log q_N - log q_M over the plausible tokens, those with q_N >= alpha * max q_N.

Differences to the published code: the divergence is the true Jensen-Shannon one, and scores are
normalised over the plausible tokens (the paper's softmax) instead of over the vocabulary.

Inside :func:`contrast` the decoder appends the premature states to the channels of its final
hidden state and the head takes them apart again. Whoever selects, shifts or batches positions
between the two therefore moves both together and needs no knowledge of DoLa.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.maps.catalogue import map_for
from rarefy.maps.model_map import dims_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Layers = Literal["low", "high"] | Sequence[int]

# The paper's buckets: 2 for 32 and 40 layers, 3 for 60, 4 for 80.
_BUCKET = 20
# Positions per call of the head: bounds the memory of the extra logits, [positions, 1 + J, V].
_ROWS = 64


@dataclass(frozen=True)
class Contrast:
    """What a DoLa context does and did.

    Attributes:
        layers: the candidate premature layers; layer j is the input of block j, 0 the embedding.
        chosen: how often each was the premature layer, counted per position that the head read.
    """

    layers: tuple[int, ...]
    chosen: Counter[int] = field(default_factory=Counter)


def buckets(depth: int) -> list[range]:
    """Divide layers 0 to depth - 1 into the paper's buckets: at least 2, of at most 20 layers."""
    count = max(2, math.ceil(depth / _BUCKET))
    return [range(a, b) for a, b in pairwise(depth * i // count for i in range(count + 1))]


def candidates(depth: int, layers: Layers, *, tied: bool = False) -> tuple[int, ...]:
    """Return the candidate premature layers, ascending.

    Args:
        depth: number of decoder blocks.
        layers: "low" or "high" for the even layers of the first or last bucket, or numbers.
        tied: the head is the embedding. Layer 0 is then left out: it predicts the input token.

    Raises:
        RarefyError: an unknown name, a layer outside 0 to depth - 1, or no layer left.
    """
    if isinstance(layers, str):
        if layers not in ("low", "high"):
            raise RarefyError(f"DoLa knows no layers {layers!r}; give low, high, or layer numbers")
        bucket = buckets(depth)[0 if layers == "low" else -1]
        usable = [layer for layer in bucket if layer or not tied]
        found = [layer for layer in usable if layer % 2 == 0] or usable
    else:
        found = sorted({layer for layer in layers if layer or not tied})
    if not found or found[0] < 0 or found[-1] >= depth:
        what = f"layers {layers!r}" if isinstance(layers, str) else f"layers {[*layers]}"
        first = 1 if tied else 0
        raise RarefyError(
            f"DoLa cannot take {what} of a model of {depth} blocks; give layers "
            f"from {first} to {depth - 1}" + (" (layer 0 is the tied embedding)" if tied else "")
        )
    return tuple(found)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of log-probabilities [..., V] that broadcast: [...]."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)


def contrast_logits(logits: Tensor, alpha: float, outside: float) -> tuple[Tensor, Tensor]:
    """Contrast one mature with J premature predictions.

    Args:
        logits: [n, 1 + J, V], the mature layer's first.
        alpha: tokens with q_N >= alpha * max q_N are plausible; 0 keeps all.
        outside: the score of all others.

    Returns:
        Scores [n, V], log-probabilities over the plausible tokens, and the index of the chosen
        premature prediction [n], from 0 to J - 1.
    """
    logp = logits.float().log_softmax(-1)
    mature, premature = logp[:, 0], logp[:, 1:]
    chosen = divergence(logp[:, :1], premature).argmax(-1)
    rows = torch.arange(len(chosen), device=chosen.device)
    limit = math.log(alpha) if alpha else -math.inf
    implausible = mature < mature.amax(-1, keepdim=True) + limit
    scores = (mature - premature[rows, chosen]).masked_fill(implausible, -math.inf)
    return scores.log_softmax(-1).masked_fill(implausible, outside), chosen


@contextmanager
def contrast(
    model: Any,
    layers: Layers = "low",
    alpha: float = 0.1,
    static: int | None = None,
    *,
    normed: bool = False,
    outside: float = -1000.0,
) -> Iterator[Contrast]:
    """Make a model's head give DoLa's scores instead of logits, for the duration of the context.

    They come out wherever the head is called: in ``model(...)``, in ``model.generate(...)``, and
    when the head is given (a selection of) the decoder's last hidden states. Those have
    (1 + J) times their width meanwhile.

    Args:
        model: a causal language model of a family with a map.
        layers: candidate layers, see :func:`candidates`.
        alpha: see :func:`contrast_logits`.
        static: always contrast with this layer (the paper's static variant); ``layers`` is unused.
        normed: apply the final norm to premature states. The paper's code does not.
        outside: score of implausible tokens. The published scorer's -1000 keeps sums over a text
            comparable; the paper's minus infinity (``-math.inf``) makes most of them equal.

    Yields:
        The candidate layers, and the histogram of the chosen ones.

    Raises:
        RarefyError: the family has no map or changes its logits after the head, a layer or alpha
            is out of range, or the head receives states that the decoder did not just make.
    """
    if not 0 <= alpha <= 1:
        raise RarefyError(f"DoLa's alpha is {alpha}; give a number from 0 to 1")
    decoder, blocks, norm = _parts(model)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    wanted = layers if static is None else (static,)
    found = Contrast(candidates(len(blocks), wanted, tied=tied))
    sources = {layer: blocks[layer] for layer in found.layers}
    head, width = model.get_output_embeddings(), dims_of(model.config).hidden
    with (
        _widened(decoder, sources, norm if normed else nn.Identity()),
        _contrasting(head, found, width, (alpha, outside)),
    ):
        yield found


@contextmanager
def _widened(decoder: nn.Module, sources: dict[int, nn.Module], norm: nn.Module) -> Iterator[None]:
    """Let the decoder return [final, premature, ...] side by side: [..., (1 + J) * d]."""
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def widen(_module: nn.Module, _args: object, output: Any) -> Any:
        early = [norm(states.pop(layer)) for layer in sources]
        wide = torch.cat([output[0], *early], dim=-1)
        if isinstance(output, tuple):
            return (wide, *output[1:])
        output.last_hidden_state = wide
        return output

    handles = [
        block.register_forward_pre_hook(keep(layer), with_kwargs=True)
        for layer, block in sources.items()
    ]
    handles.append(decoder.register_forward_hook(widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: Any) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """The module that runs the blocks, the blocks, and the final norm."""
    family = model.config.model_type
    model_map = map_for(model.config)
    if model_map is None:
        raise RarefyError(f"DoLa needs a model map and {family} has none; add one to rarefy.maps")
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise RarefyError(
            f"{family} caps its logits after the head, where DoLa's scores would be capped too; "
            "set final_logit_softcapping to None in its config"
        )
    parent = model_map.blocks.rpartition(".")[0]
    blocks: Any = model.get_submodule(model_map.blocks)
    final_norm = model_map.final_norm
    norm = model.get_submodule(final_norm) if final_norm else nn.Identity()
    return model.get_submodule(parent), blocks, norm


@contextmanager
def _contrasting(
    head: nn.Module, found: Contrast, width: int, setting: tuple[float, float]
) -> Iterator[None]:
    """Let the head read [..., (1 + J) * width] and give scores [..., V]."""
    plain, before = head.forward, vars(head).copy()
    parts = 1 + len(found.layers)

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != parts * width:
            raise RarefyError(
                f"the head received {hidden.shape[-1]} channels where DoLa needs {parts} x {width}"
                "; give it the last hidden state of a decoder that ran inside the same context "
                "(one context at a time, and no projection between decoder and head)"
            )
        pieces = []
        for rows in torch.split(hidden.reshape(-1, parts, width), _ROWS):
            logits = plain(rows)
            scores, chosen = contrast_logits(logits, *setting)
            found.chosen.update(found.layers[i] for i in chosen.tolist())
            pieces.append(scores.to(logits.dtype))
        flat = torch.cat(pieces)
        return flat.reshape(*hidden.shape[:-1], flat.shape[-1])

    head.forward = forward
    try:
        yield
    finally:
        if "forward" in before:
            head.forward = plain
        else:
            del head.forward
