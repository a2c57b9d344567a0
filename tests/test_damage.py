"""Damage against closed forms, hand-made examples and enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rarefy.errors import RarefyError
from rarefy.evaluate.damage import compare, holm, lost
from rarefy.evaluate.records import Record
from rarefy.evaluate.significance import mcnemar, mean, score
from rarefy.tasks.base import TaskInfo

INFO: dict[str, Any] = {
    "name": "t", "title": "T", "version": 1, "family": "choice", "kind": "choice",
    "metric": "acc", "source": "s", "smoke": 4,
}  # fmt: skip
CHOICE = TaskInfo(**INFO)
TEXT = TaskInfo(**{**INFO, "kind": "generate", "text": True})
BITS = TaskInfo(**{**INFO, "kind": "bits", "metric": "bits_per_byte", "higher": False})


def _choice(item: int, choice: int, gold: int = 0, sure: float = 1.0, cluster: str = "") -> Record:
    logprobs = tuple(sure if option == choice else 0.0 for option in range(4))
    return Record(
        "t", f"i{item:04}", cluster or f"i{item:04}", float(choice == gold), choice=choice,
        gold=gold, logprobs=logprobs, question=f"q{item}", answer=f"a{item}",
    )  # fmt: skip


def _scored(values: list[float], per_cluster: int = 1) -> list[Record]:
    return [Record("t", f"i{i:04}", f"c{i // per_cluster}", v) for i, v in enumerate(values)]


def _random_pair(count: int, seed: int = 0) -> tuple[list[Record], list[Record]]:
    rng = np.random.default_rng(seed)
    choices, moved = rng.integers(0, 4, count), rng.integers(0, 4, count)
    moved = np.where(rng.random(count) < 0.5, choices, moved)
    return [_choice(i, c) for i, c in enumerate(choices)], [
        _choice(i, c, sure=2.0) for i, c in enumerate(moved)
    ]


def test_dense_against_itself_is_at_no_distance():
    for info, records in (
        (CHOICE, _random_pair(50)[0]),
        (BITS, _scored([0.7, 1.3, 0.1 + 0.2, 2.2])),
        (TEXT, [replace(r, output="") for r in _scored([0.31, 0.0, 0.7])]),
    ):
        found = compare(records, list(reversed(records)), info)
        assert found.relative == 1
        assert found.matches
        assert found.difference.value == found.difference.low == found.difference.high == 0
        assert found.dense == found.score
        if info is CHOICE:
            assert found.flips.all_flips_percent == found.flips.lost == found.flips.won == 0
            assert found.p_value == 1
            assert found.choice_kl.value == found.choice_kl.high == 0
        if info is TEXT:
            assert found.agreement == {"rouge_l": 1.0, "chrf": 100.0, "identical": 1.0}


def test_flips_are_counted_by_hand():
    dense = [_choice(i, c) for i, c in enumerate([0, 0, 0, 1, 1, 1, 2, 3])]
    other = [_choice(i, c) for i, c in enumerate([0, 1, 2, 0, 1, 2, 2, 1])]
    flips = compare(dense, other, CHOICE).flips
    assert (flips.both, flips.lost, flips.won) == (1, 2, 1)
    assert (flips.wrong_same, flips.wrong_other) == (2, 2)
    assert flips.flips_percent == 100 * 3 / 8
    assert flips.all_flips_percent == 100 * 5 / 8


@pytest.mark.parametrize("seed", range(5))
def test_flips_add_up_and_explain_the_difference(seed):
    dense, other = _random_pair(137, seed)
    found = compare(dense, other, CHOICE)
    flips = found.flips
    parts = (flips.both, flips.lost, flips.won, flips.wrong_same, flips.wrong_other)
    assert sum(parts) == 137
    assert found.difference.value == pytest.approx((flips.won - flips.lost) / 137)
    assert found.score.value - found.dense.value == pytest.approx(found.difference.value)
    changed = sum(a.choice != b.choice for a, b in zip(dense, other, strict=True))
    assert flips.all_flips_percent == pytest.approx(100 * changed / 137)
    assert found.p_value == mcnemar(flips.lost, flips.won)


@pytest.mark.parametrize(("b", "c"), itertools.product(range(5), range(5)))
def test_mcnemar_equals_enumeration(b, c):
    """Of all ways in which b + c answers may flip, those at least as uneven as what was seen."""
    ways = list(itertools.product((-1, 1), repeat=b + c))
    uneven = sum(abs(sum(way)) >= abs(b - c) for way in ways)
    assert mcnemar(b, c) == pytest.approx(uneven / len(ways), abs=1e-15)


def test_mcnemar_closed_forms():
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 6) == mcnemar(6, 0) == 2 / 64
    assert mcnemar(1, 7) == 2 * (1 + 8) / 256
    assert 0 < mcnemar(400, 900) < 1e-40


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_never_reorders_and_never_shrinks():
    p = list(np.random.default_rng(3).random(30) ** 3)
    corrected = holm(p)
    order = np.argsort(p)
    assert all(np.diff(np.array(corrected)[order]) >= 0)
    assert all(1 >= c >= q for c, q in zip(corrected, p, strict=True))
    assert corrected[order[0]] == min(1, 30 * p[order[0]])


def test_wilson_interval():
    """Its ends are where the normal test of the proportion is just significant."""
    values = np.array([1.0] * 7 + [0.0] * 3)
    found = score(values, range(10))
    for end in (found.low, found.high):
        assert abs(0.7 - end) / math.sqrt(end * (1 - end) / 10) == pytest.approx(1.95996, abs=1e-4)
    none = score(np.zeros(10), range(10))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.2775, abs=1e-4)


def test_paired_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        dense = rng.random(40)
        other = dense - 0.1 + rng.normal(0, 0.3, 40)
        found = compare(_scored(list(dense)), _scored(list(other)), CHOICE).difference
        hits += found.low <= -0.1 <= found.high
    assert 0.90 <= hits / 150 <= 0.985


def test_pairing_narrows_and_clusters_widen_the_interval():
    rng = np.random.default_rng(1)
    passages = np.repeat(rng.normal(0, 1, 40), 10)
    dense = 5 + passages + rng.normal(0, 0.2, 400)
    other = dense + 0.1 * passages + rng.normal(0, 0.05, 400)
    alone = compare(_scored(list(dense)), _scored(list(other)), CHOICE)
    together = compare(_scored(list(dense), 10), _scored(list(other), 10), CHOICE)
    width = lambda e: e.high - e.low  # noqa: E731
    assert width(together.difference) > 2 * width(alone.difference)
    assert width(together.dense) > 2 * width(alone.dense)
    assert width(together.difference) < width(together.dense) / 5
    assert (alone.clusters, together.clusters, together.items) == (400, 40, 400)


def test_right_and_wrong_in_clusters_are_not_given_wilsons_interval():
    values = [float(i // 10 % 2) for i in range(200)]
    alone, together = (compare(r, r, CHOICE).dense for r in (_scored(values), _scored(values, 10)))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_one_cluster_has_no_interval():
    found = compare(_scored([0.5, 0.7], 9), _scored([0.5, 0.6], 9), CHOICE)
    assert found.difference.low is None
    assert not found.sensitive


def test_lower_is_better():
    found = compare(_scored([1.0, 1.0] * 5), _scored([1.0, 1.5] * 5), BITS)
    assert found.relative == 0.8
    assert found.difference.value == 0.25
    assert not found.matches
    assert found.sensitive
    assert compare(_scored([1.0, 1.0]), _scored([1.05, 1.05]), BITS).matches


def test_a_handful_of_items_can_show_nothing():
    assert compare(_scored([1.0] * 10), _scored([1.0] * 10), BITS).sensitive
    assert not compare(_scored([1.0] * 9), _scored([1.0] * 9), BITS).sensitive
    assert not compare(_scored([1.0] * 40, 9), _scored([1.0] * 40, 9), BITS).sensitive


@pytest.mark.parametrize(("right", "matches"), [(96, True), (95, True), (94, False)])
def test_matching_is_within_five_percent(right, matches):
    dense = _scored([1.0] * 100)
    other = _scored([1.0] * right + [0.0] * (100 - right))
    found = compare(dense, other, CHOICE)
    assert found.matches is matches
    assert found.relative == right / 100


def test_a_score_of_zero_has_no_ratio():
    found = compare(_scored([0.0, 0.0]), _scored([0.0, 1.0]), CHOICE)
    assert found.relative is None
    assert found.matches
    assert not found.sensitive


def test_headroom_is_judged_by_standard_errors():
    """At 28 right of 64 with four options, headroom and 3 standard errors are both 0.1875."""
    for right, sensitive in ((27, False), (29, True), (40, True), (16, False)):
        records = [_choice(i, 0 if i < right else 1) for i in range(64)]
        found = compare(records, records, CHOICE)
        assert found.chance == 0.25
        assert found.headroom == pytest.approx(right / 64 - 0.25)
        assert found.sensitive is sensitive


def test_choice_kl_by_hand():
    dense = replace(_choice(0, 0), logprobs=(math.log(0.2) - 9, math.log(0.6) - 9))
    other = replace(_choice(0, 0), logprobs=(-3.0, -3.0))
    found = compare([dense], [other], CHOICE)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.choice_kl.value == pytest.approx(expected)
    assert found.chance == 0.5


def test_flips_of_generated_answers():
    def said(*outputs: tuple[str, int]) -> list[Record]:
        return [Record("t", str(i), str(i), s, output=o) for i, (o, s) in enumerate(outputs)]

    flips = compare(
        said(("x", 1), ("y", 0), ("y", 0), ("z", 1)), said(("u", 0), ("y", 0), ("w", 0), ("z", 1)),
        TaskInfo(**{**INFO, "kind": "generate"}),
    ).flips  # fmt: skip
    assert (flips.both, flips.lost, flips.won) == (1, 1, 0)
    assert (flips.wrong_same, flips.wrong_other) == (1, 1)
    assert compare(_scored([0.5]), _scored([1.0]), CHOICE).flips is None


def test_text_agreement_uses_the_dense_output_as_reference():
    scorers = pytest.importorskip("rarefy.tasks.scorers")
    dense = [replace(r, output="the cat sat on the mat") for r in _scored([0.3, 0.4])]
    other = [dense[0], replace(dense[1], output="the cat sat")]
    found = compare(dense, other, TEXT).agreement
    expected = scorers.rouge("the cat sat", "the cat sat on the mat")["rouge_l"]
    assert 0 < expected < 1
    assert found["rouge_l"] == pytest.approx((1 + expected) / 2)
    assert found["identical"] == 0.5
    assert 50 < found["chrf"] < 100
    assert compare(dense, other, CHOICE).agreement is None


def test_other_metrics_are_averaged_over_the_items_that_have_them():
    dense = _scored([1.0, 1.0, 1.0])
    metrics = ({"acc": 1.0, "f1": 0.5}, {"acc": 1.0, "f1": 1.0}, {"acc": 1.0})
    other = [replace(r, metrics=m) for r, m in zip(dense, metrics, strict=True)]
    found = compare(dense, other, CHOICE).metrics
    assert list(found) == ["f1"]
    assert found["f1"].value == 0.75


def test_different_items_are_refused():
    dense = _scored([1.0, 0.0, 1.0])
    with pytest.raises(RarefyError, match=r"i0002 of t is in one list only"):
        compare(dense, dense[:2], CHOICE)
    with pytest.raises(RarefyError, match="twice"):
        compare([*dense, dense[0]], dense, CHOICE)
    with pytest.raises(RarefyError, match="other options"):
        compare(dense, [replace(r, logprobs=(0.0,)) for r in dense], CHOICE)
    with pytest.raises(RarefyError, match="no record of t"):
        compare([], [], CHOICE)


def test_records_of_other_tasks_are_left_out():
    dense = _scored([1.0, 0.0])
    found = compare(dense, [*dense, replace(dense[0], task="u")], CHOICE)
    assert found.items == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ruined_model_is_named(bad):
    dense = [_choice(0, 0), _choice(1, 0)]
    with pytest.raises(RarefyError, match="score of t is not a finite"):
        compare(dense, [replace(r, score=bad) for r in dense], CHOICE)
    with pytest.raises(RarefyError, match="no finite log-probability"):
        compare(dense, [replace(r, logprobs=(bad, 0.0, 0.0, 0.0)) for r in dense], CHOICE)


def test_lost_answers_come_surest_first_and_tasks_take_turns():
    dense = [_choice(i, 0, sure=s) for i, s in enumerate([1.0, 3.0, 2.0, 9.0])]
    other = [_choice(i, c) for i, c in enumerate([1, 2, 3, 0])]
    one = replace(dense[0], task="a", item="z", output="Paris")
    gone = replace(one, score=0.0, output="Rome")
    found = lost([*dense, one], [*other, gone], 3)
    assert [(x.task, x.question) for x in found] == [("a", "q0"), ("t", "q1"), ("t", "q2")]
    assert (found[0].dense, found[0].this) == ("Paris", "Rome")
    assert (found[1].answer, found[1].dense, found[1].this) == ("a1", "a1", "option 3")
    assert lost([*dense, one], [*other, gone], 99)[-1].question == "q0"
    assert lost(dense, dense, 5) == []


def test_mean_is_the_mean_of_items_not_of_clusters():
    found = mean(np.array([1.0, 1.0, 1.0, 0.0]), [0, 0, 0, 1])
    assert found.value == 0.75
