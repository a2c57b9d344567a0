"""A quantized cache of keys and values behind transformers' cache interface.

    cache = kv_cache(model, "kv4")
    model.generate(ids, past_key_values=cache)

transformers hands keys over after the rotary embedding, and so they are stored, as in KIVI. New
tokens attend to each other and to the residual window as the model made them, and to older tokens
as their codes say: a prompt that is read at once is read exactly, and its codes are met from the
next token on. Appending never changes an old code. Layers of sliding-window attention keep their
own cache, which the window bounds. What is stored where: :mod:`rarefy.formats.kv`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rarefy.errors import RarefyError
from rarefy.formats.kv import Coded, KVFormat

if TYPE_CHECKING:
    from collections.abc import Callable


class KiviLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer.

    Attributes:
        old_keys, old_values: codes; None before the first update.
        keys, values: the newest tokens as they came, [B, H, t, d].
    """

    # Removed tokens may have completed a group, and what is coded does not become exact again.
    is_croppable = False

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, form: KVFormat) -> None:
        super().__init__()
        self.form = form
        self.old_keys: Coded | None = None
        self.old_values: Coded | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, and return what they attend to, themselves included.

        Args:
            key_states, value_states: of the new tokens, [B, H, t, d].
            args, kwargs: of other kinds of caches; ignored.

        Returns:
            Keys and values of all tokens, [B, H, T, d], in the type of the new ones.

        Raises:
            RarefyError: the format's group does not divide the heads' channels.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.old_keys is None or self.old_values is None:
            self.old_keys, self.old_values = self._empty(key_states, value_states)
        self.keys = torch.cat((self.keys, key_states), -2)
        self.values = torch.cat((self.values, value_states), -2)
        keys = torch.cat((self.old_keys.decode(self.dtype), self.keys), -2)
        values = torch.cat((self.old_values.decode(self.dtype), self.values), -2)
        whole = self.form.coded(self.keys.shape[-2])[0]
        self.old_keys, self.keys = _moved(self.old_keys, self.keys, whole)
        beyond = self.form.coded(self.values.shape[-2])[1]
        self.old_values, self.values = _moved(self.old_values, self.values, beyond)
        return keys, values

    def _empty(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Coded, Coded]:
        for x in (keys, values):
            if objection := self.form.misfit(x.shape[-1]):
                raise RarefyError(objection)
        return (
            Coded.encode(keys[..., :0, :], self.form, self.form.keys_per),
            Coded.encode(values[..., :0, :], self.form, "token"),
        )

    def get_seq_length(self) -> int:
        """Tokens so far."""
        if self.old_keys is None:
            return 0
        return self.old_keys.tokens + int(self.keys.shape[-2])

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.old_keys = self.old_values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Keys whose group is cut in two return to the residual window as their codes say.

        Args:
            tokens_to_remove: their number, negated.

        Raises:
            ValueError: a positive number, as in transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negated number of tokens, not {tokens_to_remove}")
        if tokens_to_remove == 0 or self.old_keys is None or self.old_values is None:
            return
        size = max(0, self.get_seq_length() + tokens_to_remove)
        group = self.form.group
        if size < self.old_keys.tokens:
            whole = size - size % group
            cut = self.old_keys.part(whole, min(whole + group, self.old_keys.tokens))
            self.keys = cut.decode(self.dtype)[..., : size - whole, :].clone()
            self.old_keys = self.old_keys.part(0, whole)
        else:
            self.keys = self.keys[..., : size - self.old_keys.tokens, :].clone()
        if size < self.old_values.tokens:
            self.old_values = self.old_values.part(0, size)
        self.values = self.values[..., : size - self.old_values.tokens, :].clone()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each row the past of another, for beam search."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move everything to the CPU's memory."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._map(lambda t: t.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.old_keys is None or self.old_values is None:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        self.old_keys = self.old_keys.mapped(change)
        self.old_values = self.old_values.mapped(change)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        if self.old_keys is None or self.old_values is None:
            return 0
        window = self.keys.nbytes + self.values.nbytes
        return int(self.old_keys.nbytes + self.old_values.nbytes + window)


def _moved(old: Coded, window: torch.Tensor, count: int) -> tuple[Coded, torch.Tensor]:
    """Move the oldest tokens of a window to the codes."""
    if count == 0:
        return old, window
    newer = Coded.encode(window[..., :count, :], old.form, old.per)
    # A slice would keep the memory of what it is cut from.
    return old.join(newer), window[..., count:, :].clone()


class KVCache(DynamicCache):  # type: ignore[misc]
    """All layers of a model.

    Args:
        config: the model's.
        form: how layers of full attention are stored.

    Raises:
        RarefyError: the model has no such layer.
    """

    def __init__(self, config: Any, form: KVFormat) -> None:
        super().__init__(config=config)
        self.form = form
        plain = [type(layer) is DynamicLayer for layer in self.layers]
        if not any(plain):
            raise RarefyError(
                f"{config.model_type} has no layer of full attention whose cache could be "
                "quantized; leave the cache in full precision"
            )
        self.layers: list[Any] = [
            KiviLayer(form) if swap else layer
            for swap, layer in zip(plain, self.layers, strict=True)
        ]

    def bytes_per_token(self) -> float:
        """Bytes that a token outside the windows takes in all quantized layers, for one row.

        Raises:
            RarefyError: nothing has been read, so that the heads are not known.
        """
        total = 0.0
        for layer in self.layers:
            if isinstance(layer, KiviLayer):
                if layer.old_keys is None or layer.old_values is None:
                    raise RarefyError("the cache is empty; let the model read something first")
                for old in (layer.old_keys, layer.old_values):
                    total += self.form.bytes_per_token(old.words.shape[1], old.width) / 2
        return total


def kv_cache(model: Any, form: KVFormat | str | int | None = None) -> Cache:
    """A new, empty cache for ``model(..., past_key_values=...)`` and ``model.generate``.

    Args:
        model: of transformers.
        form: a :class:`KVFormat`, its bits, or its spelling, ``kv4`` or ``kv4-g16-r64``; None and
            16 mean full precision.

    Raises:
        RarefyError: an unknown spelling, or a model without layers of full attention.
    """
    wanted = form if isinstance(form, KVFormat) or form is None else KVFormat.parse(str(form))
    config = model.config.get_text_config(decoder=True)
    return DynamicCache(config=config) if wanted is None else KVCache(config, wanted)


def stored_bytes(cache: Cache) -> int:
    """Bytes of the tensors of any cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, KiviLayer):
            total += layer.nbytes
        elif getattr(layer, "keys", None) is not None:
            total += layer.keys.nbytes + layer.values.nbytes
    return total
