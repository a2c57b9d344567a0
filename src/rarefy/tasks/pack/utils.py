"""What the YAML files beside this one refer to by ``!function utils.NAME``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets

from rarefy.tasks.loaders import rows

if TYPE_CHECKING:
    from collections.abc import Mapping


def load(items: str, **_: object) -> dict[str, datasets.Dataset]:
    """Return the frozen items of a set as the harness wants them.

    Args:
        items: the set, from ``dataset_kwargs`` of the YAML.
    """
    return {"test": datasets.Dataset.from_list(rows(items))}


def text_bits(doc: Mapping[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Score a text that the model was given to predict.

    Args:
        doc: a row with the "target" that was predicted.
        results: its summed log-probability in nats, and whether every token of it was the most
            likely one.

    Returns:
        "bits_per_byte", as the two numbers from which the harness computes it.
    """
    ((logprob, _),) = results
    return {"bits_per_byte": (logprob, len(doc["target"].encode()))}


def last_word(doc: Mapping[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Score a word to be predicted: as :func:`text_bits`, and "acc" if it comes first of all."""
    ((_, greedy),) = results
    return {**text_bits(doc, results), "acc": float(greedy)}
