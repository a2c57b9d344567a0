"""The contract of a synthesizer: its level is enough and needed, and no call is made twice.

A method without an entry in ``SAMPLES`` is tried with its default options; an entry gives it
options that make it quick, and a script for teachers that only talk.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny import tiny, tiny_tokenizer

from rarefy.synthesis.base import SYNTHESIZERS, Synthesizer
from rarefy.synthesis.data_free import DataFree
from rarefy.synthesis.engine import Settings, Synthesis, synthesize
from rarefy.synthesis.fine_tune_cot import FineTuneCoT
from rarefy.synthesis.questions import Question
from rarefy.teachers.base import Level, TeacherCapabilityError
from rarefy.teachers.local import LocalTeacher
from rarefy.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = [Question(f"q{n}", f"What is {n}?", str(n)) for n in range(4)]
SAMPLES: dict[str, list[Synthesizer]] = {
    "fine-tune-cot": [FineTuneCoT(), FineTuneCoT(samples=3), FineTuneCoT(rationale=False)],
    "data-free": [DataFree(texts=9, max_length=8, batch=2)],
}
EVERY_SAMPLE = [
    pytest.param(method, id=f"{card.name} {i}")
    for card in SYNTHESIZERS
    for i, method in enumerate(SAMPLES.get(card.name, [card.cls()]))
]
every_sample = pytest.mark.parametrize("method", EVERY_SAMPLE)
KEYS = {"question", "sample", "teacher", "prompts", "finish_reasons"}


class Talker(ScriptedTeacher):
    """Answers with what was asked; counts, and may stop the run as a user would."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(self._say, "talker")
        self.count, self._stop_at = 0, stop_at

    def _say(self, ask: Any) -> str:
        if self.count == self._stop_at:
            raise KeyboardInterrupt
        self.count += 1
        number = ask.prompt.split("What is ")[1].split("?")[0]
        return f" {number}, by way {ask.sample}."


class Reader(LocalTeacher):
    """A tiny model that counts the rows it writes."""

    def __init__(self, level: Level, stop_at: int | None = None) -> None:
        _, model = tiny("llama")
        super().__init__(model, tiny_tokenizer(), "reader", level=level)
        self.count, self._stop_at = 0, stop_at

    def decode(self, ids: Any, choose: Any, max_length: int) -> list[list[int]]:
        rows = super().decode(ids, choose, max_length)
        if self._stop_at is not None and self.count >= self._stop_at:
            raise KeyboardInterrupt
        self.count += len(rows)
        return rows


def teacher_for(method: Synthesizer, stop_at: int | None = None) -> Any:
    """A teacher of exactly the level that the method declares."""
    if method.needs == Level.T0:
        return Talker(stop_at)
    return Reader(method.needs, stop_at)


def run(method: Synthesizer, teacher: Any, out: Path, **settings: Any) -> Synthesis:
    questions = QUESTIONS if method.asks else []
    return synthesize(method, teacher, questions, out, Settings(**settings))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def records(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "rows.jsonl").read_text() + (folder / "rejects.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


@every_sample
def test_the_declared_level_is_enough(method: Synthesizer, tmp_path: Path) -> None:
    made = run(method, teacher_for(method), tmp_path / "out")
    assert made.summary["rows"] > 0
    assert made.summary["rows"] + made.summary["rejects"] == len(records(made.path))
    assert set(content(made.path)) == {
        "rows.jsonl",
        "rejects.jsonl",
        "calls.jsonl",
        "summary.json",
    }
    assert json.loads((made.path / "summary.json").read_text()) == made.summary


@every_sample
def test_one_level_less_is_refused_before_any_call(method: Synthesizer, tmp_path: Path) -> None:
    if method.needs == Level.T0:
        pytest.skip("there is no level below")
    teacher = Reader(Level(method.needs - 1))
    with pytest.raises(TeacherCapabilityError) as info:
        run(method, teacher, tmp_path / "out")
    assert info.value.needed == method.needs
    assert teacher.count == 0
    assert list(tmp_path.iterdir()) == []


@every_sample
def test_every_record_says_where_it_comes_from(method: Synthesizer, tmp_path: Path) -> None:
    teacher = teacher_for(method)
    made = run(method, teacher, tmp_path / "out")
    seen = set()
    for record in records(made.path):
        source = record["provenance"]
        assert set(source) == KEYS
        assert source["teacher"] == (teacher.name if made.summary["calls"] else "")
        assert len(source["prompts"]) == len(source["finish_reasons"])
        assert bool(source["prompts"]) == bool(made.summary["calls"])
        assert (
            ("prompt" in record and "completion" in record)
            or "ids" in record
            or ("reason" in record)
        )
        seen.add((source["question"], source["sample"]))
    assert len(seen) == len(records(made.path))


@every_sample
@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_a_stopped_run_goes_on_without_repeating_a_call(
    method: Synthesizer, stop_at: int, tmp_path: Path
) -> None:
    whole = teacher_for(method)
    undisturbed = run(method, whole, tmp_path / "undisturbed")
    if whole.count <= stop_at:
        pytest.skip("it makes fewer calls")
    first = teacher_for(method, stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(method, first, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    second = teacher_for(method)
    made = run(method, second, tmp_path / "out")
    assert first.count + second.count == whole.count
    assert made.cached == first.count
    assert content(made.path) == content(undisturbed.path)


@every_sample
def test_it_repeats(method: Synthesizer, tmp_path: Path) -> None:
    one = run(method, teacher_for(method), tmp_path / "one")
    two = run(method, teacher_for(method), tmp_path / "two")
    assert content(one.path) == content(two.path)
    teacher = teacher_for(method)
    assert run(method, teacher, tmp_path / "one").reused
    assert teacher.count == 0
