"""What the command line prints: tables, progress, sentences. Results go to stdout, news to stderr.

Where the output is no terminal, rich leaves out every control sequence, and progress is a plain
line a block.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rarefy.report.words import NONE, estimate, number, percent, seconds, size, times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rarefy.bench import Bench
    from rarefy.doctor import Finding
    from rarefy.evaluate.speed import Speed
    from rarefy.plan import Plan
    from rarefy.report.words import Report

_WIDE = 160  # columns where the output is a file or a pipe

out = Console(soft_wrap=False)
news = Console(stderr=True)
if not out.is_terminal:
    out = Console(width=_WIDE)
if not news.is_terminal:
    news = Console(stderr=True, width=_WIDE, soft_wrap=True)


def fail(sentence: str) -> None:
    """Print an error to stderr, in red where there is colour."""
    news.print(f"[red]error:[/red] {escape(sentence)}", soft_wrap=True, highlight=False)


def say(sentence: str) -> None:
    """Print a remark to stderr."""
    news.print(escape(sentence), soft_wrap=True, highlight=False, style="dim")


class Meter:
    """Progress of something that is done in equal steps.

    Attributes:
        done, total: as last reported; total is 0 before the first report.
        what: a step is called.
    """

    def __init__(self, bar: Progress | None, what: str) -> None:
        self.done = self.total = 0
        self._bar = bar
        self.what = what
        self._start = time.perf_counter()
        self._task = None if bar is None else bar.add_task(what, total=None)

    def step(self, done: int, total: int, what: str = "") -> None:
        """Report that ``done`` of ``total`` steps are finished."""
        self.done, self.total = done, total
        if what and what != self.what:
            self.what, self._start = what, time.perf_counter()
            if self._bar is not None and self._task is not None:
                self._bar.reset(self._task)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=self.what)
        elif done:
            spent = time.perf_counter() - self._start
            left = seconds(spent / done * (total - done))
            say(f"{self.what} {done} of {total}, {seconds(spent)}, {left} left")


@contextmanager
def meter(what: str) -> Iterator[Meter]:
    """A progress bar on a terminal, plain lines elsewhere."""
    if not news.is_terminal:
        yield Meter(None, what)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Blocks of large models take minutes: estimate from the whole run, not from its last seconds.
    with Progress(*columns, console=news, speed_estimate_period=86400) as bar:
        yield Meter(bar, what)


def grid(*columns: str, title: str = "") -> Table:
    """An empty table; columns after the first are numbers unless their name ends in a colon."""
    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        left = index == 0 or column.endswith(":")
        table.add_column(column.removesuffix(":"), justify="left" if left else "right")
    return table


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns, what and how much."""
    table = Table(show_header=False)
    for what, value in rows:
        table.add_row(what, escape(value))
    return table


def groups(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Join rows that agree in ``keys``: counts them, sums weights and bytes."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(
        lambda: {"count": 0, "weights": 0, "bytes": 0, "errors": []}
    )
    for row in rows:
        group = joined[tuple(row[key] for key in keys)]
        group["count"] += 1
        group["weights"] += row["weights"]
        group["bytes"] += row["bytes"]
        group["errors"] += [row["error"]] if row.get("error") is not None else []
    return [dict(zip(keys, key, strict=True)) | group for key, group in joined.items()]


def show_result(manifest: dict[str, Any], container: str) -> None:
    """Print what a compression did and what it left alone."""
    for stage in manifest.get("history", []):
        if "parameters_after" in stage:
            before, after = stage["parameters_before"], stage["parameters_after"]
            say(f"{stage['name']}: {before:,} parameters before the cut, {after:,} after")
        elif stage["role"] == "transform":
            say(f"{stage['name']}: {len(stage['edges'])} edges folded")
    if manifest["nodes"]:
        show_matrices(manifest)
    rows = [
        ("fallbacks", str(len(manifest["fallbacks"]) or "none")),
        ("container", container),
        ("peak memory", size(manifest.get("peak_memory_bytes"))),
        ("time", seconds(manifest.get("seconds"))),
    ]
    out.print(pairs(rows))
    for fallback in manifest["fallbacks"]:
        out.print(f"fallback: {fallback['what']}", highlight=False, markup=False)


