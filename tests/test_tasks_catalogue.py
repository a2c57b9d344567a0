"""The task files: their facts, and what the harness makes of them, without any network."""

from __future__ import annotations

import json
import math
import socket
from statistics import mean

import pytest

from rarefy.errors import RarefyError
from rarefy.tasks import loaders
from rarefy.tasks.catalogue import catalogue, local_task, pack_dir, profile
from rarefy.tasks.loaders import row

pytest.importorskip("lm_eval", reason="needs rarefy[eval]")

MMLU = [
    row(
        {"question": f"Question {n}?", "choices": [f"{n}a", f"{n}b", f"{n}c", f"{n}d"], "gold": n},
        subject="high school physics",
    )
    for n in range(4)
]


@pytest.fixture
def offline(monkeypatch):
    """Nothing may be asked of the network."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def given(monkeypatch, offline):
    """Return a function that sets the rows of every set of items."""

    def give(rows):
        monkeypatch.setattr(loaders, "_rows", lambda _: tuple(rows))

    return give


def evaluate(tasks, prefer):
    """Run the harness with a model that finds likely what ``prefer(context, continuation)`` is."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Oracle(LM):
        def loglikelihood(self, requests):
            likely = [prefer(*request.args) for request in requests]
            return [(-1.0, True) if yes else (-9.0, False) for yes in likely]

        def loglikelihood_rolling(self, requests):
            return [-math.log(2) * 3 * len(request.args[0]) for request in requests]

        def generate_until(self, requests):
            return [prefer(*request.args) for request in requests]

    return simple_evaluate(
        Oracle(),
        tasks=tasks,
        task_manager=TaskManager(include_path=str(pack_dir()), include_defaults=False),
        bootstrap_iters=0,
    )


def prompts(results, task):
    """What was asked, as pairs of context and continuation by item."""
    return [[tuple(one) for one in item["arguments"]] for item in results["samples"][task]]


def test_the_facts_of_every_task_are_complete_and_consistent():
    known = catalogue()
    assert {"rarefy_mmlu", "rarefy_sciq_open", "rarefy_lambada", "rarefy_mbpp_gold"} <= set(known)
    for name, info in known.items():
        assert name == info.name
        assert name.startswith("rarefy_")
        assert (pack_dir() / f"{name.removeprefix('rarefy_')}.yaml").is_file()
        assert info.higher or info.kind == "bits"
    assert known["rarefy_sciq"].partner == "rarefy_sciq_open"
    assert not known["rarefy_gsm8k_gold"].higher


def test_profiles_name_tasks_and_their_sizes():
    full, smoke = profile("full"), profile("smoke")
    assert set(full) == set(catalogue())
    assert set(full.values()) == {None}
    assert smoke == {name: info.smoke for name, info in catalogue().items() if info.smoke}
    assert len(smoke) >= 5
    assert "rarefy_boolq" not in smoke
    with pytest.raises(RarefyError, match="did you mean 'smoke'"):
        profile("smok")


def test_mmlu_s_header_has_single_spaces_and_letters_mean_their_lines(given):
    # Published code put two spaces before the subject.
    given(MMLU)
    results = evaluate(["rarefy_mmlu"], lambda _, letter: letter == " C")
    contexts = [{context for context, _ in item} for item in prompts(results, "rarefy_mmlu")]
    assert contexts[2] == {
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Question 2?\nA. 2a\nB. 2b\nC. 2c\nD. 2d\nAnswer:"
    }
    assert [answer for _, answer in prompts(results, "rarefy_mmlu")[0]] == [" A", " B", " C", " D"]
    rights = [sample["acc"] for sample in results["samples"]["rarefy_mmlu"]]
    assert rights == [0, 0, 1, 0]  # the third question's answer is its third line
    assert results["results"]["rarefy_mmlu"]["acc,none"] == 0.25


def test_answer_texts_are_ranked_by_their_length_too(given):
    given([row({"question": "Which?", "choices": ["no", "a much longer answer"], "gold": 1})])
    results = evaluate(["rarefy_mmlu_cloze"], lambda _, text: text == " no")
    scores = results["results"]["rarefy_mmlu_cloze"]
    assert (scores["acc,none"], scores["acc_norm,none"]) == (0, 1)  # -1 / 2 < -9 / 20
    assert prompts(results, "rarefy_mmlu_cloze")[0][0] == ("Question: Which?\nAnswer:", " no")


