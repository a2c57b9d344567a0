"""Qwen 2 and 3: Llama's graph, with biases on q, k, v (2) or norms on each head's q, k (3).

Qwen 3 normalizes every query and key head, so that a channel's scale would not pass through to the
attention scores. Neither edge is foldable in Llama's graph, and the head norms hold no matrix.
"""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.llama import LLAMA

QWEN2 = replace(LLAMA, family="qwen2")
QWEN3 = replace(LLAMA, family="qwen3")

MAPS = (QWEN2, QWEN3)
"""The maps of this module."""
