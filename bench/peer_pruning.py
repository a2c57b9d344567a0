"""Wanda and SparseGPT at 50 % beside llm-compressor's: same model, tokens and evaluator, one run.

    python bench/peer_pruning.py [--peer-venv DIR] [--calibration NAME|FILE] [--out FILE.json]

The two take turns (peer Wanda, rarefy Wanda, peer SparseGPT, rarefy SparseGPT); see peer.py.
"""

from __future__ import annotations

from typing import Any

from common import Criterion, close
from peer import in_turns, parser, table

LIMIT = 0.5
METHODS = ("wanda", "sparsegpt")


def main() -> None:
    """Compress in turns, evaluate all, judge."""
    options = parser(__doc__.splitlines()[0], "peer_pruning.json").parse_args()
    pairs = [({"name": name, "sparsity": 0.5}, f"{name}-50") for name in METHODS]
    report = in_turns("peer_pruning", options, pairs, "magnitude-50")
    table(report)
    close(options.out, report, judge({run["name"]: run for run in report["runs"]}))


def judge(runs: dict[str, dict[str, Any]]) -> list[Criterion]:
    """Quality and speed of both methods."""
    criteria = []
    for name in METHODS:
        theirs, own = runs[f"llm-compressor {name}"], runs[f"{name}-50"]
        mine, limit = own["kl_mean"]["value"], theirs["kl_mean"]["value"]
        criteria.append(
            Criterion(f"{name}: KL to dense", mine, f"<= {limit:.4f} (peer)", mine <= limit)
        )
        share = own["seconds"] / theirs["seconds"]
        criteria.append(
            Criterion(f"{name}: time over the peer's", share, f"<= {LIMIT}", share <= LIMIT)
        )
    return criteria


if __name__ == "__main__":
    main()