def test_open_and_closed_book_ask_the_same_items(given):
    item = row({"question": "Who?", "choices": ["x", "y"], "gold": 1}, support="It was y.")
    given([item])
    results = evaluate(
        ["rarefy_sciq", "rarefy_sciq_open"], lambda context, text: text[1:] in context
    )
    shut, opened = results["samples"]["rarefy_sciq"][0], results["samples"]["rarefy_sciq_open"][0]
    assert shut["doc"]["id"] == opened["doc"]["id"] == item["id"]
    assert "It was y." not in shut["arguments"][0][0]
    assert opened["acc"] == 1


def test_winogrande_scores_one_ending_after_two_contexts(given):
    item = {"choices": ["Ann met Bo as Ann", "Ann met Bo as Bo"], "ending": ", it seems, left."}
    given([row({**item, "gold": 1})])
    results = evaluate(["rarefy_winogrande"], lambda context, _: context.endswith("Bo"))
    assert results["results"]["rarefy_winogrande"]["acc,none"] == 1
    assert prompts(results, "rarefy_winogrande")[0] == [
        ("Ann met Bo as Ann", ", it seems, left."),
        ("Ann met Bo as Bo", ", it seems, left."),
    ]


def test_entailment_and_sentiment_are_not_inverted(given):
    # Published code counted "entails" as wrong and showed negative demos as positive.
    pair = {"premise": "It rains.", "hypothesis": "It is wet."}
    given([row({**pair, "gold": 0}, noisy_premise="p", noisy_hypothesis="h")])
    results = evaluate(["rarefy_rte", "rarefy_rte_noisy"], lambda _, word: word == " True")
    assert results["results"]["rarefy_rte"]["acc,none"] == 1
    assert prompts(results, "rarefy_rte_noisy")[0][0][0].startswith("p\nQuestion: h True or False?")
    given([row({"sentence": "A fine film.", "gold": 1})])
    results = evaluate(["rarefy_sst2"], lambda _, word: word == " positive")
    assert results["results"]["rarefy_sst2"]["acc,none"] == 1


def test_bits_are_counted_on_the_target_s_bytes(given):
    given([row({"prompt": "It is a", "target": " bää"}), row({"prompt": "One", "target": " two"})])
    results = evaluate(["rarefy_lambada"], lambda _, word: word == " bää")
    first, second = results["samples"]["rarefy_lambada"]
    assert prompts(results, "rarefy_lambada")[0] == [("It is a", " bää")]
    assert (first["acc"], second["acc"]) == (1, 0)
    assert [tuple(one["bits_per_byte"]) for one in (first, second)] == [(-1, 6), (-9, 4)]
    scores = results["results"]["rarefy_lambada"]
    assert scores["acc,none"] == 0.5
    assert scores["bits_per_byte,none"] == pytest.approx(10 / math.log(2) / 10)


def test_the_denominator_is_the_number_of_items(given):
    # Published code asked N + 1 questions and divided by N.
    given(MMLU)
    results = evaluate(["rarefy_mmlu"], lambda _, letter: letter == " A")
    assert results["n-samples"]["rarefy_mmlu"] == {"original": 4, "effective": 4}
    samples = results["samples"]["rarefy_mmlu"]
    assert [sample["doc"]["id"] for sample in samples] == [one["id"] for one in MMLU]
    assert results["results"]["rarefy_mmlu"]["acc,none"] == mean(one["acc"] for one in samples)


def written(tmp_path, *rows):
    path = tmp_path / "my quiz.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    return path


def test_a_user_s_options_are_ranked(tmp_path, offline):
    asked = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    info, config = local_task(written(tmp_path, *([{**asked, "cluster": "sums"}] * 2)))
    assert (info.name, info.kind, info.metric) == ("local_my_quiz", "choice", "acc_norm")
    results = evaluate([config], lambda _, text: text == " 4")
    assert results["results"]["local_my_quiz"]["acc,none"] == 1
    (sample,) = results["samples"]["local_my_quiz"]  # asked once, though it is there twice
    assert sample["doc"]["cluster"] == "sums"


