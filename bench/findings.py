"""Which published findings about compressed models hold on this one? A table with intervals.

    python bench/findings.py [--model demo] [--items 80] [--out DIR] [--markdown FILE]

Runs `rarefy kick` over magnitude, Wanda and SparseGPT from 10 to 60 %, N:M patterns and integers of
8 to 3 bits, on questions that leave the model room to fall, and judges four statements of LLM-KICK
(Jaiswal et al., ICLR 2024) from the records. A stopped run goes on. Differences are of accuracy
over the same items, with 95 % intervals over clusters of items.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import OUT, close, machine, show

from rarefy.checkpoint.writer import write_atomic
from rarefy.engine.compress import Calibration
from rarefy.evaluate.bootstrap import cluster_bootstrap, cluster_sums
from rarefy.evaluate.records import read_records
from rarefy.kick.profiles import Profile
from rarefy.kick.run import Options, kick

if TYPE_CHECKING:
    from rarefy.evaluate.bootstrap import Estimate
    from rarefy.evaluate.records import Record

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PRUNERS = ("magnitude-50", "wanda-50", "sparsegpt-50")
PATTERNS = ("wanda-2of4@kept=1,of=2", "wanda-2of4", "wanda-2of4@kept=4,of=8", "sparsegpt-2of4")
INTEGERS = ("rtn-int4-g64@bits=8", "rtn-int4-g64", "gptq-int4-g64", "gptq-int3-g64")
KNOWLEDGE = ("rarefy_factoid_rank", "rarefy_common_knowledge", "rarefy_arc_easy", "rarefy_sciq")
CLOSED, OPEN = "rarefy_sciq", "rarefy_sciq_open"
MATCHING = 0.95  # of the dense score, LLM-KICK's tolerance

Scores = dict[tuple[str, str], "Record"]


def at(pruner: str, level: float) -> str:
    """The recipe of a pruner at a sparsity."""
    return f"{pruner}@sparsity={level}"


def main() -> None:
    """Run the jobs, judge the statements, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--items", type=int, default=80, help="of each task, at most")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT / "findings")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    recipes = (*(at(p, level) for p in PRUNERS for level in LEVELS), *PATTERNS, *INTEGERS)
    profile = Profile(
        "findings", recipes, "full", Calibration(sequences=8, length=512), windows=4, speed=0,
        limit=options.items,
    )  # fmt: skip
    board = kick(
        options.model, None, options.out, profile=profile,
        options=Options(tasks=",".join((*KNOWLEDGE, OPEN)), jobs=options.jobs),
        tell=lambda recipe, step, done, total: (
            print(f"{recipe}: {step}", flush=True) if done == total else None
        ),
    )  # fmt: skip
    entries = {entry["recipe"]: entry for entry in board.content["entries"]}
    scores = {name: read(board.path / name) for name in ("dense", *entries)}
    rows = [*first_breaks(entries), *patterns(entries, scores), *quantization(entries, scores)]
    rows += open_book(entries, scores)
    head = ("statement", "case", "figures", "holds")
    show("Published findings", head, rows)
    if options.markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * 4, *rows)]
        write_atomic(options.markdown, (preface(board.content) + "\n".join(lines) + "\n").encode())
    close(options.out / "findings.json", {"machine": machine(0), "rows": rows}, [])


def read(folder: Path) -> Scores:
    """Records by task and item."""
    return {(r.task, r.item): r for r in read_records(folder / "records.jsonl")}


def difference(a: Scores, b: Scores, tasks: tuple[str, ...]) -> Estimate:
    """Mean score of a minus that of b over the same items of some tasks."""
    keys = [key for key in a if key[0] in tasks]
    values = np.array([[1.0, a[key].score - b[key].score] for key in keys])
    clusters = sorted({(a[key].task, a[key].cluster) for key in keys})
    index = {cluster: number for number, cluster in enumerate(clusters)}
    sums = cluster_sums(values, [index[a[key].task, a[key].cluster] for key in keys])
    return cluster_bootstrap(sums, lambda s: s[:, 1] / s[:, 0])


def first_breaks(entries: dict[str, Any]) -> list[tuple[str, ...]]:
    """Knowledge breaks before perplexity shows it."""
    rows = []
    for pruner in PRUNERS:
        shares, ratios = [], []
        for level in LEVELS:
            entry = entries[at(pruner, level)]
            tasks = [entry["tasks"][name] for name in KNOWLEDGE]
            parts = ([task[which]["value"] for task in tasks] for which in ("score", "dense"))
            shares.append(sum(next(parts)) / sum(next(parts)))
            ratios.append(1 / entry["quality"]["perplexity_ratio"]["value"])
        knowledge, perplexity = matching(shares), matching(ratios)
        figures = f"knowledge matches to {knowledge:.0%}, perplexity to {perplexity:.0%}"
        holds = "yes" if knowledge < perplexity else "no"
        rows.append(("knowledge breaks before perplexity shows it", pruner[:-3], figures, holds))
    return rows


