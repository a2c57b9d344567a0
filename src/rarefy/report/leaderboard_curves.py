"""Perplexity and knowledge over the level of compression: one line per method."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from rarefy.report.leaderboard_plots import LINES, WIDTH, finish, known, rule, scale, tip
from rarefy.report.leaderboard_rows import holds_facts
from rarefy.report.plots import MUTED, STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from rarefy.report.leaderboard_rows import Row

_ROLES = {"sparsity": "pruning", "bits": "quantization"}
_PANELS, _COLUMNS = 8, 4
_PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class _Point:
    """A recipe in a panel, with its interval; anchor: of its row."""

    level: float
    value: float
    low: float
    high: float
    anchor: str


def curves(
    rows: Sequence[Row], dense: Row, tasks: Sequence[Mapping[str, Any]], level: str
) -> Markup:
    """Draw perplexity and tasks over the level of compression, small panels side by side.

    Args:
        rows: recipes. dense: where every line begins. tasks: of the board.
        level: "sparsity", of pruning recipes, or "bits", of quantizing ones.

    Returns:
        An SVG element; empty when no method has two levels.
    """
    lines, alone = _lines(rows, level)
    if not lines:
        return Markup()
    panels = [_PERPLEXITY, *_panels(rows, tasks)]
    titles = {task["name"]: task["title"] for task in tasks}
    label = f"Perplexity and knowledge over {level}"
    with mpl.rc_context(STYLE | {"svg.hashsalt": label}):
        columns = min(_COLUMNS, len(panels))
        height = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(WIDTH, 0.8 + 2.3 * height), dpi=72)
        grid = list(figure.subplots(height, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            axes.set_title(textwrap.shorten(titles.get(panel, panel), 38, placeholder="…"))
            _draw(axes, lines, alone, (dense, level, panel))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        _legend(figure, list(lines))
        figure.supxlabel(
            "bits per weight" if level == "bits" else "share of weights that are zero",
            fontsize=9,
            color=MUTED,
        )
        figure.tight_layout(pad=0.4, w_pad=1.2, h_pad=1.2, rect=(0, 0.01, 1, 0.94))
        return finish(figure, label, {row.anchor: tip(row) for row in rows})


def _lines(rows: Sequence[Row], level: str) -> tuple[dict[str, list[Row]], list[Row]]:
    """Return the line of each method that has two levels, and the recipes off the lines.

    Of several at one level (2:4 beside unstructured), the one closest to the dense model is on
    the line.
    """
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        value = row.level(level)
        if row.entry.get("role") == _ROLES[level] and known(value):
            group = groups.setdefault(" + ".join(row.entry["methods"]), {})
            group.setdefault(round(value, 2), []).append(row)
    lines, alone = {}, []
    for name, group in sorted(groups.items()):
        ordered = [sorted(group[at], key=lambda row: row.quality("kl_mean") or 0) for at in group]
        if len(group) > 1:
            lines[name] = [same.pop(0) for same in ordered]
        alone += [row for same in ordered for row in same]
    return lines, alone


def _panels(rows: Sequence[Row], tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Choose the tasks to draw: those that ask for facts, each before its open-book partner."""
    able = {
        name
        for row in rows
        for name, damage in (row.entry.get("tasks") or {}).items()
        if damage["sensitive"] and damage["relative"] is not None
    }
    ordered = sorted(tasks, key=lambda task: not holds_facts(task))
    names = [
        name
        for task in ordered
        if task["kind"] != "bits"
        for name in (task["name"], task.get("partner"))
    ]
    return [name for name in dict.fromkeys(names) if name and name in able][: _PANELS - 1]


def _draw(
    axes: Axes,
    lines: Mapping[str, Sequence[Row]],
    alone: Sequence[Row],
    what: tuple[Row, str, str],
) -> None:
    """Fill a panel; ``what`` is the dense model, the level and the panel's name."""
    dense, level, panel = what
    origin = dense.quality(_PERPLEXITY) if panel == _PERPLEXITY else 1.0
    start = []
    if origin is not None:
        start = [_Point(dense.level(level) or 0.0, origin, origin, origin, dense.anchor)]
    values = [point.value for point in start]
    for at, line in enumerate(lines.values()):
        colour = LINES[at % len(LINES)]
        points = start + [point for row in line if (point := _point(row, level, panel))]
        points.sort(key=lambda point: point.level)
        axes.plot([p.level for p in points], [p.value for p in points], color=colour, lw=1.5)
        for p in points:
            axes.plot([p.level] * 2, [p.low, p.high], color=colour, lw=3, alpha=0.25)
            axes.plot([p.level], [p.value], ".", ms=7, color=colour, url=f"#{p.anchor}", zorder=4)
        values += [point.value for point in points]
    for p in (point for row in alone if (point := _point(row, level, panel))):
        axes.plot(
            [p.level], [p.value], "o", ms=4, mfc="none", mec=MUTED, mew=0.9, url=f"#{p.anchor}"
        )
        values.append(p.value)
    axes.grid(axis="y")
    if panel == _PERPLEXITY:
        scale(axes, values, "y")
    else:
        axes.margins(0.1)
        axes.set_ylim(0, min(max([1.05, *values]) + 0.05, 1.6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        rule(axes)
    _levels(axes, level)


def _levels(axes: Axes, level: str) -> None:
    if level == "sparsity":
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        return
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xticks([bits for bits in (1, 2, 3, 4, 6, 8, 16, 32) if low <= bits <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _point(row: Row, level: str, panel: str) -> _Point | None:
    """Return a recipe's point; None where it lacks the number.

    A score's interval is that of its paired difference to the dense score, in units of the
    latter.
    """
    if panel == _PERPLEXITY:
        value = row.quality(_PERPLEXITY)
        found = (row.entry.get("quality") or {}).get(_PERPLEXITY)
        ends = [found.get(end) if isinstance(found, dict) else None for end in ("low", "high")]
    else:
        damage = (row.entry.get("tasks") or {}).get(panel)
        if not damage:
            return None
        value, base = damage["relative"], damage["dense"]["value"]
        gaps = [damage["difference"][end] for end in ("low", "high")]
        ends = [1 + gap / base if base and gap is not None else None for gap in gaps]
    if not known(value):
        return None
    low, high = (value if end is None else end for end in ends)
    return _Point(row.level(level) or 0.0, value, low, high, row.anchor)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    figure.legend(
        handles=[
            Line2D([], [], color=LINES[at % len(LINES)], lw=2, label=name)
            for at, name in enumerate(names)
        ],
        loc="upper left", ncols=6, frameon=False, fontsize=9, borderaxespad=0,
        handlelength=1.2, columnspacing=1.6,
    )  # fmt: skip
