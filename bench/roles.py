"""Every layer-wise method on one model, same calibration and same held-out text: one table.

    python bench/roles.py [--model demo] [--only GLOB] [--out FILE.json]

Each recipe is compressed in a fresh process and judged against the dense model. Rows that a report
at --out holds already, made with the same settings, are kept, so a stopped run goes on.
"""

from __future__ import annotations

import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common import close
from table import (
    HEAD,
    Row,
    below,
    body,
    expected,
    introduction,
    markdown_table,
    opened,
    parser,
    run,
    settings_of,
    table,
)

from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.planted import plant
from rarefy.recipe import load_recipe, presets

KAPPA = 50.0
# The papers' spreads are for models of 7 billion weights and more; less of it suits a small one.
MILDER = ("alphapruning-sparsegpt-70@epsilon=0.1", "owl-sparsegpt-70@lam=0.04")
PLANTED = ("rtn-w8a8", "rtn-w8a8-static", "smoothquant-w8a8", "smoothquant-w8a8-static")
LESS = (
    ("sparsegpt-50", "wanda-50"),
    ("wanda-50", "magnitude-50"),
    ("svd-llm-80", "asvd-80"),
    ("asvd-80", "svd-80"),
    ("awq-int4-g64", "rtn-int4-g64"),
    ("awq-int3-g64", "rtn-int3-g64"),
    ("planted smoothquant-w8a8", "planted rtn-w8a8"),
    ("planted smoothquant-w8a8-static", "planted rtn-w8a8-static"),
    ("alphapruning-sparsegpt-70", "sparsegpt-70"),
    ("owl-sparsegpt-70", "sparsegpt-70"),
    *((name, "sparsegpt-70") for name in MILDER),
)


def main() -> None:
    """Run every recipe, print the table, judge the orders."""
    options = parser(__doc__.splitlines()[0], "roles").parse_args()
    source = resolve(options.model)
    report = opened("roles", settings_of(options), options.out, options.seed)
    with tempfile.TemporaryDirectory(prefix="rarefy-roles-", dir=options.work) as folder:
        work = Path(folder)
        for name in (*layerwise(), *MILDER):
            if fnmatch(name, options.only):
                run(report, Row(name, name), (source, work), options)
        wanted = [name for name in PLANTED if fnmatch(f"planted {name}", options.only)]
        if any(f"planted {name}" not in report["rows"] for name in wanted):
            plant(source, work / "planted", KAPPA)
        for name in wanted:
            run(report, Row(f"planted {name}", name), (work / "planted", work), options)
    table(report)
    if options.markdown:
        options.markdown.write_text(markdown(report))
    close(options.out, report, below(report["rows"], LESS))


def layerwise() -> list[str]:
    """The presets that learn nothing by gradient; bench/learning.py has the others."""
    return [
        name
        for name in presets()
        if all(stage.role != "tuner" for stage in load_recipe(name).stages)
    ]


def markdown(report: dict[str, Any]) -> str:
    """The table as docs/roles.md, with the orders that were expected."""
    lines = [
        *introduction(report, "Every layer-wise method on one model"),
        "The reference is the dense 16-bit model, for rows named `planted` the one with planted",
        "outliers.",
        "",
        *markdown_table(("recipe", *HEAD[1:]), body(report)),
        *expected(report["rows"], LESS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
