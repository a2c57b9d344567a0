"""Our way of asking the harness's tasks gives what the harness's own model class gives."""

from __future__ import annotations

import logging
import os
import socket

import pytest
import torch
import yaml
from tiny import SPECIAL, VOCAB, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rarefy.errors import RarefyError
from rarefy.evaluate import harness, tree
from rarefy.tasks import catalogue
from rarefy.tasks.base import TaskInfo

pytest.importorskip("lm_eval")

LONG = "the river runs down to the sea and the sea gives it back " * 12
DOCS = [
    {"question": "Where do rivers run?", "options": ["to the sea", "up", "to the moon"], "gold": 0},
    {"question": LONG, "options": ["the sea", "a", "the river and the moon"], "gold": 2},
    {"question": "Is water wet? ", "options": ["yes", "no"], "gold": 1},
    {"question": "", "options": ["sea", "moon", "the sea"], "gold": 1},
    {"question": "Which letter?", "options": ["A", "B", "C", "D"], "gold": 3},
]

UTILS = """
import datasets

DOCS = {docs!r}

def load(**_):
    rows = [
        dict(doc, id=f"item{{i}}", cluster=f"c{{i % 2}}", answer=doc["options"][doc["gold"]],
             starts=[o + " runs" for o in doc["options"]])
        for i, doc in enumerate(DOCS)
    ]
    return {{"test": datasets.Dataset.from_list(rows)}}

def length(doc, results):
    return {{"length": len(results[0]), "empty": results[0] == ""}}
"""

BASE = "custom_dataset: !function utils.load\ntest_split: test\n"


def metrics(*names):
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


