"""The command line as a person uses it: results, sentences, exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from tiny import save_tiny
from typer.testing import CliRunner

import rarefy
import rarefy.cli
from rarefy.recipe import presets

if TYPE_CHECKING:
    from pathlib import Path

RUN = CliRunner(env={"COLUMNS": "200"})


def run(*args: object, status: int = 0) -> str:
    """Run the command; return stdout and stderr together."""
    done = RUN.invoke(rarefy.cli.app, [str(arg) for arg in args])
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny dense model, a text, a recipe, and a compressed model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "dense", torch.bfloat16)
    words = [f"{a} {b} {c}." for a in ("red", "blue") for b in ("sea", "sky") for c in range(400)]
    lines = [json.dumps({"text": " ".join(words[i::8])}) for i in range(8)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    schemes = {"*.layers.0.*": "keep", "*": {"format": "int", "bits": 4, "group": 32}}
    stage = {"solver": "gptq", "schemes": schemes}
    (folder / "small.yaml").write_text(yaml.safe_dump({"stages": [stage]}, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def packed(work: Path) -> tuple[Path, str]:
    """The compressed model and what was printed on the way."""
    said = run(*compress_command(work, work / "packed"))
    return work / "packed", said


def compress_command(work: Path, out: Path) -> list[object]:
    return [
        "compress", work / "dense", "--recipe", work / "small.yaml", "--out", out,
        "--calibration", work / "text.jsonl", "--sequences", 4, "--length", 64,
    ]  # fmt: skip


def test_compress_says_what_it_did_and_what_it_left(packed: tuple[Path, str]) -> None:
    folder, said = packed
    assert (folder / "model.safetensors").is_file()
    assert "256 tokens of text.jsonl" in said
    assert "block 3 of 3" in said
    assert "left alone: 1 x q_proj" in said
    assert "left alone by the recipe" in said
    assert "compressed-tensors" in said
    nodes = json.loads((folder / "manifest.json").read_text())["nodes"]
    assert f"{sum(node['weights'] for node in nodes):,}" in said


def test_the_same_command_again_does_nothing(work: Path, packed: tuple[Path, str]) -> None:
    before = (packed[0] / "model.safetensors").stat().st_mtime_ns
    assert "nothing to do" in run(*compress_command(work, packed[0]))
    assert (packed[0] / "model.safetensors").stat().st_mtime_ns == before


def test_evaluate_writes_the_report_and_compare_reads_it(
    work: Path, packed: tuple[Path, str]
) -> None:
    text = ["--text", work / "text.jsonl", "--sequences", 4, "--length", 64, "--no-speed"]
    dense, extra = work / "dense", work / "copy.json"
    said = run("evaluate", packed[0], "--against", dense, *text, "--json", extra)
    report = json.loads((packed[0] / "report.json").read_text())
    assert report == json.loads(extra.read_text())
    assert report["quality"]["kl_mean"]["value"] > 0
    assert f"{report['footprint']['parameters']:,}" in said
    assert (packed[0] / "README.md").read_text().startswith("---")
    assert "<html" in (packed[0] / "report.html").read_text()
    page, table = work / "page.html", work / "table.md"
    said = run("compare", packed[0], extra, "--html", page, "--markdown", table)
    assert said.count("small") >= 2
    assert "<html" in page.read_text()
    assert table.read_text().startswith("| recipe")


def test_evaluating_the_dense_model_leaves_its_folder_alone(work: Path) -> None:
    before = sorted(file.name for file in (work / "dense").iterdir())
    text = ["--text", work / "text.jsonl", "--sequences", 2, "--length", 64, "--no-speed"]
    out = work / "self.json"
    run("evaluate", work / "dense", "--against", work / "dense", *text, "--json", out)
    assert json.loads(out.read_text())["quality"]["kl_mean"]["value"] == 0
    assert sorted(file.name for file in (work / "dense").iterdir()) == before


def test_plan_as_json_adds_up(work: Path, packed: tuple[Path, str]) -> None:
    said = json.loads(run("plan", work / "dense", "--recipe", work / "small.yaml", "--json"))
    assert said["bytes"] == sum(line["bytes"] for line in said["lines"])
    header = (packed[0] / "model.safetensors").stat().st_size - said["bytes"]
    assert 0 < header < 20_000
    table = run("plan", work / "dense", "--recipe", work / "small.yaml")
    assert f"{said['bytes']:,}" in table


def test_methods_lists_every_method_with_its_presets() -> None:
    rows = {row["name"]: row for row in reversed(json.loads(run("methods", "--json")))}
    assert rows["gptq"]["arxiv"] == "2210.17323"
    assert "gptq-int3-g64" in rows["gptq"]["presets"]
    assert rows["int"]["options"]["bits"] == "required"
    assert {name for row in rows.values() for name in row["presets"]} == set(presets())
    assert "2210.17323" in run("methods")


def test_doctor_measures_this_machine() -> None:
    said = run("doctor")
    assert torch.__version__ in said
    assert "GFLOP/s" in said


def test_export_makes_a_dense_folder(work: Path, packed: tuple[Path, str]) -> None:
    run("export", packed[0], "--format", "dense", "--out", work / "plain")
    assert "quantization_config" not in json.loads((work / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "DENSE", "--recipe", "gptq-int4-g46", "--out", "X"], "gptq-int4-g64"),
        (["compress", "NOWHERE/x", "--recipe", "rtn-int4-g64", "--out", "X"], "no model"),
        (["plan", "DENSE", "--recipe", "BAD"], "damping"),
        (["export", "DENSE", "--format", "dense", "--out", "X"], "dense already"),
        (
            ["export", "DENSE", "--format", "onyx", "--out", "X"],
            "known: awq, compressed-tensors, dense",
        ),
        (["compare", "DENSE"], "no report"),
        (["compare", "BAD"], "not a report"),
        (["evaluate", "DENSE", "--against", "DENSE", "--text", "EMPTY"], "no text"),
    ],
)
def test_mistakes_end_in_one_sentence(work: Path, arguments: list[str], words: str) -> None:
    (work / "bad.yaml").write_text("stages: [{solver: gptq, dampinq: 1, schemes: {'*': keep}}]")
    (work / "empty.txt").write_text("\n")
    places = {"DENSE": "dense", "NOWHERE": "nowhere", "BAD": "bad.yaml", "EMPTY": "empty.txt"}
    places["X"] = "x"
    where = [a.split("/")[0] for a in arguments]
    filled = [
        str(work / places[w]) if w in places else a for w, a in zip(where, arguments, strict=True)
    ]
    said = run(*filled, status=2)
    assert words in said
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not (work / "x").exists()


def test_usage_errors_are_the_parsers() -> None:
    assert "Usage" in run("compress", "demo", status=2)


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rarefy, "methods", broken)
    done = RUN.invoke(rarefy.cli.app, ["methods"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_interrupt_says_how_far_it_came_and_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, packed: tuple[Path, str]
) -> None:
    from rarefy.checkpoint.writer import Writer

    add = Writer.add

    def interrupted(self: Writer, part: str, *args: object) -> None:
        if part == "00001":
            raise KeyboardInterrupt
        add(self, part, *args)

    monkeypatch.setattr(Writer, "add", interrupted)
    said = run(*compress_command(work, work / "stopped"), status=130)
    assert "stopped after block 1 of 3; run the same command again to go on" in said
    assert not (work / "stopped").exists()
    monkeypatch.setattr(Writer, "add", add)
    run(*compress_command(work, work / "stopped"))
    file = "model.safetensors"
    assert (work / "stopped" / file).read_bytes() == (packed[0] / file).read_bytes()


def test_the_module_runs_and_pipes_get_no_control_sequences(work: Path) -> None:
    command = [sys.executable, "-m", "rarefy"]
    assert subprocess.check_output([*command, "--version"], text=True) == (
        f"rarefy {rarefy.__version__}\n"
    )
    compress = ["compress", work / "dense", "--recipe", "rtn-int4-g64", "--out", work / "piped"]
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PY_COLORS")}
    done = subprocess.run(
        [*command, *map(str, compress)], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"block 3 of 3" in done.stderr


def test_verbs_stay_verbs_after_their_subpackages_are_imported() -> None:
    import importlib

    for name in ("rarefy.evaluate.speed", "rarefy.export.dense", "rarefy.plan", "rarefy.methods"):
        importlib.import_module(name)
    verbs = ("compress", "evaluate", "compare", "plan", "methods", "export")
    assert all(callable(getattr(rarefy, verb)) for verb in verbs)


def test_trainings_count_steps(work: Path) -> None:
    recipe = work / "train.yaml"
    stage = {"tuner": "full", "steps": 3, "text": {"rows": 4, "length": 16}}
    recipe.write_text(yaml.safe_dump({"stages": [stage]}))
    said = run("compress", work / "dense", "--recipe", recipe, "--out", work / "trained",
               "--calibration", work / "text.jsonl", "--sequences", 4, "--length", 16)  # fmt: skip
    assert "step 3 of 3" in said
    assert "block 1 of 3" not in said
