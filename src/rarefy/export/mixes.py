"""Which type each tensor of a GGUF file gets.

A mix is a base type and exceptions by place, under the names that llama.cpp gave them: where it
says "high", that is the first and the last eighth of the blocks and every third one in between.
The output head, or the embedding that is tied to it, has six bits unless the base has more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rarefy.errors import RarefyError
from rarefy.registry import suggest

PLAIN = ("f32", "f16", "bf16")
SMALL = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
# What stands in where 256 does not divide the columns; as in llama.cpp.
_FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Mix:
    """A base type and its exceptions.

    Attributes:
        base: of every matrix that is not named here.
        all: tensor of a block -> type in every block.
        high: tensor of a block -> type in the blocks that need more bits.
        first: tensor of a block -> (number of blocks, or share of them if below 1, and type) for
            the first of them.
    """

    base: str
    all: dict[str, str] = field(default_factory=dict)
    high: dict[str, str] = field(default_factory=dict)
    first: dict[str, tuple[float, str]] = field(default_factory=dict)


_MIXES = {
    "q2_k": Mix("q2_k", {"attn_v": "q3_k", "ffn_down": "q3_k", "attn_output": "q3_k"}),
    "q3_k_s": Mix("q3_k"),
    "q3_k_m": Mix(
        "q3_k",
        {"attn_v": "q4_k", "attn_output": "q4_k", "ffn_down": "q4_k"},
        first={"attn_v": (2, "q5_k"), "ffn_down": (1 / 16, "q5_k")},
    ),
    "q3_k_l": Mix("q3_k", {"attn_v": "q5_k", "ffn_down": "q5_k", "attn_output": "q5_k"}),
    "q4_k_s": Mix("q4_k", first={"attn_v": (4, "q5_k"), "ffn_down": (1 / 8, "q5_k")}),
    "q4_k_m": Mix("q4_k", high={"attn_v": "q6_k", "ffn_down": "q6_k"}),
    "q5_k_s": Mix("q5_k"),
    "q5_k_m": Mix("q5_k", high={"attn_v": "q6_k", "ffn_down": "q6_k"}),
    "q6_k": Mix("q6_k"),
} | {name: Mix(name) for name in (*PLAIN, *SMALL)}


def known() -> list[str]:
    """Every name that :func:`mix_named` takes."""
    return sorted(name.upper() for name in (*_MIXES, *_ALIASES))


def mix_named(name: str) -> tuple[str, Mix]:
    """A mix and its full name, from what a user wrote.

    Raises:
        RarefyError: no such mix.
    """
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in _MIXES:
        raise RarefyError(f"there is no GGUF type {name!r}{suggest(name.upper(), known())}")
    return key, _MIXES[key]


def type_for(mix: Mix, name: str, blocks: int, *, head: bool) -> str:
    """The type that a mix gives to a matrix, whatever its shape.

    Args:
        name: the tensor's name in GGUF. blocks: number of blocks.
        head: whether logits are computed with it.
    """
    if mix.base in PLAIN:
        return mix.base
    if head:
        return "q8_0" if mix.base == "q8_0" else "q6_k"
    found = _BLOCK.fullmatch(name)
    if found is None:
        return mix.base
    index, part = int(found[1]), found[2]
    count, early = mix.first.get(part, (0, ""))
    if index < int(count if count >= 1 else count * blocks):
        return early
    if part in mix.high and _is_high(index, blocks):
        return mix.high[part]
    return mix.all.get(part, mix.base)


def _is_high(index: int, blocks: int) -> bool:
    eighth = blocks // 8
    return index < eighth or index >= 7 * blocks // 8 or (index - eighth) % 3 == 2


def fitting(name: str, columns: int) -> str:
    """The type itself, or what stands in for it in rows of so many columns."""
    if name in PLAIN:
        return name
    if columns % 256 and name in _FALLBACK:
        name = _FALLBACK[name]
    return name if columns % 32 == 0 else "f16"