CHOICE = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "options"}
TASKS = {
    "closed": {
        **CHOICE,
        "doc_to_text": "{{question}}",
        "metric_list": metrics("acc", "acc_norm"),
        "metadata": {"metric": "acc"},
    },
    "normed": {
        **CHOICE,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metric_list": metrics("acc", "acc_norm", "acc_bytes", "acc_mutual_info"),
        "metadata": {"metric": "acc_norm"},
    },
    "mutual": {
        **CHOICE,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "metric_list": metrics("acc", "acc_mutual_info"),
        "metadata": {"metric": "acc_mutual_info"},
    },
    "starts": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "starts",
        "doc_to_target": "down to the sea",
        "metric_list": metrics("acc"),
        "metadata": {"metric": "acc"},
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "The {{question}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        ],
        "metadata": {"metric": "bits_per_byte", "kind": "bits"},
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{options[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "process_results": "FUNCTION",
        "metric_list": metrics("length", "empty"),
        "metadata": {"metric": "length", "kind": "generate"},
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with merges, so that where a text is cut changes its tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([LONG, *(doc["question"] for doc in DOCS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "utils.py").write_text(UTILS.format(docs=DOCS))
    for name, config in TASKS.items():
        text = yaml.safe_dump({"task": name, **config, "metadata": {"version": 1}})
        (folder / f"{name}.yaml").write_text(
            BASE + text.replace("FUNCTION", "!function utils.length")
        )
    return folder


@pytest.fixture(autouse=True)
def our_pack(pack, monkeypatch):
    infos = {
        name: TaskInfo(
            **{"kind": "choice", "family": "choice", **config["metadata"]},
            name=name,
            title=name,
            version=1,
            source="made",
            smoke=1,
        )
        for name, config in TASKS.items()
    }
    monkeypatch.setattr(catalogue, "catalogue", lambda: infos)
    monkeypatch.setattr(catalogue, "pack_dir", lambda: pack)


def reference(model, tokenizer, pack, **options):
    """What the harness's own class says: rows by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=None)
    lm.get_model_info = dict
    manager = TaskManager(include_path=str(pack), include_defaults=False)
    with harness._quiet():
        results = simple_evaluate(
            model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
        )
    return results["samples"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_equals_the_harness_item_by_item(family, tokenizer, pack, tmp_path):
    _, model = tiny(family)
    records = harness.score(
        model, tokenizer, dict.fromkeys(TASKS), tmp_path / "j", batch_tokens=600
    )
    expected = reference(model, tokenizer, pack)
    assert [record.task for record in records] == [name for name in TASKS for _ in DOCS]
    for record in records:
        row = expected[record.task][int(record.item.removeprefix("item"))]
        assert record.item == row["doc"]["id"]
        if record.logprobs:
            logprobs = [logprob for logprob, _ in row["filtered_resps"]][: len(record.logprobs)]
            assert record.logprobs == pytest.approx(logprobs, abs=1e-3)
        if record.task == "text":
            logprob, size = row["bits_per_byte"]
            assert record.score == pytest.approx(-logprob / size / 0.6931472, abs=1e-4)
        else:
            assert record.metrics == {name: row[name] for name in row["metrics"]}
        if record.task == "written":
            assert record.output == row["resps"][0][0]


def test_the_choice_is_the_one_that_the_metric_judges(tokenizer, tmp_path):
    _, model = tiny("llama")
    records = harness.score(model, tokenizer, dict.fromkeys(TASKS), tmp_path / "j")
    ranked = [record for record in records if record.logprobs]
    assert len(ranked) == 4 * len(DOCS)
    for record in ranked:
        assert record.gold == DOCS[int(record.item[-1])]["gold"]
        assert record.score == (record.choice == record.gold)
    # Otherwise the test above would hold for any normalisation.
    by_task = {name: [r.choice for r in ranked if r.task == name] for name in TASKS}
    assert by_task["normed"] != by_task["mutual"]
    raw = [max(range(len(r.logprobs)), key=r.logprobs.__getitem__) for r in ranked]
    assert raw != [record.choice for record in ranked]


def test_what_a_reader_is_shown(tokenizer, tmp_path):
    _, model = tiny("llama")
    records = harness.score(model, tokenizer, {"normed": None, "written": 1}, tmp_path / "j")
    first, long, *_, last = records
    assert (first.question, first.answer) == ("Where do rivers run?", "to the sea")
    assert first.cluster == "c0" and long.cluster == "c1"
    assert long.question.startswith("the river runs") and len(long.question) <= 300
    # An item without a question shows the end of its prompt.
    assert records[3].question == "Question: Answer:"
    assert last.task == "written" and last.answer == "to the sea" and last.logprobs == ()


def test_the_number_of_items_is_per_task(tokenizer, tmp_path):
    _, model = tiny("llama")
    records = harness.score(
        model, tokenizer, {"closed": 2, "text": 99, "starts": 1}, tmp_path / "j"
    )
    assert [(r.task, r.item) for r in records] == [
        ("closed", "item0"),
        ("closed", "item1"),
        *(("text", f"item{i}") for i in range(len(DOCS))),
        ("starts", "item0"),
    ]


def test_after_a_kill_only_the_rest_is_asked(tokenizer, tmp_path):
    _, model = tiny("llama")
    whole = harness.score(model, tokenizer, dict.fromkeys(TASKS), tmp_path / "whole")

    def kill(what, done, total):
        if what == "answers" and done == 2:
            raise KeyboardInterrupt

    tasks, journal = dict.fromkeys(TASKS), tmp_path / "deep" / "journal"
    with pytest.raises(KeyboardInterrupt):
        harness.score(model, tokenizer, tasks, journal, progress=kill)
    journal.write_bytes(journal.read_bytes() + b'{"key": "abc')
    told, finished = [], len(journal.read_bytes().splitlines()) - 1
    progress = lambda *news: told.append(news)  # noqa: E731
    assert harness.score(model, tokenizer, tasks, journal, progress=progress) == whole
    asked = sum(what == "answers" and done > 0 for what, done, _ in told)
    assert ("answers", 2, 5) in told and asked == 4
    lines = len(journal.read_bytes().splitlines())
    assert lines == len((tmp_path / "whole").read_bytes().splitlines()) == finished + 3

    def never(*args, **kwargs):
        raise AssertionError("the model was asked again")

    model.forward = never
    assert harness.score(model, tokenizer, tasks, journal) == whole


def test_another_model_does_not_take_over_answers(tokenizer, tmp_path):
    _, model = tiny("llama")
    before = harness.score(model, tokenizer, {"closed": None}, tmp_path / "j")
    named = harness.score(model, tokenizer, {"closed": None}, tmp_path / "j", identity="x")
    assert named == before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 3
    after = harness.score(model, tokenizer, {"closed": None}, tmp_path / "j")
    assert [r.logprobs for r in after] != [r.logprobs for r in before]
    assert harness.score(model, tokenizer, {"closed": None}, tmp_path / "j", identity="x") == named


def test_the_head_is_called_as_a_module(tokenizer, pack, tmp_path):
    """Whatever replaces the head's output for a while also rules the fast path."""
    _, model = tiny("llama")
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out.roll(1, -1) * 2
    )
    records = harness.score(model, tokenizer, {"closed": None}, tmp_path / "j", identity="rolled")
    expected = reference(model, tokenizer, pack)["closed"]
    handle.remove()
    for record, row in zip(records, expected, strict=True):
        assert record.logprobs == pytest.approx([r[0] for r in row["filtered_resps"]], abs=1e-3)


def test_trees_are_used_where_they_work_and_the_plain_path_elsewhere(
    tokenizer, tmp_path, monkeypatch
):
    _, model = tiny("llama")
    calls, told = [], []
    batch = tree.score_batch
    monkeypatch.setattr(tree, "score_batch", lambda *args: calls.append(args) or batch(*args))
    fast = harness.score(model, tokenizer, {"closed": None}, tmp_path / "fast")
    assert len(calls) > 1
    calls.clear()
    monkeypatch.setattr(tree, "objection", lambda model: "a reason")
    progress = lambda *news: told.append(news)  # noqa: E731
    slow = harness.score(model, tokenizer, {"closed": None}, tmp_path / "slow", progress=progress)
    assert not calls and told[-1] == ("options, one by one: a reason", 15, 15)
    for one, other in zip(fast, slow, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_a_local_task_of_the_user(tokenizer, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"question": "Where?", "choices": ["here", "there"], "answer": 1}\n'
        '{"question": "When?", "choices": ["now", "never"], "answer": 0}\n'
    )
    info, config = catalogue.local_task(file)
    _, model = tiny("llama")
    tasks = {info.name: None, "text": 1}
    records = harness.score(model, tokenizer, tasks, tmp_path / "j", extra=[(info, config)])
    assert [r.task for r in records] == [info.name, info.name, "text"]
    assert [(r.gold, r.answer) for r in records[:2]] == [(1, "there"), (0, "now")]
    assert records[0].item != records[1].item


def test_silent_offline_and_without_traces(tokenizer, tmp_path, monkeypatch, capfd):
    _, model = tiny("llama")
    environment, level = dict(os.environ), logging.getLogger("lm_eval").level

    def refuse(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    harness.score(model, tokenizer, dict.fromkeys(TASKS), tmp_path / "j")
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert logging.getLogger("lm_eval").level == level


def extra(name, **changes):
    """A task as a user's, with a fault."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(catalogue.pack_dir()), include_defaults=False)
    config = manager.load([name])["tasks"][name].config.to_dict(keep_callable=True)
    return catalogue.catalogue()[name], {**config, **changes}


def test_bad_input_is_refused(tokenizer, tmp_path, monkeypatch):
    _, model = tiny("llama")

    def refused(match, tasks, extra=()):
        with pytest.raises(RarefyError, match=match):
            harness.score(model, tokenizer, tasks, tmp_path / "j", extra=extra)

    refused("no task called 'close'; did you mean 'closed'", {"close": None})
    refused("0 items of task closed", {"closed": 0})
    sampled = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    refused("written samples", {"written": 1}, [extra("written", generation_kwargs=sampled)])
    info, config = extra("closed")
    wrong = info.model_copy(update={"metric": "f1"})
    refused("gives acc, acc_norm but not its main metric f1", {"closed": 1}, [(wrong, config)])
    wide = extra("closed", doc_to_choice=["x" * 300, "y"])
    refused("the model reads 1 to 256", {"closed": 1}, [wide])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    refused("not numbers", {"closed": 1})
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused(r"pip install 'rarefy\[eval\]'", {"closed": 1})
