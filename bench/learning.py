"""Every method that learns by gradient beside what it improves on: one table.

    python bench/learning.py [--model demo] [--only GLOB] [--out FILE.json]

Each recipe is compressed in a fresh process and judged against the dense model. Rows that a report
at --out holds already, made with the same settings, are kept, so a stopped run goes on.
"""

from __future__ import annotations

import tempfile
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from common import Criterion, close
from table import (
    HEAD,
    Row,
    below,
    body,
    discard,
    expected,
    introduction,
    markdown_table,
    opened,
    parser,
    run,
    save,
    settings_of,
    table,
)

from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.engine.skeleton import Skeleton
from rarefy.recipe import presets

LIMIT, SHARE = 20 * 60, 0.7
# Block tuners overfit a handful of rows; what they are compared with gets the same rows.
BLOCKS = 64
BLOCKWISE = (
    "rtn-int3-g64", "gptq-int3-g64", "signround-int3-g64", "omniquant-int3-g64",
    "rtn-int4-g64@bits=2", "gptq-int3-g64@bits=2", "signround-int2-g64", "omniquant-int2-g64",
    "gptq-int3-norm-tweaking", "gptq-int3-scales",
)  # fmt: skip
OTHERS = (
    "wanda-50", "wanda-50-recover", "wanda-50-recover-ce",
    "llm-pruner-20", "llm-pruner-20-recover", "llm-pruner-20-recover-ce",
    "shortgpt-6", "shortgpt-6-recover", "svd-llm-80", "svd-llm-80-recover",
    "wanda-2of4", "wanda-2of4-recover-gptq-int4-g64",
    "truncate-10", "distil-10", "distil-10-ce", "llm-qat-w4a8kv8",
)  # fmt: skip
MASKED = ("wanda-2of4", "wanda-2of4-recover-gptq-int4-g64")
LESS = (
    ("signround-int3-g64", "gptq-int3-g64"),
    ("gptq-int3-g64", "rtn-int3-g64"),
    ("omniquant-int3-g64", "rtn-int3-g64"),
    ("signround-int2-g64", "gptq-int3-g64@bits=2"),
    ("gptq-int3-g64@bits=2", "rtn-int4-g64@bits=2"),
    ("omniquant-int2-g64", "rtn-int4-g64@bits=2"),
    ("wanda-50-recover", "wanda-50-recover-ce"),
    ("llm-pruner-20-recover", "llm-pruner-20-recover-ce"),
    ("distil-10", "distil-10-ce"),
)
RECOVERED = (("wanda-50-recover", "wanda-50"), ("llm-pruner-20-recover", "llm-pruner-20"))


def main() -> None:
    """Run every recipe, print the table, judge."""
    options = parser(__doc__.splitlines()[0], "learning").parse_args()
    source = resolve(options.model)
    report = opened("learning", settings_of(options), options.out, options.seed)
    known = presets()
    rows = [*(Row(name, name, BLOCKS) for name in BLOCKWISE), *(Row(n, n) for n in OTHERS)]
    with tempfile.TemporaryDirectory(prefix="rarefy-learning-", dir=options.work) as folder:
        for row in rows:
            if row.recipe.partition("@")[0] not in known:
                print(f"{row.name}: there is no such recipe, left out")
            elif fnmatch(row.name, options.only):
                made = run(report, row, (source, Path(folder)), options)
                if made is not None and row.name in MASKED:
                    report["rows"][row.name]["supports"] = supports(made)
                    save(report, options.out)
                discard(made)
    table(report)
    if options.markdown:
        options.markdown.write_text(markdown(report))
    close(options.out, report, judge(report["rows"]))


def supports(folder: Path) -> dict[str, str]:
    """A hash of the stored support of every compressed matrix."""
    opened_folder = Skeleton(Checkpoint(folder), torch.device("cpu"))
    masks = {name: opened_folder.support(name) for name in sorted(opened_folder.earlier)}
    return {
        name: blake2b(mask.numpy(), digest_size=16).hexdigest()
        for name, mask in masks.items()
        if mask is not None
    }


def judge(rows: dict[str, Any]) -> list[Criterion]:
    """Orders, recovered damage, masks and times."""
    criteria = below(rows, LESS)
    for after, before in RECOVERED:
        if after in rows and before in rows:
            share = rows[after]["kl"]["value"] / rows[before]["kl"]["value"]
            name = f"KL of {after} over {before}"
            criteria.append(Criterion(name, share, f"<= {SHARE}", share <= SHARE))
    if all(name in rows for name in MASKED):
        first, last = (rows[name].get("supports") for name in MASKED)
        same = bool(first) and first == last
        name = f"masks of {MASKED[1]} are those of {MASKED[0]}"
        criteria.append(Criterion(name, same, "bit for bit", same))
    for name, row in rows.items():
        taken = row["seconds"]
        criteria.append(Criterion(f"seconds of {name}", taken, f"<= {LIMIT}", taken <= LIMIT))
    return criteria


def markdown(report: dict[str, Any]) -> str:
    """The table as docs/learning.md, with the orders that were expected."""
    rows = report["rows"]
    lines = [
        *introduction(report, "Methods that learn, and what they improve on"),
        f"Rows of 2 and 3 bits are calibrated on {BLOCKS} x {report['settings']['length']} tokens.",
        "The reference is the dense 16-bit model. Recipes whose name ends in `-ce` are controls:",
        "trained on the same tokens by cross-entropy alone.",
        "",
        *markdown_table(("recipe", *HEAD[1:]), body(report)),
        *expected(rows, LESS),
        "",
        *(
            f"- {one.name}: {one.value:.4g}" if isinstance(one.value, float)
            else f"- {one.name}: {'yes' if one.value else 'no'}"
            for one in judge(rows)
            if one.name.startswith(("masks", "KL of")) and "below" not in one.name
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
