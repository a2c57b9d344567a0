"""Scorers of generated text. The first tests are named after faults of published scorers."""

from __future__ import annotations

import math

import pytest

from rarefy.errors import RarefyError
from rarefy.tasks import scorers
from rarefy.tasks.constraints import CONSTRAINTS, met
from rarefy.tasks.pack import scoring

EMPTY = ["", "  \n", "...", "\n\nParis"]
FACT = {"question": "What is the capital of France, if not Paris?", "answers": ["Paris"]}
PAIR = [{"kind": "lower_case", "value": ""}, {"kind": "no_commas", "value": ""}]


@pytest.mark.parametrize("output", EMPTY)
def test_an_empty_answer_never_scores(output):
    assert set(scoring.short_answer(FACT, [output]).values()) == {0}


@pytest.mark.parametrize("output", EMPTY[:3])
def test_an_empty_text_never_scores(output):
    assert set(scoring.referenced({"reference": "It is Paris."}, [output]).values()) == {0}
    assert set(scoring.text({}, [output]).values()) == {0}
    assert set(scoring.constraints_met({"constraints": PAIR}, [output]).values()) == {0}
    for kind in CONSTRAINTS:
        assert met(output, [{"kind": kind, "value": "0"}]) == [False]


def test_nothing_matches_an_answer_that_is_empty():
    assert scorers.contains("anything", ["", "?"]) == 0
    assert scorers.exact_match("", [""]) == 0


def test_the_prompt_is_never_searched_for_the_answer():
    assert set(scoring.short_answer(FACT, ["I do not know."]).values()) == {0}
    assert scoring.short_answer(FACT, ["Surely Paris."])["contains"] == 1


def test_what_follows_the_first_line_is_not_searched_either():
    assert scoring.short_answer(FACT, ["Rome\nQuestion: Is it Paris?"])["contains"] == 0


def test_words_match_whole_and_spaces_are_not_deleted():
    assert scorers.contains("such advice", ["Chad"]) == 0
    assert scorers.contains("a Romanian", ["Roman", "Oman"]) == 0
    assert scorers.contains("It is Chad!", ["Chad"]) == 1


def test_a_fragment_of_the_answer_does_not_count():
    assert scorers.contains("York", ["New York"]) == 0


def test_every_alias_counts():
    aliases = ["Kyiv", "Kiev"]
    for score in (scorers.contains, scorers.exact_match, scorers.token_f1):
        assert [score(output, aliases) for output in ("Kyiv", "kiev.", "Lviv")] == [1, 1, 0]


def test_the_share_of_constraints_is_over_all_constraints():
    doc = {"constraints": [*PAIR, {"kind": "include", "value": "bees"}]}
    scores = scoring.constraints_met(doc, ["nothing about them, sadly"])
    assert scores == {"share_met": 1 / 3, "all_met": 0}


def test_normalise():
    assert scorers.normalise("  The_Old  Bogotá, N'Djamena! ") == "old bogota n djamena"
    assert scorers.normalise("A") == "a"


def test_exact_match_needs_all_of_the_answer_and_nothing_else():
    assert scorers.exact_match("the Paris.", ["Paris"]) == 1
    assert scorers.exact_match("Paris, of course", ["Paris"]) == 0


def test_f1_counts_repeated_words_once_for_each_time_they_are_wanted():
    assert scorers.token_f1("paris paris paris", ["Paris"]) == pytest.approx(0.5)
    assert scorers.token_f1("new york city", ["York", "New York"]) == pytest.approx(0.8)


def test_overlap_with_a_reference():
    assert scorers.rouge("a b c d", "a b x c") == pytest.approx(
        {"rouge1": 0.75, "rouge2": 1 / 3, "rouge_l": 0.75}
    )
    assert scorers.chrf("the same", "the same") == pytest.approx(1)
    assert 0 < scorers.chrf("the same", "the sane") < 1


def test_repetition():
    assert scorers.distinct("a b a b", 1) == 0.5
    assert scorers.distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert scorers.repeated_ngrams("a b c d a b c d a b c d") == pytest.approx(5 / 9)
    assert scorers.repeated_ngrams("one two three") == 0
    assert scorers.repeated_ngrams("") == 1
    assert scorers.unique_tokens("A cat, a dog") == 3


OBEYED = {
    "at_most": ("4", "one two three four", "one two three four five"),
    "at_least": ("4", "one two three four", "one two three"),
    "lower_case": ("", "all of it low", "All of it low"),
    "upper_case": ("", "ALL OF IT, HIGH", "ALL OF IT high"),
    "include": ("bees", "here are Bees.", "here are beeswax candles"),
    "avoid": ("is", "this and that thing", "this is a thing"),
    "bullets": ("2", "- one thing\n- two things", "- one\n- two\n- three"),
    "end": ("that is all", "one two. That is all.", "that is all, or not"),
    "begin": ("Today", "Today it rained.", "It rained today."),
    "no_commas": ("", "one and two", "one, two, three"),
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_constraint_tells_obeyed_from_broken(kind):
    value, good, bad = OBEYED[kind]
    assert met(good, [{"kind": kind, "value": value}]) == [True]
    assert met(bad, [{"kind": kind, "value": value}]) == [False]


def test_one_word_for_ever_obeys_nothing():
    doc = {"constraints": [*PAIR, {"kind": "at_least", "value": "5"}]}
    assert scoring.constraints_met(doc, ["the " * 40])["share_met"] == 0


def test_an_unknown_constraint_is_refused():
    with pytest.raises(RarefyError, match="rhyme"):
        met("some text here", [{"kind": "rhyme", "value": ""}])


def ranked(*logprobs, gold=1):
    doc = {"choices": ["aa", "bbbb", "cc"], "gold": gold}
    return scoring.ranked(doc, [(logprob, False) for logprob in logprobs])


def test_the_place_of_the_right_choice():
    assert ranked(-3.0, -2.0, -4.0) == {"acc": 1, "acc_norm": 1, "mrr": 1}
    assert ranked(-3.0, -4.0, -5.0) == {"acc": 0, "acc_norm": 1, "mrr": 0.5}
    assert ranked(-1.0, -9.0, -1.0) == {"acc": 0, "acc_norm": 0, "mrr": pytest.approx(1 / 3)}


def test_of_equal_choices_the_first_is_chosen():
    assert [ranked(-2.0, -2.0, -2.0, gold=gold)["acc"] for gold in range(3)] == [1, 0, 0]


def test_a_model_that_gives_no_numbers_ranks_the_right_choice_last():
    assert ranked(math.nan, math.nan, math.nan)["mrr"] == pytest.approx(1 / 3)
    assert ranked(-1.0, math.nan, -2.0)["acc"] == 0
