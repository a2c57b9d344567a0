"""GPTQ beside llm-compressor's: same model, same tokens, same evaluator, one run.

    python bench/peer_gptq.py [--peer-venv DIR] [--calibration NAME|FILE] [--out FILE.json]

The two take turns (peer 4 bits, rarefy 4 bits, peer 3 bits, rarefy 3 bits); see peer.py.
"""

from __future__ import annotations

from typing import Any

from common import Criterion, close
from peer import in_turns, parser, table

LIMIT, GOAL = 0.55, 0.45


def main() -> None:
    """Compress in turns, evaluate all, judge."""
    options = parser(__doc__.splitlines()[0], "peer_gptq.json").parse_args()
    pairs = [({"name": "gptq", "bits": bits}, f"gptq-int{bits}-g64") for bits in (4, 3)]
    report = in_turns("peer_gptq", options, pairs, "rtn-int4-g64")
    table(report)
    close(options.out, report, judge({run["name"]: run for run in report["runs"]}))


def judge(runs: dict[str, dict[str, Any]]) -> list[Criterion]:
    """Quality and speed at both widths; the goal is reported beside the limit."""
    criteria = []
    for bits in (4, 3):
        theirs, own = runs[f"llm-compressor gptq int{bits}"], runs[f"gptq-int{bits}-g64"]
        mine, limit = own["kl_mean"]["value"], theirs["kl_mean"]["value"]
        name = f"int{bits}: KL to dense"
        criteria.append(Criterion(name, mine, f"<= {limit:.4f} (peer)", mine <= limit))
        share = own["seconds"] / theirs["seconds"]
        name = f"int{bits}: time over the peer's"
        criteria.append(Criterion(name, share, f"<= {LIMIT}", share <= LIMIT))
        criteria.append(Criterion(name, share, f"<= {GOAL}", share <= GOAL, goal=True))
    return criteria


if __name__ == "__main__":
    main()
