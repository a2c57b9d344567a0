"""The figures of a leaderboard, from records made by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from rarefy.evaluate.damage import holm
from rarefy.evaluate.records import Record
from rarefy.evaluate.significance import mcnemar
from rarefy.kick.board import LOST, Finished, leaderboard
from rarefy.recipe import load_recipe
from rarefy.tasks.base import TaskInfo

COST = {
    "parameters": 1000, "nonzero": 500, "linear_parameters": 800, "disk_bytes": 4000,
    "bits_linear": 4.5, "compress_s": None, "compress_peak_bytes": None, "flops": 10,
    "peak_bytes": None, "decode_tok_s": None,
}  # fmt: skip
RESULT = {"cost": COST, "quality": {"kl_max": math.inf}, "machine": {}, "versions": {}}


def info(name: str, **changes: Any) -> TaskInfo:
    facts = {"title": name, "version": 1, "family": "choice", "kind": "choice", "metric": "acc"}
    return TaskInfo(**{"name": name, "source": "", "smoke": 1, **facts, **changes})


def answers(task: str, rights: int, of: int = 100) -> list[Record]:
    """The first ``rights`` of the items are answered rightly; four options each."""
    return [
        Record(
            task, f"{at:03}", f"{at:03}", float(at < rights), choice=0 if at < rights else 1,
            gold=0, logprobs=(-1.0, -2.0, -3.0, -4.0), question=f"q{at}", answer="a",
        )
        for at in range(of)
    ]  # fmt: skip


def job(recipe: str | None, *records: list[Record]) -> Finished:
    flat = [record for some in records for record in some]
    return Finished(load_recipe(recipe) if recipe else None, RESULT, flat)


def board(*others: Finished, infos: list[TaskInfo] | None = None) -> dict[str, Any]:
    dense = job(None, answers("a", 80), answers("b", 60), answers("c", 26))
    tasks = infos or [info("a"), info("b"), info("c", family="factoid")]
    return leaderboard({"model": "m"}, dense, others, tasks, {"early": "it failed"})


def test_holm_counts_every_recipe_and_task() -> None:
    wanda = job("wanda-50", answers("a", 70), answers("b", 57), answers("c", 26))
    prune = job("magnitude-50", answers("a", 20), answers("b", 60), answers("c", 20))
    made = board(wanda, prune)
    plain = [mcnemar(lost, 0) for lost in (10, 3, 0, 60, 0, 6)]
    assert made["comparisons"] == 6
    found = [entry["tasks"][t]["p_holm"] for entry in made["entries"] for t in ("a", "b", "c")]
    assert found == pytest.approx(holm(plain))
    assert made["dense"]["tasks"]["a"]["p_holm"] is None


def test_a_family_is_the_mean_of_tasks_that_can_show_damage() -> None:
    entry = board(job("wanda-50", answers("a", 40), answers("b", 54), answers("c", 0)))["entries"][
        0
    ]
    assert entry["families"] == {"choice": pytest.approx((0.5 + 0.9) / 2), "factoid": None}
    gone = board(job("wanda-50", answers("a", 0), answers("b", 60), answers("c", 26)))
    assert gone["entries"][0]["families"]["choice"] == pytest.approx(0.5)


def test_what_is_lost_is_listed_up_to_a_limit() -> None:
    entry = board(job("wanda-50", answers("a", 30), answers("b", 50), answers("c", 26)))["entries"][
        0
    ]
    assert len(entry["lost"]) == LOST
    assert {row["task"] for row in entry["lost"]} == {"a", "b"}
    assert entry["lost"][0]["question"].startswith("q")


def test_level_counts_zeros_only_of_recipes_that_prune() -> None:
    same = [answers("a", 80), answers("b", 60), answers("c", 26)]
    made = board(job("wanda-50", *same), job("rtn-int4-g64", *same))
    assert [entry["level"]["sparsity"] for entry in made["entries"]] == [0.625, None]
    assert made["entries"][1]["role"] == "quantization"


def test_a_result_that_cannot_be_compared_is_a_failed_recipe() -> None:
    good = job("wanda-50", answers("a", 80), answers("b", 60), answers("c", 26))
    short = job("magnitude-50", answers("a", 80, of=90), answers("b", 60), answers("c", 26))
    made = board(good, short)
    assert [entry["recipe"] for entry in made["entries"]] == ["wanda-50"]
    assert [row["recipe"] for row in made["failed"]] == ["early", "magnitude-50"]
    assert "same items" in made["failed"][1]["error"]


def test_no_number_that_json_does_not_know() -> None:
    made = board(job("wanda-50", answers("a", 80), answers("b", 60), answers("c", 26)))
    assert made["entries"][0]["quality"] == {"kl_max": None}


def test_a_missing_task_is_a_failed_recipe() -> None:
    half = dataclasses.replace(job("wanda-50", answers("a", 80)), records=answers("a", 80))
    made = board(half)
    assert made["entries"] == []
    assert made["failed"][-1]["recipe"] == "wanda-50"
