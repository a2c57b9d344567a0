"""The leaderboard as one self-contained HTML page and as Markdown.

Both are made from the content of leaderboard.json and nothing else. Numbers that the file does
not hold, how many tasks match, how many answers flipped, are counted in ``leaderboard_rows``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rarefy.report import leaderboard_plots as plots
from rarefy.report import words
from rarefy.report.html import page_environment
from rarefy.report.leaderboard_curves import curves
from rarefy.report.leaderboard_rows import (
    FAMILIES,
    Board,
    Row,
    families_of,
    row_of,
    rows_of,
)
from rarefy.report.leaderboard_words import headline, hidden_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

_OPTIONAL: Board = {"created": None, "machine": {}, "versions": {}, "tasks": [], "failed": [],
             "comparisons": None, "profile": None, "reference": ""}  # fmt: skip


def leaderboard_html(board: Board) -> str:
    """Return the page.

    Args:
        board: content of leaderboard.json.
    """
    board = _OPTIONAL | board
    rows, dense = rows_of(board), row_of("dense", board["dense"], board)
    environment = page_environment()
    environment.filters |= {"text": text, "flops": flops, "count": count}
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        title=f"KICK leaderboard of {board['model']}",
        headline=headline(rows, dense),
        hidden=hidden_loss(rows, board),
        families={key: FAMILIES.get(key, key) for key in families_of(board)},
        rows=rows,
        dense=dense,
        tasks=_tasks(board),
        tracks=list(
            dict.fromkeys(
                name
                for row in rows
                for name, track in (row.entry.get("tracks") or {}).items()
                if track
            )
        ),
        titles={task["name"]: task["title"] for task in board["tasks"]},
        roles=plots.ROLES,
        drawings=_drawings(rows, dense),
        sparsity=curves(rows, dense, board["tasks"], "sparsity"),
        bits=curves(rows, dense, board["tasks"], "bits"),
        interval=next((how for row in rows if (how := _interval(row.entry))), ""),
    )


def _interval(entry: dict[str, Any]) -> str:
    """Return how the intervals of KL and perplexity were made."""
    return (entry.get("quality") or {}).get("interval") or ""


def _drawings(rows: Sequence[Row], dense: Row) -> list[tuple[str, str, Markup]]:
    """Return (title, how to read it, drawing) of each Pareto plot."""
    kept = "score kept, mean of the families"
    return [
        (
            "Scores against size",
            "Higher and further left is better. The line joins the recipes that no other beats "
            "on both counts.",
            plots.pareto([dense, *rows], plots.SIZE, plots.Measure(kept, lambda row: row.kept)),
        ),
        (
            "Scores against speed",
            "Higher and further right is better; decode at batch 1 on the machine named below.",
            plots.pareto([dense, *rows], plots.SPEED, plots.Measure(kept, lambda row: row.kept)),
        ),
        (
            "Distance to the dense model against size",
            "Lower and further left is better. Mean KL divergence of the next-token "
            "predictions; the dense model, at 0, is off the scale.",
            plots.pareto(rows, plots.SIZE, plots.KL),
        ),
    ]


def _tasks(board: Board) -> list[dict[str, Any]]:
    """Return each task with the dense model's damage record, None where nobody ran it."""
    entries = [board["dense"], *board["entries"]]
    found = []
    for task in board["tasks"]:
        records = [(entry.get("tasks") or {}).get(task["name"]) for entry in entries]
        found.append(task | {"damage": next((record for record in records if record), None)})
    return found


def text(value: Any) -> str:
    """Write what a model or a task answered: several answers with slashes, a dash for none."""
    if isinstance(value, list | tuple):
        return " / ".join(map(str, value)) or words.NONE
    return words.NONE if value is None or not str(value).strip() else str(value)


def count(value: float | None) -> str:
    """Write a whole number: 1,234."""
    return words.NONE if value is None else f"{value:,.0f}"


def flops(number: float | None) -> str:
    """Write a count of floating-point operations: 269 MFLOP."""
    return words.NONE if number is None else words.size(number).replace("B", "FLOP")


def leaderboard_markdown(board: Board) -> str:
    """Return the main table, the tasks and notes as Markdown.

    Args:
        board: content of leaderboard.json.
    """
    board = _OPTIONAL | board
    rows, dense = rows_of(board), row_of("dense", board["dense"], board)
    families = families_of(board)
    head = ["recipe", "on disk", "bits", "KL", "perplexity"]
    head += [FAMILIES.get(family, family) for family in families]
    head += ["tasks matched", "flips", "decode tok/s"]
    tasks = [
        [_escape(task["title"]), FAMILIES.get(task["family"], task["family"]), count(task["items"]),
         *_judged(task["damage"])]
        for task in _tasks(board)
    ]  # fmt: skip
    hidden = hidden_loss(rows, board)
    parts = [
        "# Leaderboard",
        "Written by `rarefy kick MODEL --markdown FILE`.",
        f"{_escape(headline(rows, dense))}.",
        _escape(hidden if isinstance(hidden, str) else hidden.sentence),
        _table(head, [_cells(row, families) for row in [dense, *rows]]),
        f"{_escape(board['reference'])} Profile {_escape(text(board['profile']))}. Families hold "
        "scores relative to the dense model, means over the tasks that can show "
        "damage; bold: not every one of these tasks is within 5 % of the dense score; *: a task "
        f"is worse by exact McNemar with Holm's correction over {text(board['comparisons'])} "
        "comparisons. Bits are per weight of the linears, as stored. Flips are right answers "
        "turned wrong and the reverse, as a share of all answers.",
        _table(["task", "family", "items", "dense score", "chance", "can show damage"], tasks),
        "A task can show damage when the dense score is at least three standard errors above "
        "chance; others are left out of families and of the count.",
    ]
    failed = [f"- {_escape(row['recipe'])}: {_escape(row['error'])}" for row in board["failed"]]
    parts += ["Failed:", "\n".join(failed)] if failed else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: Row, families: Sequence[str]) -> list[str]:
    dense = row.anchor == "dense"
    cells = [
        "dense" if dense else row.name,
        words.size(row.cost("disk_bytes")),
        words.number(row.level("bits")),
        words.number(0 if dense else row.quality("kl_mean")),
        words.number(row.quality("perplexity")),
    ]
    kept = []
    for family in families:
        cell = row.families[family]
        value = words.number(cell.value) + ("*" if cell.sure else "")
        kept.append(f"**{_escape(value)}**" if cell.state in ("part", "lost") else _escape(value))
    matched = f"{row.matched} of {row.tasks}" if row.tasks else words.NONE
    speed = words.number(row.cost("decode_tok_s"))
    return [*map(_escape, cells), *kept, matched, words.percent(row.flips), speed]


def _judged(damage: dict[str, Any] | None) -> list[str]:
    if damage is None:
        return [words.NONE] * 3
    sensitive = "yes" if damage["sensitive"] else "no"
    return [words.estimate(damage["dense"]), words.number(damage["chance"]), sensitive]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape(value: object) -> str:
    """Escape what Markdown or HTML would take for markup."""
    plain = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", plain)