def show_matrices(manifest: dict[str, Any]) -> None:
    """Print which matrices were compressed, into what, and what was left alone."""
    table = grid("compressed", "format:", "solver:", "count", "weights", "bytes", "bits", "error")
    for row in groups(manifest["nodes"], ("kind", "format", "solver")):
        error = sum(row["errors"]) / len(row["errors"]) if row["errors"] else None
        table.add_row(
            row["kind"], row["format"], row["solver"], str(row["count"]), f"{row['weights']:,}",
            size(row["bytes"]), number(8 * row["bytes"] / row["weights"]), number(error),
        )  # fmt: skip
    out.print(table)
    kept = [{**row, "kind": row["name"].rpartition(".")[2]} for row in manifest["kept"]]
    for row in groups(kept, ("kind", "why")):
        out.print(
            f"left alone: {row['count']} x {row['kind']} ({row['weights']:,} weights, "
            f"{size(row['bytes'])}): {row['why']}",
            highlight=False, markup=False,
        )  # fmt: skip
    weights = sum(node["weights"] for node in manifest["nodes"])
    stored = sum(node["bytes"] for node in manifest["nodes"])
    out.print(
        f"compressed: {weights:,} weights, {percent(manifest['coverage'])} of the model, "
        f"{number(8 * stored / weights)} bits each",
        highlight=False, markup=False,
    )  # fmt: skip


def show_plan(plan: Plan) -> None:
    """Print a plan by kind of tensor, then its totals."""
    rows = [
        {"kind": e.kind, "format": e.format, "why": e.why, "weights": e.weights, "bytes": e.bytes}
        for e in plan.lines
    ]
    table = grid("tensor", "format:", "count", "weights", "bytes", "bits", "left alone because:")
    for row in groups(rows, ("kind", "format", "why")):
        table.add_row(
            row["kind"], row["format"], str(row["count"]), f"{row['weights']:,}",
            f"{row['bytes']:,}", number(8 * row["bytes"] / row["weights"]), row["why"],
        )  # fmt: skip
    out.print(table)
    memory = plan.memory
    totals = [
        ("bytes of all tensors", f"{plan.bytes:,} ({size(plan.bytes)})"),
        ("bits per weight, linears", number(plan.bits_linear)),
        ("bits per weight, whole model", number(plan.bits)),
        ("against 16 bits", times(plan.ratio)),
        ("compressed share of the model", percent(plan.coverage)),
        ("container", plan.container + (f": {plan.reason}" if plan.reason else "")),
        ("peak memory, at least", f"{size(memory.peak)} ({size(memory.baseline)} of it libraries)"),
    ]
    out.print(pairs(totals))
    for note in plan.notes:
        out.print(note, highlight=False, markup=False)


