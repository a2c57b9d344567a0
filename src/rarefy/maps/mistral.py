"""Mistral: Llama's graph; the sliding window changes no weight."""

from __future__ import annotations

from dataclasses import replace

from rarefy.maps.llama import LLAMA

MISTRAL = replace(LLAMA, family="mistral")

MAPS = (MISTRAL,)
"""The maps of this module."""