def test_a_user_s_questions_are_answered_freely(tmp_path, offline):
    answers = {"What is the capital of France?": " It is Paris.\nQuestion:", "Who?": ""}
    path = written(
        tmp_path, *({"question": q, "answers": ["Paris", "City of Paris"]} for q in answers)
    )
    info, config = local_task(path)
    assert (info.kind, info.metric) == ("generate", "contains")
    results = evaluate(
        [config], lambda context, _: next(a for q, a in answers.items() if q in context)
    )
    first, empty = results["samples"]["local_my_quiz"]
    assert (first["contains"], first["exact_match"]) == (1, 0)
    assert empty["contains"] == empty["exact_match"] == empty["f1"] == 0


def test_a_user_s_texts_cost_bits(tmp_path, offline):
    info, config = local_task(written(tmp_path, {"text": "some text"}, {"text": "{{more}} text"}))
    assert (info.kind, info.higher) == ("bits", False)
    results = evaluate([config], None)
    assert results["results"]["local_my_quiz"]["bits_per_byte,none"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "no choice 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "b"}', "line 2 .* answer"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0, "gold": 1}', "gold"),
        ('{"text": "t"}', "line 2"),
        ("not JSON", "line 2"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, line, said):
    path = written(tmp_path, {"question": "q", "choices": ["a", "b"], "answer": 0})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RarefyError, match=said):
        local_task(path)


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(RarefyError, match="has no rows"):
        local_task(written(tmp_path))
    with pytest.raises(RarefyError, match="none of the keys"):
        local_task(written(tmp_path, {"prompt": "p"}))
    with pytest.raises(RarefyError, match="cannot be read"):
        local_task(tmp_path / "absent.jsonl")


@pytest.mark.slow
@pytest.mark.network
def test_every_task_loads_its_frozen_items():
    from lm_eval.tasks import TaskManager

    from rarefy.tasks.frozen import frozen_ids

    manager = TaskManager(include_path=str(pack_dir()), include_defaults=False)
    tasks = manager.load(list(catalogue()))["tasks"]
    for name, info in catalogue().items():
        docs = list(tasks[name].eval_docs)
        assert [doc["id"] for doc in docs] == frozen_ids(tasks[name].config.dataset_kwargs["items"])
        assert len({doc["id"] for doc in docs}) == len(docs) >= max(info.smoke, 30), name
        assert info.metric in tasks[name].aggregation(), name
        bits = tasks[name].aggregation().get("bits_per_byte")
        assert bits is None or bits([(-math.log(2), 1), (-math.log(2), 3)]) == 0.5, name
        assert tasks[name].higher_is_better()[info.metric] == info.higher, name
        if info.kind == "choice" and name != "rarefy_winogrande":
            options = [tasks[name].doc_to_choice(doc) for doc in docs]
            golds = [tasks[name].doc_to_target(doc) for doc in docs]
            assert all(gold in range(len(o)) for gold, o in zip(golds, options, strict=True)), name
            assert len({*golds}) > 1, name  # no place that is always right


@pytest.mark.slow
@pytest.mark.network
def test_labels_mean_what_the_prompts_say_on_the_real_rows():
    praise, blame = {"charming", "wonderful", "moving", "fun"}, {"dull", "bad", "fails", "mess"}
    for words, gold in ((praise, 1), (blame, 0)):
        found = [
            r["gold"] for r in loaders.source("sst2").load() if words & {*r["sentence"].split()}
        ]
        assert len(found) > 20
        assert mean(one == gold for one in found) > 0.7

    def shared(pair):
        premise, hypothesis = ({*pair[key].lower().split()} for key in ("premise", "hypothesis"))
        return len(premise & hypothesis) / len(hypothesis)

    pairs = loaders.rows("rte")
    entailed, other = ([shared(p) for p in pairs if p["gold"] == gold] for gold in (0, 1))
    assert mean(entailed) > mean(other) + 0.05


@pytest.mark.slow
@pytest.mark.network
def test_mmlu_asks_six_of_every_subject_and_any_first_57_one_of_each():
    subjects = [one["cluster"] for one in loaders.rows("mmlu")]
    assert len({*subjects}) == len({*subjects[:57]}) == 57
    assert {subjects.count(subject) for subject in {*subjects}} == {6}
