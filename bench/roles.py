"""Every layer-wise method on one model, same calibration and same held-out text: one table.

    python bench/roles.py [--model demo] [--only GLOB] [--out FILE.json]

Each recipe is compressed in a fresh process and judged against the dense model. Rows that a report
at --out holds already, made with the same settings, are kept, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common import OUT, Criterion, close, compress_in_child, machine, show

import rarefy
from rarefy.checkpoint.resolve import resolve
from rarefy.evaluate.planted import plant
from rarefy.recipe import presets

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
    options = parse()
    source = resolve(options.model)
    settings = {
        "model": options.model, "text": options.calibration, "sequences": options.sequences,
        "length": options.length, "seed": options.seed, "windows": list(options.windows),
    }  # fmt: skip
    report: dict[str, Any] = {"bench": "roles", "settings": settings, "rows": {}}
    if options.out.is_file():
        found = json.loads(options.out.read_text())
        report["rows"] = found["rows"] if found["settings"] == settings else {}
    report["machine"] = machine(options.seed)
    with tempfile.TemporaryDirectory(prefix="rarefy-roles-", dir=options.work) as folder:
        work = Path(folder)
        for name in (*presets(), *MILDER):
            if fnmatch(name, options.only):
                run(report, name, name, (source, work), options)
        wanted = [name for name in PLANTED if fnmatch(f"planted {name}", options.only)]
        if any(f"planted {name}" not in report["rows"] for name in wanted):
            plant(source, work / "planted", KAPPA)
        for name in wanted:
            run(report, f"planted {name}", name, (work / "planted", work), options)
    table(report)
    if options.markdown:
        options.markdown.write_text(markdown(report))
    close(options.out, report, judge(report["rows"]))


def parse() -> argparse.Namespace:
    """Options; the defaults are the published setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="web", help="corpus name or file")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 512), metavar=("N", "L"))
    parser.add_argument("--only", default="*", help="glob over the rows' names")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--work", type=Path, help="folder for the results (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "roles.json")
    return parser.parse_args()


def run(
    report: dict[str, Any],
    row: str,
    recipe: str,
    place: tuple[Path, Path],
    options: argparse.Namespace,
) -> None:
    """Compress and judge one recipe, unless the report holds it."""
    if row in report["rows"]:
        return
    source, work = place
    out = work / row.replace(" ", "-")
    job = {
        "model": str(source), "recipe": recipe, "out": str(out), "text": options.calibration,
        "sequences": options.sequences, "length": options.length, "seed": options.seed,
    }  # fmt: skip
    done = compress_in_child(job, work)
    print(f"{row}: {done['seconds']:.0f} s", flush=True)
    windows = options.windows
    judged = rarefy.evaluate(
        out, source, text="wiki", sequences=windows[0], length=windows[1], speed=False
    ).report()
    quality, size = judged["quality"], judged["footprint"]
    report["rows"][row] = {
        "kl": quality["kl_mean"],
        "perplexity": quality["perplexity"]["value"],
        "perplexity_dense": quality["perplexity_dense"]["value"],
        "agreement": quality["agreement"]["value"],
        "bytes": size["payload_bytes"],
        "parameters": size["parameters"],
        "bits_linear": size["bits_linear"],
        "bits_model": size["bits_model"],
        "bytes_dense": judged["footprint_dense"]["payload_bytes"],
        "seconds": done["seconds"],
        "peak_bytes": done["peak_bytes"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


HEAD = ("", "KL to dense", "ppl", "top-1", "MB", "bits, linears", "s", "peak GB")


def body(report: dict[str, Any]) -> list[tuple[object, ...]]:
    """The rows, best first, the dense model above them."""
    rows = report["rows"]
    if not rows:
        sys.exit("no recipe matches --only, and the report holds no row")
    dense = next(row for name, row in rows.items() if not name.startswith("planted"))
    return [
        ("dense", 0.0, dense["perplexity_dense"], 1.0, dense["bytes_dense"] / 1e6, 16.0, "", ""),
        *(
            (name, row["kl"]["value"], row["perplexity"], row["agreement"], row["bytes"] / 1e6,
             row["bits_linear"], row["seconds"], row["peak_bytes"] / 1e9)
            for name, row in sorted(rows.items(), key=lambda item: item[1]["kl"]["value"])
        ),
    ]  # fmt: skip


def table(report: dict[str, Any]) -> None:
    """Print the table."""
    show("the reference is the dense 16-bit model", HEAD, body(report))


def markdown(report: dict[str, Any]) -> str:
    """The table as docs/roles.md, with the orders that were expected."""
    settings, rows = report["settings"], report["rows"]
    windows = " x ".join(map(str, settings["windows"]))
    lines = [
        "# Every layer-wise method on one model",
        "",
        "Written by `python bench/roles.py --markdown docs/roles.md`; see docs/benchmarks.md.",
        f"Model `{settings['model']}`, {settings['sequences']} x {settings['length']} calibration",
        f"tokens of `{settings['text']}`, judged on {windows} held-out tokens of `wiki`.",
        "The reference is the dense 16-bit model, for rows named `planted` the one with planted",
        "outliers.",
        "",
        "| " + " | ".join(("recipe", *HEAD[1:])) + " |",
        "|:--|" + "--:|" * (len(HEAD) - 1),
    ]
    for row in body(report):
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| Expected | KL | | Holds |", "|:--|--:|--:|:--|"]
    for better, worse in LESS:
        if better in rows and worse in rows:
            pair = [rows[name]["kl"]["value"] for name in (better, worse)]
            holds = "yes" if pair[0] < pair[1] else "no"
            figures = " | ".join(f"{value:.4f}" for value in pair)
            lines.append(f"| `{better}` below `{worse}` | {figures} | {holds} |")
    return "\n".join(lines) + "\n"


def judge(rows: dict[str, Any]) -> list[Criterion]:
    """The orders that the papers let one expect."""
    criteria = []
    for better, worse in LESS:
        if better in rows and worse in rows:
            value, limit = rows[better]["kl"]["value"], rows[worse]["kl"]["value"]
            name = f"KL of {better} below {worse}"
            criteria.append(Criterion(name, value, f"< {limit:.4f}", value < limit))
    return criteria


if __name__ == "__main__":
    main()
