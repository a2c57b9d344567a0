"""The verb ``rarefy kick``: its options, its sentences, its exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kicking import make, profile, run_here
from typer.testing import CliRunner

import rarefy
import rarefy.cli
from rarefy.kick import profiles, run

if TYPE_CHECKING:
    from pathlib import Path

RUN = CliRunner(env={"COLUMNS": "200"})


def call(*arguments: object, status: int = 0) -> str:
    done = RUN.invoke(rarefy.cli.app, ["kick", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done.output


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["demo"], None),
        (["demo", "--ray"], ""),
        (["--ray", "--seed", "1", "demo"], ""),
        (["demo", "--ray", "10.0.0.1:6379"], "10.0.0.1:6379"),
        (["demo", "--ray=auto", "--keep"], "auto"),
    ],
)
def test_ray_may_stand_alone(
    arguments: list[str], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def kick(*_: object, options: Any, **__: object) -> None:
        seen.append(options.ray)
        raise rarefy.RarefyError("seen")

    monkeypatch.setattr(rarefy, "kick", kick)
    assert "seen" in call(*arguments, status=2)
    assert seen == [address]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DENSE", "--profile", "smok"], "did you mean 'smoke'"),
        (["DENSE", "--recipes", "nothing-*"], "no preset and no file"),
        (["DENSE", "--tasks", "nothing"], "no task matches"),
        (["DENSE", "--keep", "--ray"], "--keep is for local jobs"),
        (["DENSE/x/y"], "no model folder"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    make(tmp_path)
    filled = [a.replace("DENSE", str(tmp_path / "dense")) for a in arguments]
    said = call(*filled, "--out", tmp_path / "out", status=2)
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_prints_the_table_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(tmp_path)
    monkeypatch.setattr(run, "run_local", run_here)
    monkeypatch.setitem(profiles.PROFILES, "tiny", profile(work))
    table = tmp_path / "table.md"
    common = [work / "dense", "--profile", "tiny", "--tasks", work / "quiz.jsonl", "--threads", 1]
    common += ["--out", tmp_path / "out", "--markdown", table]
    said = call(*common, "--recipes", work / "round.yaml")
    assert "round" in said
    assert "leaderboard.html" in said
    assert table.read_text() == (tmp_path / "out" / "leaderboard.md").read_text()
    said = call(*common, "--recipes", f"{work / 'round.yaml'},{work / 'cut.yaml'}", status=1)
    assert "cut" in said
