"""Plots as inline SVG, drawn so that the page's style sheet decides the colours.

Text stays text, colours become CSS variables (so one drawing serves light and dark), and the
XML prologue and name spaces, which hold addresses, are cut: HTML needs neither.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from rarefy.report.words import Report, number, recipe_name, size

if TYPE_CHECKING:
    from collections.abc import Sequence

# Stand-ins: colours that nothing else in a drawing has, each replaced by a CSS variable.
INK, MUTED, RULE, PAPER = "#010203", "#020304", "#030405", "#040506"
SERIES = ("#050607", "#060708", "#070809", "#08090a", "#090a0b")
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    colour: f"series-{at}" for at, colour in enumerate(SERIES, 1)
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rarefy",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
_PARTS = {
    "linear, compressed": SERIES[0],
    "linear, kept": SERIES[2],
    "embedding": SERIES[3],
    "head": SERIES[1],
    "other": SERIES[4],
}
_BLOCK = re.compile(r"\.(\d+)\.")
_WIDTH = 9.2


def layers(nodes: Sequence[dict[str, Any]]) -> Markup:
    """Draw error and bits per block, one narrow panel per kind of linear.

    Args:
        nodes: the manifest's; those outside the blocks are left out. Experts are averaged.

    Returns:
        An SVG element; empty when no node of a block has an error.
    """
    points = _points(nodes)
    if not points:
        return Markup()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 3.1))
        grid = figure.subplots(
            2, len(points), sharex=True, sharey="row", squeeze=False, height_ratios=[3, 1]
        )
        for (kind, rows), (top, bottom) in zip(points.items(), grid.T, strict=True):
            blocks = [block for block, _, _ in rows]
            top.plot(blocks, [error for _, error, _ in rows], color=SERIES[0], lw=1.4, marker=".")
            bottom.step(blocks, [bits for _, _, bits in rows], color=SERIES[1], lw=1.4, where="mid")
            top.set_title(kind)
            for axes in (top, bottom):
                axes.grid(axis="y")
        if all(error > 0 for rows in points.values() for _, error, _ in rows):
            grid[0, 0].set_yscale("log")
        grid[0, 0].yaxis.set_major_formatter(lambda value, _: number(value, 1))
        grid[0, 0].yaxis.set_minor_formatter(lambda value, _: "")
        grid[0, 0].set_ylabel("relative error")
        most = max(bits for rows in points.values() for _, _, bits in rows)
        grid[1, 0].set_ylim(0, 1.25 * most)
        grid[1, 0].set_yticks([0, most], ["0", number(most)])
        grid[1, 0].set_ylabel("bits")
        figure.supxlabel("block", fontsize=9, color=MUTED)
        figure.tight_layout(pad=0.4, w_pad=0.9)
        return svg_element(figure, "Relative output error and bits per weight, block by block")


def _points(nodes: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """Return kind -> (block, error, bits), each a mean weighted by the number of weights."""
    sums: dict[str, dict[int, list[float]]] = {}
    for node in nodes:
        block = _BLOCK.search(node["name"])
        if block is None or node.get("error") is None:
            continue
        blocks = sums.setdefault(module_kind(node["name"]), {})
        total = blocks.setdefault(int(block[1]), [0.0, 0.0, 0.0])
        for at, value in enumerate((1.0, node["error"], node["bits"])):
            total[at] += value * node["weights"]
    return {
        kind: [(block, e / n, b / n) for block, (n, e, b) in sorted(blocks.items())]
        for kind, blocks in sums.items()
    }


def module_kind(name: str) -> str:
    """Return what a linear does in its block: ``model.layers.3.self_attn.q_proj`` -> ``q_proj``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def kl_histogram(quality: dict[str, Any]) -> Markup:
    """Draw the distribution of KL over tokens on a log axis, with its percentiles."""
    histogram = quality["kl_histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    total = max(quality["predictions"], 1)
    seen = [at for at, count in enumerate(counts) if count]
    if not seen:
        return Markup()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5))
        axes = figure.subplots()
        axes.bar(
            edges[:-1],
            [100 * count / total for count in counts],
            width=[high - low for low, high in itertools.pairwise(edges)],
            align="edge",
            color=SERIES[0],
            edgecolor=PAPER,
            linewidth=1,
        )
        axes.set_xscale("log")
        axes.set_xlim(edges[seen[0]], edges[seen[-1] + 1])
        axes.set_ylim(top=axes.get_ylim()[1] * 1.28)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("KL(dense || compressed) at one token, nats")
        marks = {key: quality[f"kl_{key}"] for key in ("median", "p95", "p99")}
        marks["mean"] = quality["kl_mean"]["value"]
        for at, (name, value) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
            height = 0.98 - 0.1 * (at % 2)
            axes.axvline(value, ymax=height - 0.01, color=INK, lw=0.8)
            axes.annotate(
                f"{name} {number(value, 2)}", (value, height), (4, 0),
                xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                va="top", fontsize=8,
            )  # fmt: skip
        figure.tight_layout(pad=0.4)
        return svg_element(figure, "How KL is spread over tokens")


