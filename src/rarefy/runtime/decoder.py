"""Making tokens: one call into compiled code for each, where there is any.

    decoder = Decoder(model)
    for token in decoder.stream(prompt_ids, Sampling(max_tokens=64, stops=stops)):
        ...

What the native path refuses runs through :class:`PlainLoop`, which has the same methods.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rarefy.checkpoint.load import default_device, load_model
from rarefy.errors import RarefyError
from rarefy.formats.activation import IntActivation
from rarefy.kernels import library
from rarefy.runtime.anatomy import dissect
from rarefy.runtime.native import NativeStep
from rarefy.runtime.packed import round_inputs
from rarefy.runtime.prefill import KeyValues, read
from rarefy.runtime.sampling import Sampling
from rarefy.runtime.stored import stored_model, stored_outline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from rarefy.formats.kv import KVFormat

CAPACITY = 4096
INT8 = IntActivation(8, per="group")
_FEW = 4  # tokens that are cheaper to feed one by one than to read together


class Loop(Protocol):
    """Something that reads a prompt and makes tokens.

    Attributes:
        tokens: those whose keys and values are held.
    """

    tokens: list[int]

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Hold exactly these tokens; return the logits [vocabulary] of the one that follows."""

    def step(self, token: int) -> Tensor:
        """Append one token; return the logits [vocabulary] of the one that follows."""

    def reset(self) -> None:
        """Forget all tokens."""


def stream(loop: Loop, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Answer a prompt, token by token; the token that stops the answer is the last.

    Tokens that the prompt shares with what the loop already holds are not read again, so a
    conversation is continued by giving all of it.

    Raises:
        RarefyError: the prompt is empty, or there is no room for another token.
    """
    choose = sampling.chooser()
    logits = loop.feed(prompt)
    for number in range(1, sampling.max_tokens + 1):
        token = choose(logits)
        yield token
        if token in sampling.stops or number == sampling.max_tokens:
            return
        logits = loop.step(token)


class Decoder:
    """Native decoding of one text at a time; see :class:`Loop`.

    Args:
        model: a transformers model, or the outline of one, on the CPU; its weights are shared.
        capacity: tokens of prompt and answer that there is room for.
        cache: float32, or float16 for half the memory of keys and values.

    Attributes:
        model: as given.
        tokens: those whose keys and values are held.
        native: the compiled step, with its profile.

    Raises:
        RarefyError: the model is not of Llama's shape, no kernels are at hand, or none for one of
            its matrices.
    """

    def __init__(
        self, model: Any, capacity: int = CAPACITY, cache: torch.dtype = torch.float32
    ) -> None:
        if cache not in (torch.float32, torch.float16):
            raise RarefyError(f"keys and values are held in float32 or float16, not in {cache}")
        self.model = model
        self.anatomy = dissect(model)
        self.cache = KeyValues.empty(self.anatomy, min(capacity, self.anatomy.limit), cache)
        self.native = NativeStep(self.anatomy, self.cache)
        self.tokens: list[int] = []

    def feed(self, ids: Sequence[int]) -> Tensor:
        """See :class:`Loop`."""
        known = _reusable(self.tokens, ids)
        self._demand(len(ids))
        del self.tokens[known:]
        if len(ids) - known > _FEW:
            rest = torch.tensor(ids[known:-1], dtype=torch.int64)
            read(self.anatomy, self.native, self.cache, rest, known)
            self.tokens += ids[known:-1]
        for token in ids[len(self.tokens) :]:
            logits = self.step(token)
        return logits

    def step(self, token: int) -> Tensor:
        """See :class:`Loop`; the logits are overwritten by the next step."""
        self._demand(len(self.tokens) + 1)
        self.native.step(token, len(self.tokens))
        self.tokens.append(token)
        return self.native.logits

    def reset(self) -> None:
        """See :class:`Loop`."""
        self.tokens.clear()

    def stream(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Iterator[int]:
        """See :func:`stream`; greedy without a ``sampling``."""
        return stream(self, prompt, sampling or Sampling())

    def _demand(self, tokens: int) -> None:
        """Refuse more tokens than there is room for."""
        if tokens > self.cache.capacity:
            raise RarefyError(
                f"the text has reached the {self.cache.capacity} tokens that there is room for; "
                "start a new one (/clear), or give the decoder a larger capacity"
            )


class PlainLoop:
    """transformers' own forward, a token at a time; see :class:`Loop`.

    Args:
        model: on any device, in any type that it can run in.
        kv: how keys and values are held; None for full precision.
    """

    def __init__(self, model: Any, kv: KVFormat | None = None) -> None:
        self.model = model
        self.kv = kv
        self.reset()

    def feed(self, ids: Sequence[int]) -> Tensor:
        """See :class:`Loop`."""
        known = _reusable(self.tokens, ids)
        if known < len(self.tokens):
            # Caches of a sliding window cannot give tokens back.
            self.reset()
            known = 0
        return self._forward(list(ids[known:]))

    def step(self, token: int) -> Tensor:
        """See :class:`Loop`."""
        return self._forward([token])

    def reset(self) -> None:
        """See :class:`Loop`."""
        from rarefy.runtime.kv_cache import kv_cache  # imports transformers' model code

        self.tokens: list[int] = []
        self.cache = kv_cache(self.model, self.kv)

    def stream(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Iterator[int]:
        """See :func:`stream`; greedy without a ``sampling``."""
        return stream(self, prompt, sampling or Sampling())

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Tensor:
        out = self.model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens += ids
        logits: Tensor = out.logits[0, -1]
        return logits


def _reusable(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many held tokens begin the wanted ones; the last wanted one is always fed again.

    Raises:
        RarefyError: nothing is wanted.
    """
    if not wanted:
        raise RarefyError("there is no prompt: give at least one token")
    most = min(len(held), len(wanted) - 1)
    return next((n for n in range(most) if held[n] != wanted[n]), most)


def open_loop(
    folder: Path, capacity: int = CAPACITY, kv: KVFormat | None = None, int8: bool = False
) -> tuple[Decoder | PlainLoop, str]:
    """Open a folder for making tokens.

    Args:
        folder: of the model.
        capacity: of the native decoder, in tokens.
        kv: a quantized cache, which the native decoder does not have.
        int8: round the inputs of integer matrices by :data:`INT8`, for which the native decoder is
            faster.

    Returns:
        The native decoder and an empty text, or transformers' loop and why it had to be that.

    Raises:
        RarefyError: inputs are to be rounded, and the native decoder cannot run the model or there
            is no matrix whose inputs it would round.
    """
    device, obstacle = default_device(), ""
    if kv is not None:
        obstacle = f"the cache is {kv.label()}"
    elif device.type != "cpu":
        obstacle = f"it is made for the CPU, and {device} is there"
    elif not library.available():
        obstacle = f"there are no compiled kernels: {library.reason()}"
    else:
        with suppress(RarefyError):  # then transformers may know more
            return Decoder(_rounding(stored_outline(folder), int8), capacity), ""
        try:
            return Decoder(_rounding(stored_model(folder), int8), capacity), ""
        except RarefyError as error:
            obstacle = str(error)
    if int8:
        raise RarefyError(f"the native decoder cannot round inputs: {obstacle}; leave --int8 out")
    return PlainLoop(load_model(folder), kv), obstacle


def _rounding(model: Any, int8: bool) -> Any:
    """The model, rounding its inputs if that is wanted."""
    if int8 and round_inputs(model, INT8) == 0:
        raise RarefyError(
            "no matrix has integers of 2, 3, 4 or 8 bits, or all round their inputs already"
        )
    return model
