"""Several results side by side, best first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rarefy.report.words import (
    NONE,
    Report,
    estimate,
    number,
    percent,
    recipe_name,
    seconds,
    size,
    times,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = (
    "recipe",
    "bits (linears)",
    "bits (model)",
    "on disk",
    "vs fp16",
    "KL [95 %]",
    "top-1 agreement",
    "perplexity",
    "decode tok/s",
    "peak memory",
    "compressed in",
)


@dataclass(frozen=True)
class Row:
    """One result; estimates are dicts of value, low and high. None is what was not measured.

    Attributes:
        name: the recipe, or the folder where there is no manifest.
        bits_linear, bits_model: bits per weight, scales included.
        disk_bytes: weight files on disk. ratio: against 2 bytes per parameter of the reference.
        kl, agreement: against the reference; None for the reference itself.
        decode_tok_s, peak_bytes: from a fresh process. seconds: the compression took.
    """

    name: str
    bits_linear: float | None
    bits_model: float
    disk_bytes: int
    ratio: float
    kl: dict[str, Any] | None
    agreement: dict[str, Any] | None
    perplexity: dict[str, Any]
    decode_tok_s: float | None
    peak_bytes: int | None
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of ``COLUMNS``."""
        return (
            self.name,
            number(self.bits_linear),
            number(self.bits_model),
            size(self.disk_bytes),
            times(self.ratio),
            estimate(self.kl) if self.kl else NONE,
            percent(self.agreement["value"]) if self.agreement else NONE,
            number(self.perplexity["value"]),
            number(self.decode_tok_s),
            size(self.peak_bytes),
            seconds(self.seconds),
        )


def comparison_rows(reports: Sequence[Report]) -> list[Row]:
    """Return one row per report, the lowest mean KL first, equals by size.

    Args:
        reports: contents of report.json files.
    """
    rows = [
        Row(
            name=recipe_name(report),
            kl=report["quality"]["kl_mean"],
            agreement=report["quality"]["agreement"],
            perplexity=report["quality"]["perplexity"],
            seconds=report["manifest"].get("seconds"),
            **_measured(report["footprint"], report["speed"]),
        )
        for report in reports
    ]
    return sorted(rows, key=lambda row: (row.kl["value"] if row.kl else 0.0, row.disk_bytes))


def reference_row(reports: Sequence[Report]) -> Row | None:
    """Return the dense model's row, or None when the reports were not measured alike."""
    if not reports or not measured_alike(reports):
        return None
    first = next((report for report in reports if report["speed_dense"]), reports[0])
    return Row(
        name="dense (reference)",
        kl=None,
        agreement=None,
        perplexity=first["quality"]["perplexity_dense"],
        seconds=None,
        **_measured(first["footprint_dense"], first["speed_dense"]),
    )


def _measured(footprint: dict[str, Any], speed: dict[str, Any] | None) -> dict[str, Any]:
    speed = speed or {}
    return {
        "bits_linear": footprint["bits_linear"],
        "bits_model": footprint["bits_model"],
        "disk_bytes": footprint["disk_bytes"],
        "ratio": footprint["ratio_16bit"],
        "decode_tok_s": speed.get("decode_tok_s"),
        "peak_bytes": speed.get("peak_bytes"),
    }


def measured_alike(reports: Sequence[Report]) -> bool:
    """Say whether the reference, the text and the windows of all reports are the same."""
    keys = ("against", "text", "sha256", "windows", "length")
    return len({tuple(report["protocol"][key] for key in keys) for report in reports}) <= 1


def caption(reports: Sequence[Report]) -> str:
    """State the reference, the text and how the intervals were made."""
    if not reports:
        return "no results"
    if not measured_alike(reports):
        return (
            "These results were NOT measured alike (other reference, text or windows): "
            "do not compare their quality numbers."
        )
    protocol, quality = reports[0]["protocol"], reports[0]["quality"]
    return (
        f"Reference: {protocol['against']}, in {protocol['arithmetic']}. "
        f"Text: {protocol['text']}, {protocol['windows']} windows of {protocol['length']} tokens. "
        f"KL is KL(dense || compressed) in nats over the whole vocabulary. {quality['interval']}. "
        "Bits include scales and zero points and are measured from the files."
    )


def _all_rows(reports: Sequence[Report]) -> list[Row]:
    reference = reference_row(reports)
    return ([reference] if reference else []) + comparison_rows(reports)


def comparison_table(reports: Sequence[Report]) -> Table:
    """Return the comparison as a table for the terminal, the dense reference first."""
    table = Table(caption=caption(reports), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in _all_rows(reports):
        table.add_row(*(cell.replace("[", r"\[") for cell in row.cells()))
    return table


def comparison_markdown(reports: Sequence[Report]) -> str:
    """Return the comparison as a Markdown table with its caption, the dense reference first."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|:--" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for row in _all_rows(reports):
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in row.cells()) + " |")
    return "\n".join([*lines, "", caption(reports), ""])
