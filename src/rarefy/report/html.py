"""One self-contained HTML page per result, or for several side by side.

The page makes no request: style sheet and drawings are inside it. Everything that comes from a
report is escaped by the template engine.
"""

from __future__ import annotations

import shlex
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from rarefy.report import compare, plots, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.report.words import Report

_ABSENT: dict[str, Any] = {
    "recipe": None, "recipe_name": "", "calibration": None, "seed": None, "seconds": None,
    "peak_memory_bytes": None, "nodes": [], "kept": [], "fallbacks": [],
}  # fmt: skip
"""What stands for the fields of the manifest in a folder that has none."""


def render_html(report: Report) -> str:
    """Return the page of one result.

    Args:
        report: content of report.json, that is, ``Evaluation.report()``.
    """
    manifest = _ABSENT | report["manifest"]
    nodes = manifest["nodes"]
    bars = {
        "dense": report["footprint_dense"]["breakdown"],
        "this": report["footprint"]["breakdown"],
    }
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            manifest=manifest,
            title=report["name"],
            headline=words.headline(report),
            beside=_beside(report),
            formats=_formats(nodes),
            command=command(report),
            recipe=yaml.safe_dump(manifest["recipe"], sort_keys=False)
            if manifest["recipe"]
            else "",
            layers=plots.layers(nodes),
            histogram=plots.kl_histogram(report["quality"]),
            sizes=plots.sizes(bars),
        )
    )


def render_comparison_html(reports: Sequence[Report]) -> str:
    """Return one page for several results, the lowest KL first.

    Args:
        reports: contents of report.json files, at least one.
    """
    ordered = sorted(reports, key=lambda report: report["quality"]["kl_mean"]["value"])
    reference = compare.reference_row(reports)
    bars = {"dense": ordered[0]["footprint_dense"]["breakdown"]} if reference else {}
    bars |= {words.recipe_name(report): report["footprint"]["breakdown"] for report in ordered}
    return (
        page_environment()
        .get_template("comparison.html.j2")
        .render(
            title="Compression results",
            reports=ordered,
            columns=compare.COLUMNS,
            rows=[row.cells() for row in compare.comparison_rows(reports)],
            reference=reference.cells() if reference else None,
            caption=compare.caption(reports),
            scatter=plots.scatter(ordered),
            sizes=plots.sizes(bars),
        )
    )


def command(report: Report) -> str:
    """Return shell lines that make and measure the model again."""
    manifest, protocol = report["manifest"], report["protocol"]
    lines = []
    if manifest.get("recipe"):
        source = manifest.get("source", {}).get("ref") or protocol["against"]
        make = ["rarefy", "compress", source, "recipe.yaml", "--out", report["name"]]
        lines.append(manifest.get("command") or shlex.join(make))
    measure = ["rarefy", "evaluate", report["name"], "--against", protocol["against"]]
    measure += ["--text", protocol["text"]]
    measure += ["--sequences", str(protocol["windows"]), "--length", str(protocol["length"])]
    return "\n".join([*lines, shlex.join(measure)])


def page_environment() -> Environment:
    """The environment of all pages: everything is escaped, nothing undefined is passed over."""
    environment = Environment(
        loader=PackageLoader("rarefy", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (
        words.number, words.percent, words.size, words.seconds,
        words.times, words.interval, words.estimate, words.recipe_name, words.headline,
    ):  # fmt: skip
        environment.filters[write.__name__] = write
    return environment


def _beside(report: Report) -> list[tuple[str, str, str, str]]:
    """Return (what, dense, this, change) for every number that both models have."""
    quality, small, dense = report["quality"], report["footprint"], report["footprint_dense"]
    rows = [
        (
            "Perplexity",
            words.estimate(quality["perplexity_dense"]),
            words.estimate(quality["perplexity"]),
            _ratio(quality["perplexity"]["value"], quality["perplexity_dense"]["value"]),
        ),
        _sizes_row("Weights on disk", dense["disk_bytes"], small["disk_bytes"]),
        _row("Bits per weight, whole model", dense["bits_model"], small["bits_model"]),
        _row("Bits per weight, linears", dense["bits_linear"], small["bits_linear"]),
        _row("Parameters", dense["parameters"], small["parameters"]),
    ]
    fast, slow = report["speed"], report["speed_dense"]
    if fast and slow:
        rows += [
            _sizes_row("Peak memory, loading included", slow["peak_bytes"], fast["peak_bytes"]),
            _runs_row("Time to first token, s", slow["ttft_runs"], fast["ttft_runs"]),
            _runs_row("Decode, tokens/s", slow["decode_runs"], fast["decode_runs"]),
            _row("Prefill, tokens/s", slow["prefill_tok_s"], fast["prefill_tok_s"]),
            _row("Load, s", slow["load_s"], fast["load_s"]),
        ]
    return rows


def _row(what: str, dense: float | None, this: float | None) -> tuple[str, str, str, str]:
    return what, words.number(dense), words.number(this), _ratio(this, dense)


def _sizes_row(what: str, dense: int, this: int) -> tuple[str, str, str, str]:
    return what, words.size(dense), words.size(this), _ratio(this, dense)


def _runs_row(what: str, dense: list[float], this: list[float]) -> tuple[str, str, str, str]:
    """Compare medians of runs; where the runs overlap, their ratio may be the machine's noise."""

    def spread(runs: list[float]) -> str:
        low, middle, high = (words.number(x) for x in (min(runs), median(runs), max(runs)))
        return f"{middle} ({low} to {high})"

    overlap = min(this) <= max(dense) and min(dense) <= max(this)
    change = "unclear" if overlap else _ratio(median(this), median(dense))
    return what, spread(dense), spread(this), change


def _ratio(this: float | None, dense: float | None) -> str:
    return f"{words.number(this / dense)}x" if dense and this is not None else words.NONE


def _formats(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the nodes by kind of linear, format and solver."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for node in nodes:
        key = plots.module_kind(node["name"]), node["format"], node["solver"]
        groups.setdefault(key, []).append(node)
    rows = []
    for (kind, format_, solver), group in groups.items():
        errors = [node["error"] for node in group if node.get("error") is not None]
        weights = sum(node["weights"] for node in group)
        rows.append(
            {
                "kind": kind,
                "format": format_,
                "solver": solver or "nearest",
                "count": len(group),
                "weights": weights,
                "bits": 8 * sum(node["bytes"] for node in group) / max(weights, 1),
                "mean_error": sum(errors) / len(errors) if errors else None,
                "worst_error": max(errors) if errors else None,
            }
        )
    return rows
