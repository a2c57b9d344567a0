"""The command line: every verb is a few lines around the function of the same name."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import wrapt
import yaml
from rich.markdown import Markdown
from typer.core import TyperCommand, TyperGroup

import rarefy
from rarefy import console
from rarefy.bench import Load
from rarefy.bench import bench as measure_bench
from rarefy.chat import chat as talk
from rarefy.chat import open_voice
from rarefy.checkpoint.writer import write_atomic, write_json
from rarefy.doctor import examine
from rarefy.engine.compress import Calibration
from rarefy.engine.stage import Watcher
from rarefy.errors import RarefyError
from rarefy.evaluate.incremental import evaluate_cache
from rarefy.formats.kv import KVFormat
from rarefy.kick.run import Options
from rarefy.methods import methods_markdown
from rarefy.report import words
from rarefy.report.card import card
from rarefy.report.compare import comparison_markdown, comparison_table
from rarefy.runtime.sampling import Sampling
from rarefy.synthesis.base import SYNTHESIZERS
from rarefy.synthesis.engine import Settings
from rarefy.synthesis.questions import read_questions
from rarefy.teachers.endpoint import Endpoint, EndpointTeacher
from rarefy.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from rarefy.report.words import Report
    from rarefy.teachers.base import Teacher


class _Verbs(TyperGroup):
    """Turns errors that a user can mend into one sentence and a status; others keep their trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RarefyError as error:
            console.fail(str(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            console.news.print(str(stop) or "stopped")
            raise typer.Exit(130) from stop


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make dense language models less dense, and tell the truth about the damage.",
)

_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or 'demo'.")
]
_Recipe = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="A preset (see 'rarefy methods') or a YAML file.")
]
_Sequences = Annotated[int, typer.Option(metavar="N", help="Calibration rows.")]
_Length = Annotated[int, typer.Option(metavar="L", help="Tokens of each row.")]
_Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to be made.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rarefy {rarefy.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    model: _Model,
    recipe: _Recipe,
    out: _Out,
    calibration: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Corpora or .txt or .jsonl files, joined by +.")
    ] = Calibration.text,
    sequences: _Sequences = Calibration.sequences,
    length: _Length = Calibration.length,
    seed: Annotated[int, typer.Option(help="Of the order of the documents.")] = Calibration.seed,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Dense model to match, if MODEL is not.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what is at DIR first.")] = False,
) -> None:
    """Compress MODEL by a recipe into a new folder; run again after a stop, it goes on."""
    with console.meter("block") as meter:
        watcher = Watcher(
            console.say, partial(meter.step, what="block"), partial(meter.step, what="step")
        )
        data = Calibration(calibration, sequences, length, seed)
        try:
            done = rarefy.compress(
                model,
                recipe,
                out,
                calibration=data,
                teacher=teacher,
                fresh=fresh,
                watcher=watcher,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {meter.what} {meter.done} of {meter.total}; "
                "run the same command again to go on"
                if meter.total
                else "stopped before the first block was finished"
            ) from None
    config = json.loads((done.path / "config.json").read_text())
    if done.reused:
        console.say(f"{done.path} was made by the same configuration; nothing to do (or --fresh)")
    container = config.get("quantization_config", {}).get("quant_method", "plain")
    console.show_result(done.manifest, container)
    size = sum(file.stat().st_size for file in done.path.glob("*.safetensors"))
    source = done.manifest["source"]["weights_bytes"]
    console.out.print(
        f"{done.path}: {words.size(size)} of weights, from {words.size(source)}",
        highlight=False, markup=False,
    )  # fmt: skip


@app.command()
def synthesize(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="See 'rarefy methods'.")],
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="Local, or the endpoint's name.")],
    out: _Out,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines with question and answer.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of METHOD.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible server.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key-variable", metavar="NAME", help="Holds the API key.")
    ] = None,
    calls: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A ledger shared by several runs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what is at DIR first.")] = False,
) -> None:
    """Make training text with a teacher; run again after a stop, it repeats no call."""
    pairs = [word.partition("=") for word in option or []]
    options = {name: yaml.safe_load(value) for name, _, value in pairs}
    made = SYNTHESIZERS.build(method, options, "--set")
    asked = read_questions(questions) if questions else ()
    who: Teacher = (
        LocalTeacher.open(teacher)
        if endpoint is None
        else EndpointTeacher(Endpoint(endpoint, teacher, key))
    )
    with console.meter("call") as meter:

        def tell(what: str, done: int, total: int) -> None:
            meter.step(done, total, what)

        done = rarefy.synthesize(made, who, asked, out, Settings(seed, fresh, calls, tell))
    told = done.summary
    console.say(f"{done.calls} calls made, {done.cached} found in the ledger")
    console.out.print(
        f"{done.path}: {told['rows']} rows, {told['rejects']} rejects {told['reasons']}",
        highlight=False,
        markup=False,
    )


