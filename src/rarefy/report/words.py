"""Numbers as people read them, and the sentence that sums up a report."""

from __future__ import annotations

import math
from typing import Any

Report = dict[str, Any]
"""The content of a report.json: ``Evaluation.report()``."""

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits: 0.0123, 17.4, 1,230; a dash for None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if power < -4 or power > 8:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - power, 0)}f}"


def percent(value: float | None) -> str:
    """Write a share with one decimal: 82.4 %; whole numbers only for exactly 0 and 1."""
    if value is None:
        return NONE
    return f"{value:.0%}".replace("%", " %") if value in (0, 1) else f"{100 * value:.1f} %"


def size(count: float | None) -> str:
    """Write bytes in decimal units: 77.3 MB."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} GB"


def seconds(value: float | None) -> str:
    """Write a duration: 0.31 s, 42 s, 3 min 20 s, 1 h 05 min."""
    if value is None:
        return NONE
    if value < 60:
        return f"{number(value, 2)} s"
    minutes, rest = divmod(round(value), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def times(value: float | None) -> str:
    """Write a ratio: 5.1x."""
    return NONE if value is None else f"{number(value, 2 if value < 100 else 3)}x"


def interval(estimate: dict[str, Any], share: bool = False) -> str:
    """Write the interval of an estimate in brackets; empty when there is none."""
    if estimate["low"] is None:
        return ""
    write = percent if share else number
    return f"[{write(estimate['low'])}, {write(estimate['high'])}]"


def estimate(value: dict[str, Any], share: bool = False) -> str:
    """Write an estimate with its interval: 0.171 [0.158, 0.186]."""
    write = percent if share else number
    return f"{write(value['value'])} {interval(value, share)}".rstrip()


def headline(report: Report) -> str:
    """Sum up a report in one sentence: size, KL, agreement."""
    quality, ratio = report["quality"], report["footprint"]["ratio_16bit"]
    smaller = (
        f"{times(ratio)} smaller than fp16" if ratio > 1 else f"{times(1 / ratio)} the fp16 size"
    )
    agreement = percent(quality["agreement"]["value"])
    return (
        f"{smaller}; KL {number(quality['kl_mean']['value'], 2)}; "
        f"agrees with the dense model on {agreement} of next tokens"
    )


def recipe_name(report: Report) -> str:
    """Return the recipe's name, or the folder's for a model without a manifest."""
    return str(report["manifest"].get("recipe_name") or report["name"])
