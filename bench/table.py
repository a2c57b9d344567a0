"""What the tables of recipes share: rows in fresh processes, kept in a report that a later run
goes on with, printed and written as Markdown.

A report holds ``settings`` and ``rows``. Rows made with other settings are not kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import OUT, Criterion, compress_in_child, machine, show

import rarefy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Order = tuple[str, str]

HEAD = ("", "KL to dense", "ppl", "top-1", "MB", "bits, linears", "s", "peak GB")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of the row.
        recipe: what is run.
        sequences: calibration rows; None for the table's own number.
    """

    name: str
    recipe: str
    sequences: int | None = None


def parser(description: str, bench: str) -> argparse.ArgumentParser:
    """Options; the defaults are the published setting."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", default="demo")
    found.add_argument("--calibration", default="web", help="corpus name or file")
    found.add_argument("--sequences", type=int, default=16)
    found.add_argument("--length", type=int, default=512)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--windows", type=int, nargs=2, default=(8, 512), metavar=("N", "L"))
    found.add_argument("--only", default="*", help="glob over the rows' names")
    found.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    found.add_argument("--work", type=Path, help="folder for the results (default: temporary)")
    found.add_argument("--out", type=Path, default=OUT / f"{bench}.json")
    return found


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What rows must have been made with to be kept."""
    return {
        "model": options.model, "text": options.calibration, "sequences": options.sequences,
        "length": options.length, "seed": options.seed, "windows": list(options.windows),
    }  # fmt: skip


def opened(bench: str, settings: dict[str, Any], out: Path, seed: int) -> dict[str, Any]:
    """A report with the rows that an earlier run left at ``out``, if its settings were the same."""
    report: dict[str, Any] = {"bench": bench, "settings": settings, "rows": {}}
    if out.is_file():
        found = json.loads(out.read_text())
        report["rows"] = found["rows"] if found["settings"] == settings else {}
    report["machine"] = machine(seed)
    return report


def save(report: dict[str, Any], out: Path) -> None:
    """Write the report as far as it has come."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def run(
    report: dict[str, Any], row: Row, place: tuple[Path, Path], options: argparse.Namespace
) -> Path | None:
    """Compress and judge one recipe; return the new folder, or None if the report held the row.

    Args:
        report: receives the row.
        row: what to run.
        place: the dense model, and the folder for results.
        options: see :func:`parser`.
    """
    sequences = row.sequences or options.sequences
    held = report["rows"].get(row.name)
    if held and held.get("sequences", options.sequences) == sequences:
        return None
    source, work = place
    out = work / row.name.replace(" ", "-")
    job = {
        "model": str(source), "recipe": row.recipe, "out": str(out), "text": options.calibration,
        "sequences": sequences, "length": options.length, "seed": options.seed,
    }  # fmt: skip
    done = compress_in_child(job, work)
    print(f"{row.name}: {done['seconds']:.0f} s", flush=True)
    windows = options.windows
    judged = rarefy.evaluate(
        out, source, text="wiki", sequences=windows[0], length=windows[1], speed=False
    ).report()
    report["rows"][row.name] = summary(judged) | {
        "sequences": sequences,
        "seconds": done["seconds"],
        "peak_bytes": done["peak_bytes"],
    }
    save(report, options.out)
    return out


def summary(judged: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of an evaluation."""
    quality, size = judged["quality"], judged["footprint"]
    return {
        "kl": quality["kl_mean"],
        "perplexity": quality["perplexity"]["value"],
        "perplexity_dense": quality["perplexity_dense"]["value"],
        "agreement": quality["agreement"]["value"],
        "bytes": size["payload_bytes"],
        "parameters": size["parameters"],
        "bits_linear": size["bits_linear"],
        "bits_model": size["bits_model"],
        "bytes_dense": judged["footprint_dense"]["payload_bytes"],
    }


def discard(folder: Path | None) -> None:
    """Remove a judged result: a table's results together would fill a small disk."""
    if folder is not None:
        shutil.rmtree(folder)


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


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table, its first column flush left."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|:--|" + "--:|" * (len(names) - 1)]
    for row in rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def expected(rows: dict[str, Any], orders: Sequence[Order]) -> list[str]:
    """The orders (better row, worse row) and whether they hold, as lines of Markdown."""
    lines = ["", "| Expected | KL | | Holds |", "|:--|--:|--:|:--|"]
    for better, worse in orders:
        if better in rows and worse in rows:
            pair = [rows[name]["kl"]["value"] for name in (better, worse)]
            holds = "yes" if pair[0] < pair[1] else "no"
            figures = " | ".join(f"{value:.4f}" for value in pair)
            lines.append(f"| `{better}` below `{worse}` | {figures} | {holds} |")
    return lines


def below(rows: dict[str, Any], orders: Sequence[Order]) -> list[Criterion]:
    """The orders (better row, worse row) as criteria, where both rows are there."""
    criteria = []
    for better, worse in orders:
        if better in rows and worse in rows:
            value, limit = rows[better]["kl"]["value"], rows[worse]["kl"]["value"]
            name = f"KL of {better} below {worse}"
            criteria.append(Criterion(name, value, f"< {limit:.4f}", value < limit))
    return criteria


def introduction(report: dict[str, Any], title: str) -> list[str]:
    """The head of a Markdown page: its command, the data, the reference."""
    settings, bench = report["settings"], report["bench"]
    windows = " x ".join(map(str, settings["windows"]))
    return [
        f"# {title}",
        "",
        f"Written by `python bench/{bench}.py --markdown docs/{bench}.md`; see docs/benchmarks.md.",
        f"Model `{settings['model']}`, {settings['sequences']} x {settings['length']} calibration",
        f"tokens of `{settings['text']}`, judged on {windows} held-out tokens of `wiki`.",
    ]
