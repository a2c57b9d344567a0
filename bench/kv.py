"""Perplexity of the default model read token by token through quantized caches, and their bytes.

    python bench/kv.py [--model demo] [--windows 4 512] [--out FILE.json]

All windows are read side by side; every cache takes the same step before any takes the next. The
row "keys per token" is a control: it shows what KIVI's grouping of keys is good for.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import OUT, Criterion, close, machine, show

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora
from rarefy.data.tokens import held_out
from rarefy.evaluate.incremental import REFERENCE, CacheReading, read_incrementally
from rarefy.formats.kv import KVFormat

if TYPE_CHECKING:
    import torch

FORMATS = {
    "kv8": KVFormat(bits=8),
    "kv4": KVFormat(bits=4),
    "kv2": KVFormat(bits=2),
    "kv2, keys per token": KVFormat(bits=2, keys_per="token"),
}
_SHOWN = ("perplexity", "kl", "agreement", "number_bits", "token_bytes", "bytes", "seconds")


def main() -> None:
    """Read, print the table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, nargs=2, default=(4, 512), metavar=("N", "L"))
    parser.add_argument("--step", type=int, default=1, help="tokens read at a time")
    parser.add_argument("--out", type=Path, default=OUT / "kv.json")
    options = parser.parse_args()
    report: dict[str, Any] = {"bench": "kv", "machine": machine(0)}
    folder = resolve(options.model)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    windows = held_out(corpora.load("wiki", tokenizer), tokenizer, *options.windows)
    found = read_incrementally(model, windows, FORMATS, step=options.step, tell=_tell)
    shape = _shape(model.config)
    full = next(iter(found.values()))
    rows = {REFERENCE: _full(full, shape, model.dtype.itemsize)}
    rows |= {name: _row(FORMATS[name], one, shape, model.dtype) for name, one in found.items()}
    report |= {
        "settings": {"model": options.model, "windows": list(options.windows),
                     "step": options.step, "sha256": windows.sha256},
        "rows": rows,
        "readings": {name: asdict(one) for name, one in found.items()},
    }  # fmt: skip
    head = ("", "ppl", "KL to full", "top-1", "bits a number", "bytes a token", "cache bytes", "s")
    lines = [(name, *(row[key] for key in _SHOWN)) for name, row in rows.items()]
    show("read token by token through the cache", head, lines)
    close(options.out, report, judge(rows))


def _tell(what: str, done: int, total: int) -> None:
    print(f"{what} {done} of {total}", flush=True)


def _shape(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, width


def _full(one: CacheReading, shape: tuple[int, int, int], itemsize: int) -> dict[str, float]:
    numbers = 2 * math.prod(shape)
    return {
        "perplexity": one.quality.perplexity_dense.value,
        "kl": 0.0,
        "agreement": 1.0,
        "token_bytes": float(numbers * itemsize),
        "number_bits": 8.0 * itemsize,
        "bytes": one.bytes_full,
        "declared_bytes": one.tokens * numbers * itemsize,
        "seconds": one.seconds_full,
    }


def _row(
    form: KVFormat, one: CacheReading, shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, float]:
    layers, *heads = shape
    return {
        "perplexity": one.quality.perplexity.value,
        "kl": one.quality.kl_mean.value,
        "agreement": one.quality.agreement.value,
        "token_bytes": layers * form.bytes_per_token(*heads),
        "number_bits": 8 * form.bytes_per_token(*heads) / (2 * math.prod(heads)),
        "bytes": one.bytes,
        "declared_bytes": layers * form.layer_bytes(one.tokens, *heads, dtype.itemsize),
        "seconds": one.seconds,
    }


def judge(rows: dict[str, dict[str, float]]) -> list[Criterion]:
    """Bytes as declared, more damage with fewer bits, and keys better off by channel."""
    ladder = [rows[name] for name in (REFERENCE, "kv8", "kv4", "kv2")]
    ordered = all(a["kl"] < b["kl"] for a, b in pairwise(ladder))
    honest = all(row["bytes"] == row["declared_bytes"] for row in rows.values())
    ratio = rows["kv4"]["perplexity"] / rows[REFERENCE]["perplexity"]
    control = rows["kv2"]["kl"] / rows["kv2, keys per token"]["kl"]
    return [
        Criterion("bytes of every cache as declared", honest, "true", honest),
        Criterion("KL rises as bits fall", ordered, "true", ordered),
        Criterion("perplexity, kv4 over full", ratio, "<= 1.05", ratio <= 1.05, goal=True),
        Criterion("KL at 2 bits, keys per channel over per token", control, "< 1", control < 1),
    ]


if __name__ == "__main__":
    main()