@app.command()
def evaluate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The model under test.")],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The dense reference.")],
    text: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Corpora or .txt or .jsonl files, joined by +.")
    ] = "wiki",
    sequences: Annotated[int | None, typer.Option(metavar="N", help="Windows.")] = None,
    length: Annotated[int | None, typer.Option(metavar="L", help="Tokens of a window.")] = None,
    speed: Annotated[bool, typer.Option(help="Also measure speed and peak memory.")] = True,
    kv: Annotated[
        str | None,
        typer.Option(metavar="8|4|2", help="Also read token by token, with a cache of these bits."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report here.")
    ] = None,
) -> None:
    """Measure quality, size and speed beside the dense model; write the report into DIR."""
    form = None if kv is None else KVFormat.parse(kv)
    with console.meter("load") as meter:

        def tell(what: str, done: int, total: int) -> None:
            meter.step(done, total, what)

        report = rarefy.evaluate(
            directory, against, text=text, sequences=sequences, length=length, speed=speed,
            progress=tell,
        ).report()  # fmt: skip
        if form is not None:
            reading = evaluate_cache(
                directory, form, text=text, sequences=sequences, length=length, progress=tell
            )
            report["cache"] = dataclasses.asdict(reading)
    console.show_report(report)
    if form is not None:
        console.show_cache(report["cache"])
    folder = Path(directory)
    if (folder / "manifest.json").is_file():
        from rarefy.report.html import render_html  # imports matplotlib

        write_json(folder / "report.json", report)
        write_atomic(folder / "report.html", render_html(report).encode())
        write_atomic(folder / "README.md", card(report).encode())
        console.say(f"wrote report.json, report.html and README.md into {folder}")
    if json_file is not None:
        write_json(json_file, report)


@app.command()
def compare(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT...", help="report.json files or their folders.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write one page with plots.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table as Markdown.")
    ] = None,
) -> None:
    """Print several results in one table, the closest to the dense model first."""
    read = [_read_report(path) for path in reports]
    console.out.print(comparison_table(read))
    if html is not None:
        from rarefy.report.html import render_comparison_html  # imports matplotlib

        write_atomic(html, render_comparison_html(read).encode())
    if markdown is not None:
        write_atomic(markdown, comparison_markdown(read).encode())


class _OptionalAddress(TyperCommand):
    """Lets --ray stand alone, which typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        alone = [a == "--ray" and b.startswith("-") for a, b in zip(args, following, strict=True)]
        return super().parse_args(
            ctx, ["--ray=" if a else arg for a, arg in zip(alone, args, strict=True)]
        )


@app.command(cls=_OptionalAddress)
def kick(
    model: _Model,
    recipes: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB[,GLOB...]",
            help="Presets and recipe files; 'wanda-50@sparsity=0.3' changes an option.",
        ),
    ] = None,
    profile: Annotated[str, typer.Option(metavar="smoke|full", help="How much to ask.")] = "smoke",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of results.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="GLOB|FILE.jsonl", help="Instead of the profile's.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="[ADDRESS]", help="Run the jobs on a Ray cluster.")
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of each job.")] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration documents.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed models.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier results first.")] = False,
    dola: Annotated[
        str | None, typer.Option(metavar="low|high", help="Decode by contrasting these layers.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table here.")
    ] = None,
) -> None:
    """Run many recipes and say what each costs and forgets; run again after a stop, it goes on."""
    options = Options(tasks, seed, jobs, threads, ray, keep, fresh, dola)
    with console.meter("plan") as meter:
        try:
            made = rarefy.kick(
                model, recipes, out, profile=profile, options=options,
                tell=lambda recipe, step, done, total: meter.step(done, total, f"{recipe}: {step}"),
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; run the same command again to go on") from None
    table = (made.path / "leaderboard.md").read_text()
    if markdown is not None:
        write_atomic(markdown, table.encode())
    console.out.print(Markdown(table))
    console.say(f"wrote leaderboard.html, leaderboard.md and leaderboard.json into {made.path}")
    if made.content["failed"]:
        raise typer.Exit(1)


@app.command()
def plan(
    model: _Model,
    recipe: _Recipe,
    sequences: _Sequences = Calibration.sequences,
    length: _Length = Calibration.length,
    as_json: Annotated[bool, typer.Option("--json", help="Every tensor, as JSON.")] = False,
) -> None:
    """Say in seconds what a recipe would write: formats, exact sizes, memory. Reads no weights."""
    data = Calibration(sequences=sequences, length=length)
    planned = rarefy.plan(model, recipe, calibration=data)
    if as_json:
        totals = ("bytes", "bits", "bits_linear", "ratio", "coverage")
        extra = {name: getattr(planned, name) for name in totals}
        typer.echo(json.dumps(dataclasses.asdict(planned) | extra, indent=1))
    else:
        console.show_plan(planned)


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the catalogue as Markdown.")
    ] = None,
) -> None:
    """List every method with its paper, file, presets and options."""
    if markdown is not None:
        write_atomic(markdown, methods_markdown().encode())
        return
    rows = rarefy.methods()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        console.show_methods(rows)


@app.command()
def bench(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The model to measure.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model, measured in turn.")
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens made after it.")] = 64,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the CPU.")] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Processes of each.")] = 2,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also with inputs rounded to 8 bits, as chat --int8.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Measure time to first token, prefill and decode rate, peak memory, share of bandwidth."""
    load = Load(prompt, new, threads, rounds)
    with console.meter("measurement") as meter:
        done = measure_bench(directory, against, load, meter.step, int8=int8)
    if as_json:
        typer.echo(json.dumps(done.report(), indent=1))
    else:
        console.show_bench(done)


