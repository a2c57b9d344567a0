"""Reading a prompt: many tokens at once through a decoder that was taken apart.

The products of many rows are the compiled ones, with the matrices as they are stored. Only keys
and values are wanted, so that the last block stops at them and the head is never run; the prompt's
last token takes the path of every later token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rarefy.runtime.anatomy import Anatomy, Block, Share

_CHUNK = 512  # tokens that pass through the blocks together


class Products(Protocol):
    """Multiplies by the decoder's matrices; ``runtime.native.NativeStep`` does."""

    def product(self, linear: nn.Module, x: Tensor) -> Tensor:
        """``W x + b`` for rows x float32 [T, n], giving [T, m]."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, float32 [T, hidden] for ids [T]."""


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of the tokens read so far, and the tables that place them.

    Attributes:
        keys, values: for each block [kv_heads, capacity, head_dim], float32 or float16; pages
            that no token has reached take no memory.
        cosine, sine: [capacity, rotary / 2].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cosine: Tensor
    sine: Tensor

    @classmethod
    def empty(cls, anatomy: Anatomy, capacity: int, dtype: torch.dtype) -> KeyValues:
        """Room for ``capacity`` tokens."""

        def room(share: Share) -> Tensor:
            heads = share.rows // anatomy.head_dim
            return torch.empty(heads, capacity, anatomy.head_dim, dtype=dtype)

        return cls(
            tuple(room(block.key) for block in anatomy.blocks),
            tuple(room(block.value) for block in anatomy.blocks),
            *anatomy.rope(capacity),
        )

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self.cosine.shape[0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token adds."""
        rooms = (*self.keys, *self.values)
        return sum(room.nbytes for room in rooms) // self.capacity


@torch.inference_mode()
def read(anatomy: Anatomy, products: Products, cache: KeyValues, ids: Tensor, past: int) -> None:
    """Put the keys and values of some tokens into the cache.

    Args:
        anatomy: the decoder.
        products: multiplies by its matrices.
        cache: receives positions ``past .. past + len(ids)``.
        ids: int64 [T].
        past: tokens already in the cache.
    """
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        _read_chunk(anatomy, products, cache, chunk, past + start)


def _read_chunk(
    anatomy: Anatomy, products: Products, cache: KeyValues, ids: Tensor, past: int
) -> None:
    x = products.rows(ids)
    last = len(anatomy.blocks) - 1
    for number, block in enumerate(anatomy.blocks):
        normed = _norm(x, block.attention_norm, anatomy.epsilon)
        query, key, value = _products(products, normed, (block.query, block.key, block.value))
        _append(anatomy, cache, number, key, value, past)
        if number == last:
            return
        mixed = _attend(anatomy, cache, number, query, past)
        x = x + products.product(block.output.linear, mixed)
        normed = _norm(x, block.mlp_norm, anatomy.epsilon)
        gate, up = _products(products, normed, (block.gate, block.up))
        x = x + products.product(block.down.linear, F.silu(gate) * up)


def _append(
    anatomy: Anatomy, cache: KeyValues, number: int, key: Tensor, value: Tensor, past: int
) -> None:
    block, stop = anatomy.blocks[number], past + len(key)
    placed = _place(key, block.key_norm, anatomy, cache, past)
    cache.keys[number][:, past:stop] = placed
    cache.values[number][:, past:stop] = _heads(value, anatomy.head_dim)


def _attend(anatomy: Anatomy, cache: KeyValues, number: int, query: Tensor, past: int) -> Tensor:
    """What each head attends to, [T, heads * dim]."""
    block, count = anatomy.blocks[number], len(query)
    placed = _place(query, block.query_norm, anatomy, cache, past)
    stop = past + count
    mixed = F.scaled_dot_product_attention(
        placed.unsqueeze(0),
        cache.keys[number][:, :stop].unsqueeze(0).float(),
        cache.values[number][:, :stop].unsqueeze(0).float(),
        attn_mask=_mask(block, count, past),
        scale=anatomy.scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1).reshape(count, -1)


def _mask(block: Block, count: int, past: int) -> Tensor:
    """Which of the positions 0 .. past + T each of T tokens sees: bool [T, past + T]."""
    behind = torch.arange(past, past + count).unsqueeze(1) - torch.arange(past + count)
    seen = behind >= 0
    return seen & (behind < block.window) if block.window else seen


def _place(x: Tensor, norm: Tensor | None, anatomy: Anatomy, cache: KeyValues, past: int) -> Tensor:
    """Normalize heads, if the model does, and rotate them: [T, heads * dim] -> [heads, T, dim]."""
    heads = _heads(x, anatomy.head_dim)
    if norm is not None:
        heads = _norm(heads, norm, anatomy.epsilon)
    half = cache.cosine.shape[1]
    cosine, sine = (table[past : past + len(x)] for table in (cache.cosine, cache.sine))
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine, rest), -1)


def _heads(x: Tensor, dim: int) -> Tensor:
    return x.view(len(x), -1, dim).transpose(0, 1)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.float(), epsilon)


def _products(products: Products, x: Tensor, shares: tuple[Share, ...]) -> list[Tensor]:
    """Each share's output; a matrix that several of them share is multiplied once."""
    whole = {id(share.linear): share.linear for share in shares}
    done = {key: products.product(linear, x) for key, linear in whole.items()}
    return [
        done[id(share.linear)][:, share.row : share.row + share.rows].contiguous()
        for share in shares
    ]
