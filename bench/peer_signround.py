"""SignRound beside auto-round's: same model, same tokens, same steps, same evaluator.

    python bench/peer_signround.py [--peer-venv DIR] [--only GLOB] [--again GLOB]

The two take turns at 4 and at 3 bits, each followed by our composed recipe of the same size, which
may use other text (--text; not the held-out one); see peer.py. Rows that the report at --out
holds, made with the same settings, are kept, so a stopped run goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Criterion, close
from peer import (
    AUTO_ROUND,
    described,
    ours,
    parser,
    peer,
    peer_name,
    peer_python,
    quality,
    ranking,
    tokens_of,
)
from safetensors.torch import save_file
from table import opened, save

from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora
from rarefy.tasks.scorers import ngrams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

STEPS = 50
LIMIT = 0.5
RUN = 13  # words in common that no two texts have by chance
GOALS = {4: 0.07, 3: 0.25}

Runs = dict[str, dict[str, Any]]


def main() -> None:
    """Compress in turns, evaluate all, judge."""
    options = parse()
    source = resolve(options.model)
    tokens = tokens_of(source, options)
    settings = {
        "model": options.model, "tokens_sha256": tokens.sha256, "steps": STEPS,
        "peer": AUTO_ROUND.package, "windows": list(options.windows),
        "text": options.text,
    }  # fmt: skip
    report = opened("peer_signround", settings, options.out, options.seed)
    report["calibration"] = described(tokens)
    rows: Runs = report["rows"]
    for name in [name for name in rows if options.again and fnmatch(name, options.again)]:
        del rows[name]
    with tempfile.TemporaryDirectory(prefix="rarefy-peer-", dir=options.work) as folder:
        work = Path(folder)
        save_file({"ids": tokens.ids}, work / "tokens.safetensors")
        for bits in GOALS:
            for name, start in turns(bits, source, work, options).items():
                if name in rows or not fnmatch(name, options.only):
                    continue
                found = start()
                rows[name] = found | quality(work / name, source, options.windows)
                print(f"{name}: {found['seconds']:.0f} s", flush=True)
                save(report, options.out)
                shutil.rmtree(work / name)
    ranking(list(rows.values()))
    report["shared_documents"] = shared(options.text)
    close(options.out, report, judge(rows, tokens.sha256, report["shared_documents"]))


def parse() -> argparse.Namespace:
    """Options; the defaults are the published setting."""
    found = parser(__doc__.splitlines()[0], "peer_signround.json", AUTO_ROUND)
    found.add_argument("--only", metavar="GLOB", default="*", help="rows to make")
    found.add_argument("--text", default="web+wiki-passages", help="of the composed recipes")
    found.add_argument("--again", metavar="GLOB", help="rows to make anew")
    return found.parse_args()


def turns(
    bits: int, source: Path, work: Path, options: argparse.Namespace
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is run at one width, in order: name of the row -> its run."""
    method = {"name": "signround", "bits": bits, "steps": STEPS}

    def theirs() -> dict[str, Any]:
        python = peer_python(options.peer_venv, AUTO_ROUND)
        return peer(AUTO_ROUND, python, source, method, work)

    def own(recipe: str, text: str | None = None) -> Callable[[], dict[str, Any]]:
        return lambda: ours(source, recipe, work, options, text)

    return {
        peer_name(AUTO_ROUND, method): theirs,
        our_name(bits): own(our_name(bits)),
        f"best-int{bits}": own(f"best-int{bits}", options.text),
    }


def our_name(bits: int) -> str:
    """Our recipe, with the peer's number of steps whatever the preset's own is."""
    return f"signround-int{bits}-g64@steps={STEPS}"


def shared(text: str) -> int:
    """Documents of a corpus that have RUN words in a row in common with the held-out articles."""
    held = {run for document in corpora.load("wiki").documents for run in ngrams(document, RUN)}
    return sum(not held.isdisjoint(ngrams(one, RUN)) for one in corpora.load(text).documents)


def judge(rows: Runs, sha256: str, leaked: int) -> list[Criterion]:
    """Quality and speed at both widths, and the goals of the composed recipes."""
    criteria = []
    for bits, goal in GOALS.items():
        method = {"name": "signround", "bits": bits}
        theirs, own = rows.get(peer_name(AUTO_ROUND, method)), rows.get(our_name(bits))
        if theirs and own:
            mine, limit = own["kl_mean"]["value"], theirs["kl_mean"]["value"]
            name = f"int{bits}: KL to dense"
            criteria.append(Criterion(name, mine, f"<= {limit:.4f} (peer)", mine <= limit))
            share = own["seconds"] / theirs["seconds"]
            name = f"int{bits}: time over the peer's"
            criteria.append(Criterion(name, share, f"<= {LIMIT}", share <= LIMIT))
        if composed := rows.get(f"best-int{bits}"):
            value = composed["kl_mean"]["value"]
            name = f"best-int{bits}: KL to dense"
            criteria.append(Criterion(name, value, f"<= {goal}", value <= goal, goal=True))
            if own:  # whose format is the peer's; the peer's own file is dense
                value, limit = composed["bits_linear"], own["bits_linear"]
                name = f"best-int{bits}: bits a weight of the linears"
                criteria.append(Criterion(name, value, f"<= {limit:.4f}", value <= limit))
    same = all(
        row.get("tokens_sha256", sha256) == sha256
        for name, row in rows.items()
        if not name.startswith("best-")
    )
    criteria.append(Criterion("same tokens on both sides", same, "same hash", same))
    name = f"documents of --text with {RUN} words in a row of the held-out articles"
    criteria.append(Criterion(name, leaked, "0", leaked == 0))
    return criteria


if __name__ == "__main__":
    main()