def show_report(report: Report) -> None:
    """Print one evaluation, the dense model beside it."""
    quality, small, dense = report["quality"], report["footprint"], report["footprint_dense"]
    table = grid(report["name"], "dense", "this")
    same = {"value": 1, "low": None, "high": None}
    rows = [
        ("perplexity", estimate(quality["perplexity_dense"]), estimate(quality["perplexity"])),
        ("KL to dense, mean", "0", estimate(quality["kl_mean"])),
        ("  median", "0", number(quality["kl_median"])),
        ("  95th percentile", "0", number(quality["kl_p95"])),
        ("  99th percentile", "0", number(quality["kl_p99"])),
        ("same most likely token", estimate(same, True), estimate(quality["agreement"], True)),
        ("true token's probability, change", "0", estimate(quality["delta_p_mean"])),
        ("weights on disk", size(dense["disk_bytes"]), size(small["disk_bytes"])),
        ("against 16 bits", times(dense["ratio_16bit"]), times(small["ratio_16bit"])),
        ("bits per weight, linears", number(dense["bits_linear"]), number(small["bits_linear"])),
        ("bits per weight, whole model", number(dense["bits_model"]), number(small["bits_model"])),
        ("parameters", f"{dense['parameters']:,}", f"{small['parameters']:,}"),
        ("linear weights compressed", NONE, percent(small["coverage_linear"])),
        ("all weights compressed", NONE, percent(small["coverage_model"])),
    ]
    fast, slow = report["speed"], report["speed_dense"]
    if fast and slow:
        rows += [
            ("time to first token, s", number(slow["ttft_s"]), number(fast["ttft_s"])),
            ("decode, tokens/s", number(slow["decode_tok_s"]), number(fast["decode_tok_s"])),
            ("peak memory", size(slow["peak_bytes"]), size(fast["peak_bytes"])),
        ]
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


def show_cache(cache: Report) -> None:
    """Print what a quantized cache does to text that is read token by token."""
    quality = cache["quality"]
    table = grid("read token by token", "full cache", cache["format"])
    rows = [
        ("perplexity", estimate(quality["perplexity_dense"]), estimate(quality["perplexity"])),
        ("KL to full cache, mean", "0", estimate(quality["kl_mean"])),
        (f"cache of {cache['tokens']} tokens", size(cache["bytes_full"]), size(cache["bytes"])),
        ("time", seconds(cache["seconds_full"]), seconds(cache["seconds"])),
    ]
    for row in rows:
        table.add_row(*row)
    out.print(table)


def show_bench(done: Bench) -> None:
    """Print what was measured, one model a column."""
    table = grid("", *(row.name for row in done.rows))
    lines: dict[str, Callable[[Speed], str]] = {
        "engine": lambda s: s.engine,
        "time to first token": lambda s: seconds(s.ttft_s),
        "prefill, tokens/s": lambda s: number(s.prefill_tok_s),
        "decode, tokens/s": lambda s: number(s.decode_tok_s),
        "read a token": lambda s: size(s.token_bytes),
        "peak memory": lambda s: size(s.peak_bytes),
        "  of it before loading": lambda s: size(s.baseline_bytes),
        "load": lambda s: seconds(s.load_s),
    }
    for what, show in lines.items():
        table.add_row(what, *(escape(show(row.speed)) for row in done.rows))
    table.add_row("share of read bandwidth", *(percent(row.share) for row in done.rows))
    out.print(table)
    first = done.rows[0].speed
    out.print(
        f"{first.device}, {first.threads} threads, {first.prompt_tokens} tokens of prompt, "
        f"{first.new_tokens} made; memory reads {size(done.read_bandwidth)}/s",
        highlight=False, markup=False,
    )  # fmt: skip
    for row in done.rows:
        out.print(f"{row.name}: {row.speed.kernel}", highlight=False, markup=False)
        if row.speed.obstacle:
            out.print(f"{row.name}: {row.speed.obstacle}", highlight=False, markup=False)


def show_methods(rows: Sequence[dict[str, Any]]) -> None:
    """Print the catalogue of methods."""
    table = grid("name", "role:", "family:", "paper:", "arXiv:", "file:", "presets:", "options:")
    for row in rows:
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        cells = [row[key] for key in ("name", "role", "family", "paper", "arxiv", "file")]
        table.add_row(*(escape(cell) for cell in (*cells, ", ".join(row["presets"]), options)))
    out.print(table)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print what the doctor found."""
    table = grid("what", "found:", "consequence:")
    for finding in findings:
        mark = "" if finding.good else "[yellow]"
        table.add_row(finding.what, mark + escape(finding.value), escape(finding.advice))
    out.print(table)