@app.command()
def chat(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The model to talk to.")],
    beside: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also ask this one; answers side by side.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Said to it first.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    kv: Annotated[
        str | None,
        typer.Option(metavar="8|4|2", help="Hold keys and values of DIR in these bits; slower."),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Round what DIR's integers multiply to 8 bits; faster."),
    ] = False,
) -> None:
    """Talk to a model, line by line, on the terminal or through a pipe."""
    rules = Sampling(max_tokens, temperature, top_p, seed)
    form = None if kv is None else KVFormat.parse(kv)
    others = [] if beside is None else [open_voice(beside, rules, system)]
    talk([*others, open_voice(directory, rules, system, form, int8)])


@app.command()
def export(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder made by compress; for GGUF any MODEL.")
    ],
    out: _Out,
    form: Annotated[
        str, typer.Option("--format", help="dense, gguf, gptq, awq or compressed-tensors.")
    ] = "dense",
    dtype: Annotated[
        str | None, typer.Option(help="dense: float32, float16 or bfloat16; else the source's.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Q4_K_M, Q8_0, ...; or FP8.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(metavar="TYPE", help="gguf: of embedding and head.")
    ] = None,
    imatrix: Annotated[
        str | None, typer.Option(metavar="FILE|CORPUS", help="gguf: which columns matter.")
    ] = None,
) -> None:
    """Write a compressed folder in another format; one that cannot say it is refused."""
    with console.meter("tensor") as meter:
        made = rarefy.export(
            directory, out, format=form, dtype=dtype, type=kind, embedding=embedding,
            imatrix=imatrix, say=console.say,
            tell=lambda what, done, total: meter.step(done, total, what),
        )  # fmt: skip
    console.out.print(f"{made}: written", highlight=False, markup=False)


@app.command()
def doctor(
    online: Annotated[bool, typer.Option("--online", help="Also try the package index.")] = False,
) -> None:
    """Examine this machine: versions, processor, memory, disk, cache, and what falls back."""
    console.show_findings(examine(online=online))


def _read_report(path: Path) -> Report:
    file = path / "report.json" if path.is_dir() else path
    try:
        report: Report = json.loads(file.read_text())
        report["quality"]["kl_mean"], report["protocol"], report["footprint"]
    except FileNotFoundError as error:
        raise RarefyError(f"there is no report at {file}; make one with rarefy evaluate") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RarefyError(
            f"{file} is not a report of rarefy; give the report.json that rarefy evaluate wrote"
        ) from error
    return report


def main() -> None:
    """Entry point of the installed command."""
    # transformers' bars would break into ours, and into pipes.
    wrapt.register_post_import_hook(_without_bars, "transformers.utils.logging")
    app()


def _without_bars(logging: Any) -> None:
    logging.disable_progress_bar()