def sizes(bars: dict[str, dict[str, int]]) -> Markup:
    """Draw stored bytes by part, one stacked bar per model.

    Args:
        bars: model -> part -> bytes.
    """
    parts = sorted({part for bar in bars.values() for part in bar}, key=_part_order)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 0.75 + 0.42 * len(bars)))
        axes = figure.subplots()
        left = [0.0] * len(bars)
        for part in parts:
            widths = [bar.get(part, 0) / 1e6 for bar in bars.values()]
            axes.barh(
                range(len(bars)), widths, left=left, height=0.6,
                color=_PARTS.get(part, SERIES[4]),
                edgecolor=PAPER, linewidth=1, label=part,
            )  # fmt: skip
            left = [at + width for at, width in zip(left, widths, strict=True)]
        for row, (total, bar) in enumerate(zip(left, bars.values(), strict=True)):
            axes.annotate(
                size(sum(bar.values())), (total, row), (6, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), list(bars), color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, max(left) * 1.12)
        axes.xaxis.set_visible(False)
        axes.spines[["bottom", "left"]].set_visible(False)
        figure.legend(
            loc="lower left", ncols=len(parts), frameon=False, fontsize=8.5,
            handlelength=0.9, handleheight=0.9, borderaxespad=0, columnspacing=1.6,
        )  # fmt: skip
        figure.tight_layout(pad=0.4, rect=(0, 0.28 / figure.get_figheight(), 1, 1))
        return svg_element(figure, "Stored bytes by part")


def _part_order(part: str) -> tuple[int, str]:
    known = list(_PARTS)
    return (known.index(part) if part in known else len(known), part)


def scatter(reports: Sequence[Report]) -> Markup:
    """Draw KL against size on disk; lower and further left is better."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6))
        axes = figure.subplots()
        for report in reports:
            kl, megabytes = report["quality"]["kl_mean"], report["footprint"]["disk_bytes"] / 1e6
            if kl["low"] is not None:
                axes.plot([megabytes] * 2, [kl["low"], kl["high"]], color=SERIES[0], lw=1.4)
            axes.plot([megabytes], [kl["value"]], "o", ms=6, color=SERIES[0])
            axes.annotate(
                recipe_name(report), (megabytes, kl["value"]), (8, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        values = [report["quality"]["kl_mean"]["value"] for report in reports]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        else:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        axes.grid(visible=True)
        axes.set_ylabel("mean KL to dense, nats")
        axes.set_xlabel("weights on disk, MB")
        figure.tight_layout(pad=0.4)
        return svg_element(figure, "Quality against size")


def svg_element(figure: Figure, label: str) -> Markup:
    """Return the drawing as an SVG element for an HTML page."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    width, height = (math.ceil(inches * 72) for inches in figure.get_size_inches())
    text = re.sub(
        r"<svg [^>]*>",
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">',
        text,
        count=1,
    )
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)  # noqa: S704 - matplotlib escapes every text it draws
