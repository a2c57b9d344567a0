"""A whole leaderboard of a tiny model: what is written, what is reused, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from kicking import QUESTIONS, make, profile, run_here

import rarefy
from rarefy.errors import RarefyError
from rarefy.evaluate.journal import Journal
from rarefy.evaluate.records import read_records
from rarefy.kick import job, local, run
from rarefy.kick.run import Options
from rarefy.kick.spec import differences, read_spec

if TYPE_CHECKING:
    from pathlib import Path

# Dies in the scoring, at a moment that does not depend on the speed of the machine.
KILLED = """
import os, signal, sys
from pathlib import Path
from rarefy.evaluate.journal import Journal
from rarefy.kick import job

add, added = Journal.add, []

def die(*arguments):
    add(*arguments)
    added.append(1)
    if len(added) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = die
job.run(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("kick"))


def start(work: Path, out: Path, recipes: str = "round,prune,cut", **options: Any) -> Any:
    files = ",".join(str(work / f"{name}.yaml") for name in recipes.split(","))
    tasks = f"{work / 'quiz.jsonl'},{work / 'songs.jsonl'}"
    changes = options.pop("profile", {})
    return rarefy.kick(
        work / "dense", files, out, profile=profile(work, **changes),
        options=Options(tasks, threads=1, **options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(work: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_local", run_here)
        return start(work, work / "out")


def test_the_board_says_what_each_recipe_lost(made: Any) -> None:
    board = made.content
    entries = {entry["recipe"]: entry for entry in board["entries"]}
    assert list(entries) == ["round", "prune"]
    assert {t["name"]: t["items"] for t in board["tasks"]} == {
        "local_quiz": QUESTIONS, "local_songs": 4,
    }  # fmt: skip
    assert entries["round"]["role"] == "quantization"
    assert entries["round"]["cost"]["disk_bytes"] < board["dense"]["cost"]["disk_bytes"]
    assert entries["round"]["level"]["sparsity"] is None
    assert entries["prune"]["level"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert all(entry["quality"]["kl_mean"]["value"] > 0.01 for entry in entries.values())
    assert entries["round"]["tasks"]["local_quiz"]["flips"] is not None
    assert entries["round"]["tasks"]["local_songs"]["relative"] != 1
    assert board["comparisons"] == 2
    assert entries["prune"]["cost"]["compress_s"] > 0
    assert "size" in entries["round"]["tracks"]["inference consumption"]["ratios"]
    assert "float32" in board["reference"]


def test_the_dense_model_against_itself_loses_nothing(made: Any) -> None:
    dense = made.content["dense"]
    assert dense["quality"]["kl_mean"]["value"] == 0
    assert dense["lost"] == []
    flips = dense["tasks"]["local_quiz"]["flips"]
    assert (flips["lost"], flips["won"], flips["wrong_other"]) == (0, 0, 0)
    assert dense["tasks"]["local_songs"]["relative"] == 1
    assert dense["tasks"]["local_songs"]["dense"]["value"] > 0


def test_a_recipe_that_fails_stops_no_other(made: Any) -> None:
    [failed] = made.content["failed"]
    assert failed["recipe"] == "cut"
    assert "block" in failed["error"]
    assert not (made.path / "cut" / "result.json").exists()


def test_what_is_left_on_disk(made: Any) -> None:
    names = {file.name for file in (made.path / "round").iterdir()}
    steps = {"journal.jsonl", "records.jsonl", "quality.json", "cost.json", "result.json"}
    assert names == {"spec.json", "recipe.yaml", "quiz.jsonl", "songs.jsonl", "job.lock"} | steps
    assert json.loads((made.path / "leaderboard.json").read_text()) == made.content
    assert "<html" in (made.path / "leaderboard.html").read_text()
    assert "round" in (made.path / "leaderboard.md").read_text()


def test_a_second_start_runs_only_what_failed(
    work: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []

    def note(folders: Any, **options: Any) -> Any:
        began.extend(folder.name for folder in folders)
        return run_here(folders, **options)

    monkeypatch.setattr(run, "run_local", note)
    again = start(work, made.path)
    assert began == ["cut"]
    assert again.content | {"created": 0} == made.content | {"created": 0}


def test_another_configuration_is_refused_by_name(work: Path, made: Any) -> None:
    with pytest.raises(RarefyError, match=r"windows 2, now 3\).*--fresh"):
        start(work, made.path, profile={"windows": 3})
    with pytest.raises(RarefyError, match=r"another configuration \(another calibration\)"):
        start(work, made.path, seed=1)


def test_fresh_starts_anew(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_local", run_here)
    start(work, tmp_path, "round")
    (tmp_path / "round" / "mine.txt").write_text("in the job's folder")
    (tmp_path / "mine.txt").write_text("beside it")
    board = start(work, tmp_path, "round", fresh=True, keep=True, profile={"windows": 3})
    assert board.content["dense"]["quality"]["predictions"] == 3 * 63
    assert (tmp_path / "mine.txt").is_file()
    assert not (tmp_path / "round" / "mine.txt").exists()
    assert (tmp_path / "round" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "dense" / "model").exists()


def test_a_killed_job_repeats_nothing(
    work: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_local", lambda folders, **_: dict.fromkeys(folders, "not now"))
    with pytest.raises(RarefyError, match="dense model could not be measured: not now"):
        start(work, tmp_path, "round")
    folder = tmp_path / "round"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = ("quality.json", "model/model.safetensors")
    before = [(folder / name).stat().st_mtime_ns for name in kept]
    assert len((folder / "journal.jsonl").read_text().splitlines()) == 5
    asked: list[object] = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda *given: (asked.append(given), add(*given)))
    job.run(folder, keep=True)
    whole = (made.path / "round" / "journal.jsonl").read_text().splitlines()
    assert len(asked) == len(whole) - 5
    assert [(folder / name).stat().st_mtime_ns for name in kept] == before
    # Requests are batched otherwise than in one go, which moves the last digits.
    for one, other in zip(
        read_records(folder / "records.jsonl"),
        read_records(made.path / "round" / "records.jsonl"),
        strict=True,
    ):
        assert (one.task, one.item, one.choice) == (other.task, other.item, other.choice)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_job_is_a_process_that_says_why_it_failed(made: Any) -> None:
    told: list[tuple[object, ...]] = []
    outcome = local.run_local(
        [made.path / "cut"], workers=1, keep=False, tell=lambda *step: told.append(step)
    )
    assert outcome[made.path / "cut"] == made.content["failed"][0]["error"]
    assert told[0] == ("cut", "compress", 0, 1)


def test_why_a_process_ended(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("Traceback\nValueError: 3\n")
    assert local._trouble(1, tmp_path) == "ValueError: 3 (see job.log)"
    assert "SIGKILL; perhaps the memory was full" in local._trouble(-signal.SIGKILL, tmp_path)


def test_another_model_on_this_machine_is_refused(made: Any, work: Path, tmp_path: Path) -> None:
    spec = json.loads((made.path / "dense" / "spec.json").read_text())
    (tmp_path / "spec.json").write_text(json.dumps(spec | {"fingerprint": "0" * 32}))
    with pytest.raises(RarefyError, match="other weights than when the run was planned"):
        job.run(tmp_path)


def test_where_the_model_lies_does_not_matter(made: Any, tmp_path: Path) -> None:
    one = read_spec(made.path / "round")
    spec = json.loads((made.path / "round" / "spec.json").read_text()) | {"model": "elsewhere"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert read_spec(tmp_path).key == one.key
    assert differences(one, read_spec(made.path / "prune")) == (
        "recipe round, now prune; another source"
    )


def test_reports_are_not_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    report = job._Reporter()
    for done in range(101):
        report("score", done, 100)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["score", 0, 100]
    assert lines[-1] == ["score", 100, 100]
    assert len(lines) <= 4


def test_names_that_cannot_share_a_folder(work: Path, tmp_path: Path) -> None:
    for name in ("a b", "a:b"):
        (tmp_path / f"{name}.yaml").write_text((work / "round.yaml").read_text())
    (tmp_path / "dense.yaml").write_text((work / "round.yaml").read_text())
    options = Options(str(work / "quiz.jsonl"))
    for recipes, match in (("a*", "needs the folder of"), ("dense", "needs the folder of dense")):
        with pytest.raises(RarefyError, match=match):
            rarefy.kick(
                work / "dense", str(tmp_path / f"{recipes}.yaml"), tmp_path / "out",
                profile=profile(work), options=options,
            )  # fmt: skip
    assert not os.path.exists(tmp_path / "out")


def test_every_model_may_be_asked_with_dola(
    work: Path, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_local", run_here)
    with pytest.raises(RarefyError, match="--dola takes low or high layers, not 'middle'"):
        start(work, tmp_path / "x", dola="middle")
    board = start(work, tmp_path / "low", "round", dola="low").content
    assert board["profile"] == "tiny, DoLa low"
    assert board["dense"]["quality"] == made.content["dense"]["quality"]
    plain, contrasted = (
        [r.logprobs for r in read_records(out / "dense" / "records.jsonl") if r.logprobs]
        for out in (work / "out", tmp_path / "low")
    )
    assert plain != contrasted


def test_a_profile_may_limit_the_items(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_local", run_here)
    board = start(work, tmp_path / "few", "round", profile={"limit": 3}).content
    assert [task["items"] for task in board["tasks"]] == [3, 3]