def matching(kept: list[float]) -> float:
    """The last level up to which everything matches; 0 if the first does not."""
    below = [level for level, share in zip(LEVELS, kept, strict=True) if share < MATCHING]
    good = [0.0, *(level for level in LEVELS if not below or level < below[0])]
    return good[-1]


def patterns(entries: dict[str, Any], scores: dict[str, Scores]) -> list[tuple[str, ...]]:
    """N:M is worse than unstructured at the same ratio."""
    rows = []
    for name in PATTERNS:
        free = at("sparsegpt-50" if name.startswith("sparse") else "wanda-50", 0.5)
        rows.append(verdict("N:M is worse than unstructured", name, free, entries, scores, -1))
    return rows


def quantization(entries: dict[str, Any], scores: dict[str, Scores]) -> list[tuple[str, ...]]:
    """Quantization is kinder than pruning at no more bytes."""
    pairs = [
        (kind, at(pruner, level))
        for kind, level in (("rtn-int4-g64@bits=8", 0.5), ("gptq-int4-g64", 0.6))
        for pruner in PRUNERS[1:]
    ]
    return [verdict("quantization is kinder at no more bytes", a, b, entries, scores, 1)
            for a, b in pairs]  # fmt: skip


def verdict(
    statement: str, a: str, b: str, entries: dict[str, Any], scores: dict[str, Scores], sign: int
) -> tuple[str, ...]:
    """Whether a is better (sign 1) or worse (-1) than b in knowledge; "open" if it may be 0."""
    gap = difference(scores[a], scores[b], KNOWLEDGE)
    kl = [entries[name]["quality"]["kl_mean"]["value"] for name in (a, b)]
    bits = [entries[name]["level"]["bits"] for name in (a, b)]
    figures = f"{points(gap)} points; KL {kl[0]:.3g} and {kl[1]:.3g}; "
    figures += f"bits {bits[0]:.3g} and {bits[1]:.3g}"
    return statement, f"{a} against {b}", figures, judged(gap, sign)


def open_book(entries: dict[str, Any], scores: dict[str, Scores]) -> list[tuple[str, ...]]:
    """Open-book answers outlive closed-book ones: less of the room above chance is lost."""
    rows = []
    dense = scores["dense"]
    names = [at(pruner, level) for pruner in PRUNERS for level in (0.4, 0.5, 0.6)]
    for name in names:
        kept = []
        for task in (CLOSED, OPEN):
            damage = entries[name]["tasks"][task]
            kept.append((damage["score"]["value"] - damage["chance"]) / damage["headroom"])
        keys = [item for task, item in dense if task == CLOSED]
        room = [entries[name]["tasks"][task]["headroom"] for task in (CLOSED, OPEN)]
        losses = [
            [1.0, *((dense[task, i].score - scores[name][task, i].score) / h
                    for task, h in zip((CLOSED, OPEN), room, strict=True))]
            for i in keys
        ]  # fmt: skip
        gap = cluster_bootstrap(np.array(losses), lambda s: (s[:, 1] - s[:, 2]) / s[:, 0])
        figures = f"closed keeps {kept[0]:.2f}, open {kept[1]:.2f} of the room above chance"
        figures += f"; {points(gap)} points apart"
        rows.append(("open book outlives closed book", name, figures, judged(gap, 1)))
    return rows


def points(gap: Estimate) -> str:
    """An estimate in points of a hundred, with its interval."""
    assert gap.low is not None and gap.high is not None
    return f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def judged(gap: Estimate, sign: int) -> str:
    """ "yes" or "no" where the interval leaves out 0, else "open"."""
    assert gap.low is not None and gap.high is not None
    if gap.low <= 0 <= gap.high:
        return "open"
    return "yes" if sign * gap.value > 0 else "no"


def preface(board: dict[str, Any]) -> str:
    """What the table is about."""
    tasks = ", ".join(f"{task['title']} ({task['items']})" for task in board["tasks"])
    return (
        "# Published findings on the default model\n\n"
        "Made by `bench/findings.py`. "
        f"{board['reference']} Items: {tasks}. Calibration: 8 x 512 tokens. A model matches while "
        "it keeps 95 % of the dense score (the four closed-book tasks together, or perplexity). "
        '"open" means that the 95 % interval, over clusters of items, includes 0.\n\n'
    )


if __name__ == "__main__":
    main()
