"""The leaderboard's Pareto plots, and what its drawings have in common.

Every recipe's point is a link to its row, with a tooltip; both work without a script.
"""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from rarefy.report.plots import INK, MUTED, PAPER, STYLE, svg_element
from rarefy.report.words import number, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from rarefy.report.leaderboard_rows import Row

# Stand-ins like those of the other plots; the page's style sheet has the colours.
LINES = tuple(f"#0b0c{at:02x}" for at in range(1, 9))
ROLES = {
    "quantization": ("●", "o", 1),
    "pruning": ("■", "s", 2),
    "low rank": ("▲", "^", 3),
    "surgery": ("◆", "D", 4),
    "composition": ("✚", "P", 5),
    "dense": ("★", "*", 6),
}
"""Role -> (sign in the text, marker in a drawing, number of its colour)."""
WIDTH = 11.0
_LINK = re.compile(r'<a xlink:href="#([\w-]+)"[^>]*>')
_NUMBERED = re.compile(r' id="[a-z0-9]+_\d+"')
"""Ids that every drawing has again, and nothing points to."""
_SPOTS = [
    (ring * x, ring * y)
    for ring in (1.0, 1.8, 2.8, 4.0)
    for x, y in ((8, 0), (-8, 0), (0, 10), (0, -10), (7, 8), (7, -8), (-7, 8), (-7, -8))
]
"""Where a label may stand beside its point, in points, the best place first."""
_NEAR = 14
"""A label further off than this is joined to its point by a thin line."""


@dataclass(frozen=True)
class Measure:
    """An axis: its label, its number of a row, and whether more of it is better."""

    label: str
    of: Callable[[Row], float | None]
    higher: bool = True


SIZE = Measure("weights on disk, MB", lambda row: _scaled(row.cost("disk_bytes"), 1e-6), False)
SPEED = Measure("decode, tokens/s", lambda row: row.cost("decode_tok_s"))
KL = Measure("mean KL to dense, nats", lambda row: row.quality("kl_mean"), False)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def pareto(rows: Sequence[Row], x: Measure, y: Measure) -> Markup:
    """Draw one number of each recipe against another, with the front that none beats.

    Args:
        rows: recipes, and the dense model if it is to be drawn.
        x, y: the two numbers; a row that lacks one is left out.

    Returns:
        An SVG element; empty when no recipe has both numbers.
    """
    points = []
    for row in rows:
        px, py = x.of(row), y.of(row)
        if known(px) and known(py):
            points.append((row, px, py))
    if all(row.anchor == "dense" for row, _, _ in points):
        return Markup()
    label = f"{y.label} against {x.label}"
    with mpl.rc_context(STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=(WIDTH, 4.6), dpi=72)
        axes = figure.subplots()
        best = front([(px, py) for _, px, py in points], x.higher, y.higher)
        axes.step(*zip(*best, strict=True), where="pre" if x.higher else "post", color=MUTED, lw=1)
        for row, px, py in points:
            _, marker, colour = _role(row)
            axes.plot(
                [px], [py], marker, ms=12 if marker == "*" else 6.5, color=LINES[colour - 1],
                mec=PAPER, mew=0.8, url=f"#{row.anchor}", zorder=3,
            )  # fmt: skip
        scale(axes, [py for _, _, py in points], "y")
        scale(axes, [px for _, px, _ in points], "x")
        notes = [_named_rule(axes)] if y.higher else []
        axes.grid(visible=True)
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        figure.tight_layout(pad=0.4)
        on_front = sorted(points, key=lambda point: (point[1], point[2]) not in best)
        _label(axes, [(row.name, px, py) for row, px, py in on_front], notes)
        return finish(figure, label, {row.anchor: tip(row) for row, _, _ in points})


def front(
    points: Sequence[tuple[float, float]], more_x: bool, more_y: bool
) -> list[tuple[float, float]]:
    """Return the points that no other beats on both counts, from left to right.

    Args:
        points: (x, y) pairs.
        more_x, more_y: whether more of it is better.
    """
    sx, sy = (1 if more else -1 for more in (more_x, more_y))
    best, found = -math.inf, []
    for x, y in sorted(set(points), key=lambda point: (-sx * point[0], -sy * point[1])):
        if sy * y > best:
            best = sy * y
            found.append((x, y))
    return sorted(found)


def known(value: float | None) -> TypeGuard[float]:
    """Say whether there is a number that can be drawn."""
    return value is not None and math.isfinite(value)


def _role(row: Row) -> tuple[str, str, int]:
    return ROLES.get(str(row.entry.get("role")), ("○", "o", 8))


def tip(row: Row) -> str:
    """Return the tooltip of a recipe's point."""
    return (
        f"{row.name}: {size(row.cost('disk_bytes'))}, KL {number(row.quality('kl_mean'))}, "
        f"perplexity {number(row.quality('perplexity'))}, score kept {number(row.kept)}"
    )


def rule(axes: Axes) -> None:
    """Draw the line of the 5 % rule."""
    axes.axhline(0.95, color=MUTED, lw=0.8, dashes=(3, 3), zorder=1)


def _named_rule(axes: Axes) -> Annotation:
    rule(axes)
    return axes.annotate(
        "5 % rule", (1, 0.95), (-2, -3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right", va="top", fontsize=8, color=MUTED,
    )  # fmt: skip


def scale(axes: Axes, values: Sequence[float], which: str) -> None:
    """Take a log axis where the values span more than a factor of five."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axes.margins(0.1)
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.4g}")


def _label(
    axes: Axes, points: Sequence[tuple[str, float, float]], notes: Sequence[Annotation]
) -> None:
    """Name the points, the first ones first, beside ``notes`` and one another.

    A name that fits nowhere is left to the tooltip.
    """
    frame = axes.get_window_extent()
    spots = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]
    taken += [note.get_window_extent() for note in notes]
    for name, x, y in points:
        for dx, dy in _SPOTS:
            note = axes.annotate(
                textwrap.shorten(name, 40, placeholder="…"), (x, y), (dx, dy), fontsize=8.5,
                textcoords="offset points", va="center", color=INK, zorder=4,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
            )  # fmt: skip
            box = note.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if math.hypot(dx, dy) > _NEAR:
                    line = {"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 1}
                    axes.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=line)
                break
            note.remove()


def finish(figure: Figure, label: str, tips: Mapping[str, str]) -> Markup:
    """Return the SVG element with the page's colours, links and tooltips."""
    svg = _NUMBERED.sub("", str(svg_element(figure, label)))
    for at, colour in enumerate(LINES, 1):
        svg = svg.replace(colour, f"var(--line-{at})")

    def link(found: re.Match[str]) -> str:
        tip = escape(tips.get(found[1], "dense"))
        return f'<a href="#{found[1]}"><title>{tip}</title>'

    return Markup(_LINK.sub(link, svg))  # noqa: S704 - matplotlib escapes, and so does link
