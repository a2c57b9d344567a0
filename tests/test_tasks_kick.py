"""Question sets of LLM-KICK's families: what is shown to the model, and what must not be."""

from __future__ import annotations

import pytest

from rarefy.tasks import factoid, instruction, loaders, matching, retrieval, summary
from rarefy.tasks.catalogue import catalogue, pack_dir
from rarefy.tasks.scorers import contains, exact_match

ITEMS = {
    "rarefy_factoid_easy": 300,
    "rarefy_factoid_rank": 300,
    "rarefy_trivia": 200,
    "rarefy_trivia_rank": 200,
    "rarefy_squad_closed": 200,
    "rarefy_squad_open": 200,
    "rarefy_squad_closed_bits": 200,
    "rarefy_squad_open_bits": 200,
    "rarefy_wrong_context": 100,
    "rarefy_summary_wiki": 40,
    "rarefy_summary_news": 30,
    "rarefy_instruction": 60,
    "rarefy_instruction_checks": 40,
}


def test_wrong_choices_are_not_right_ones_in_disguise():
    others = ["Paris", "paris!", "The City of Light", "Light", "Rome", "rome", "Oslo", "Bern"]
    found = matching.options("Which?", ["City of Light", "Paris"], others, 9)
    assert sorted(found) == ["Bern", "City of Light", "Oslo", "Rome"]


def test_the_right_choice_has_no_place_of_its_own():
    others = [f"wrong{i}" for i in range(9)]
    places = {
        matching.options(f"question {i}?", ["right"], others, 9).index("right") for i in range(200)
    }
    assert places == set(range(10))


def test_orders_stay_the_same_for_ever():
    assert matching.shuffled("seed", "abcde") == list("aedcb")


def test_what_a_question_asks_for():
    assert matching.asks_for("In which city was he born?") == ("which", "city")
    assert matching.asks_for("Who?") == ("who", "")
    assert matching.asks_for("Name a river.") == ("", "")


def test_choices_are_alike_in_digits_and_words():
    others = ["1066", "a long answer of words", "William", "Harold Godwinson"]
    assert matching.alike("1914", others, 1) == ["1066"]
    assert matching.alike("Edward", others, 1) == ["William"]


def test_a_fact_whose_question_gives_it_away_is_left_out():
    fact = {"question": "What is the capital of Mexico?", "answers": ["Mexico City"]}
    assert factoid._given_away(fact)
    assert not factoid._given_away({**fact, "answers": ["Lima"]})


def test_no_right_answer_remains_in_a_passage_made_false():
    swap = retrieval._swap
    assert swap("Bern, not Berne. In Bern.", ["Bern"], "Oslo") == "Oslo, not Berne. In Oslo."
    assert swap("He saw New York and York.", ["York", "New York"], "Rome") == (
        "He saw Rome and Rome."
    )
    assert swap("The year was 1914 (MCMXIV).", ["1914", "mcmxiv"], "1815") == ""
    assert swap("Nothing to swap.", ["1914"], "1815") == ""


def test_a_text_that_repeats_its_summary_is_found():
    lead = "one two three four five six seven eight nine"
    assert matching.share(f"before it. One two, three {lead[14:]} after", lead)
    assert not matching.share("one two three four five six seven and eight nine", lead)


def test_a_text_is_cut_between_sentences():
    text = "One two three. Four five e.g. six. Seven eight."
    assert summary._first_sentences(text, 7) == "One two three. Four five e.g. six."
    assert summary._first_sentences(text, 1) == "One two three."


def test_checked_instructions_are_many_and_ask_for_something():
    rows = instruction.instruction_checks()
    assert len({row["id"] for row in rows}) == 40
    kinds = {c["kind"] for row in rows for c in row["constraints"]}
    assert kinds == set(instruction.CONSTRAINTS)
    demanding = {"include", "begin", "bullets", "end"}
    assert all(demanding & {c["kind"] for c in row["constraints"]} for row in rows)
    for row in rows:
        assert all(c["value"] in row["instruction"] for c in row["constraints"])


@pytest.fixture(scope="module")
def tasks():
    """The tasks as the harness builds them: rows, prompts and all."""
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(pack_dir()), include_defaults=False)
    return tasks.get_task_dict(list(ITEMS), manager)


def prompts(task):
    """Every row with all that the model is shown for it."""
    return [(doc, task.fewshot_context(doc, 0)) for doc in task.test_docs()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ITEMS)
def test_every_task_loads_with_its_items_and_scores_them(tasks, name):
    task, info = tasks[name], catalogue()[name]
    docs = list(task.test_docs())
    assert len({doc["id"] for doc in docs}) == len(docs) == ITEMS[name]
    assert info.metric in task.aggregation()
    results = {
        "choice": lambda doc: [(float(i == doc["gold"]), True) for i in range(len(doc["choices"]))],
        "bits": lambda doc: [(-1.0, True)],
        "generate": lambda doc: [doc.get("reference") or (doc.get("answers") or ["a b c d e"])[0]],
    }[info.kind]
    scores = [task.process_results(doc, results(doc)) for doc in docs]
    assert all(set(task.aggregation()) <= set(score) for score in scores)
    if info.family in ("factoid", "retrieval") and info.kind != "bits":
        assert {score[info.metric] for score in scores} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary_wiki", "instruction"])
def test_no_prompt_holds_its_reference(tasks, name):
    for doc, prompt in prompts(tasks[f"rarefy_{name}"]):
        assert not matching.share(prompt, doc["reference"])
        assert prompt.count(doc.get("text", doc.get("instruction"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factoid_easy", "factoid_rank"])
def test_no_question_holds_its_answer(tasks, name):
    for doc, prompt in prompts(tasks[f"rarefy_{name}"]):
        assert not contains(prompt, doc["answers"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factoid_rank", "trivia_rank"])
def test_one_choice_is_right(tasks, name):
    for doc, _ in prompts(tasks[f"rarefy_{name}"]):
        right = [choice for choice in doc["choices"] if exact_match(choice, doc["answers"])]
        assert right == [doc["choices"][doc["gold"]]]
        assert len(doc["choices"]) == 10 or doc["kind"] == "continent"


@pytest.mark.slow
def test_open_and_closed_book_ask_the_same_with_and_without_the_passage(tasks):
    closed, opened = (prompts(tasks[f"rarefy_squad_{book}"]) for book in ("closed", "open"))
    assert [doc["id"] for doc, _ in closed] == [doc["id"] for doc, _ in opened]
    for (doc, bare), (_, full) in zip(closed, opened, strict=True):
        asked = f"Question: {doc['question']}\nAnswer:"
        assert bare.endswith(f"\n\n{asked}") and doc["passage"] not in bare
        assert full.endswith(f"\n\nText: {doc['passage']}\n{asked}")
        assert contains(doc["passage"], doc["answers"])


@pytest.mark.slow
def test_a_false_passage_names_the_false_answer_only(tasks):
    for doc, prompt in prompts(tasks["rarefy_wrong_context"]):
        assert contains(doc["passage"], doc["answers"])
        assert not contains(doc["passage"], doc["true"])
        assert doc["passage"] in prompt


@pytest.mark.slow
def test_every_question_is_asked_once_and_the_mean_is_over_all(tasks):
    model, evaluator = (pytest.importorskip(f"lm_eval.{at}") for at in ("api.model", "evaluator"))
    answers = [row["answers"][0] for row in loaders.rows("facts")[:7]]
    asked: list[str] = []

    class Parrot(model.LM):
        """Answers the first three questions rightly and is silent afterwards."""

        def generate_until(self, requests):
            asked.extend(request.args[0] for request in requests)
            return [f" {answer}" if i < 3 else "" for i, answer in enumerate(answers)]

        loglikelihood = loglikelihood_rolling = None

    task = {"rarefy_factoid_easy": tasks["rarefy_factoid_easy"]}
    result = evaluator.evaluate(Parrot(), task, limit=7, bootstrap_iters=0)
    assert len(asked) == len(set(asked)) == 7
    assert result["results"]["rarefy_factoid_easy"]["contains,none"] == pytest.approx(3 / 7)
