"""Synthesizers: exact counts of Fine-tune-CoT, data-free text, answers, rows and the engine."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from tiny import tiny, tiny_tokenizer

from rarefy.data import corpora
from rarefy.errors import RarefyError
from rarefy.synthesis.answers import Extractor, Reason
from rarefy.synthesis.data_free import DataFree, beginnings
from rarefy.synthesis.engine import Settings, synthesize
from rarefy.synthesis.fine_tune_cot import FineTuneCoT
from rarefy.synthesis.questions import Question, read_questions
from rarefy.synthesis.rows import read_rows, token_rows
from rarefy.teachers.base import Answer, Level, Sampling, TeacherCapabilityError
from rarefy.teachers.local import LocalTeacher
from rarefy.teachers.scripted import ScriptedTeacher

# Right answers that occur in no question.
QUESTIONS = [Question(f"q{n}", f"What is {n} and much more?", f"{7000 + n}.50") for n in range(50)]
SAMPLES, RIGHT = 8, 5


class Reasoner(ScriptedTeacher):
    """Right in the first five of eight samples; the answer follows from the rationale alone."""

    def __init__(self, right=RIGHT, same=False):
        super().__init__(self._say, "reasoner")
        self.prompts, self.asks = [], []
        self._right, self._same = right, same

    def _say(self, ask):
        self.prompts.append(ask.prompt)
        self.asks.append(ask)
        number = int(ask.prompt.split("What is ")[1].split()[0])
        if "Therefore" in ask.prompt:
            sample = int(ask.prompt.split("way ")[1].split()[0])
            return f" ${7000 + number + (sample >= self._right):,}.5, surely. Or 3?"
        return f" I see {number} my way {0 if self._same else ask.sample} and go on."


def local(**overrides):
    _, model = tiny("llama", **overrides)
    return LocalTeacher(model, tiny_tokenizer(), "tiny")


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_fine_tune_cot_makes_exactly_the_rows_of_the_right_samples(tmp_path):
    teacher = Reasoner()
    made = synthesize(FineTuneCoT(samples=SAMPLES), teacher, QUESTIONS, tmp_path / "out")
    assert len(teacher.prompts) == made.calls == made.summary["calls"] == 800
    rows, rejects = (
        lines(tmp_path / "out" / "rows.jsonl"),
        lines(tmp_path / "out" / "rejects.jsonl"),
    )
    assert len(rows) == made.summary["rows"] == 250
    assert made.summary["kept_per_question"] == {question.id: 5 for question in QUESTIONS}
    assert Counter(row["provenance"]["question"] for row in rows) == {q.id: 5 for q in QUESTIONS}
    assert made.summary["distinct_completions"] > 0.9
    assert rows[6] == {
        "prompt": "What is 1 and much more? ###",
        "completion": " I see 1 my way 1 and go on. --> 7001.50 END",
        "provenance": {
            "question": "q1",
            "sample": 1,
            "teacher": "reasoner",
            "prompts": rows[6]["provenance"]["prompts"],
            "finish_reasons": ["stop", "stop"],
        },
    }
    assert len(rejects) == made.summary["rejects"] == 150
    assert made.summary["reasons"] == {Reason.WRONG_ANSWER: 150}
    assert {reject["provenance"]["sample"] for reject in rejects} == {5, 6, 7}
    assert rejects[0]["reason"] == "the answer is wrong"
    assert rejects[0]["found"] == "7001.5"
    assert lines(tmp_path / "out" / "calls.jsonl")[0]["request"]["sampling"]["temperature"] == 0.7


def test_the_second_prompt_holds_the_first_and_its_answer_verbatim(tmp_path):
    teacher = Reasoner()
    synthesize(FineTuneCoT(samples=2), teacher, QUESTIONS[:3], tmp_path / "out")
    first, second = teacher.asks[:6], teacher.asks[6:]
    for ask, then in zip(first, second, strict=True):
        question = ask.prompt.removeprefix("Q: ").split("\n")[0]
        assert ask.prompt == f"Q: {question}\nA: Let's think step by step."
        rationale = teacher._say(ask)
        assert then.prompt == f"{ask.prompt}{rationale}\nTherefore, the answer is"
        assert then.sample == ask.sample
    digests = {row["request"]["prompt"] for row in lines(tmp_path / "out" / "calls.jsonl")}
    assert digests == {ask.prompt for ask in teacher.asks[:12]}


def test_equal_rationales_show_in_the_summary(tmp_path):
    method = FineTuneCoT(samples=SAMPLES)
    made = synthesize(method, Reasoner(same=True), QUESTIONS, tmp_path / "out")
    assert made.summary["rows"] == 400
    assert made.summary["distinct_completions"] == 1 / 8


def test_a_local_teacher_draws_different_rationales():
    answers = local().generate("Q: How many?\nA:", 16, Sampling(0.7, max_tokens=12))
    assert len({answer.text for answer in answers}) / 16 > 0.9


def test_nothing_leaks_between_teacher_and_student(tmp_path):
    teacher = Reasoner()
    synthesize(FineTuneCoT(samples=SAMPLES), teacher, QUESTIONS, tmp_path / "out")
    for ask in teacher.asks:
        if "Therefore" not in ask.prompt:
            assert not [q for q in QUESTIONS if q.answer in ask.prompt]
    for row in lines(tmp_path / "out" / "rows.jsonl"):
        question = next(q for q in QUESTIONS if q.id == row["provenance"]["question"])
        assert row["prompt"] == f"{question.text} ###"
        assert "step by step" not in row["prompt"] + row["completion"]
        assert "Therefore" not in row["completion"]


def test_one_sample_is_greedy_and_the_control_makes_no_call(tmp_path):
    teacher = Reasoner()
    synthesize(FineTuneCoT(), teacher, QUESTIONS[:2], tmp_path / "one")
    assert {ask.sampling.temperature for ask in teacher.asks} == {0.0}
    teacher = Reasoner()
    made = synthesize(FineTuneCoT(rationale=False), teacher, QUESTIONS, tmp_path / "control")
    assert teacher.asks == []
    rows = lines(made.path / "rows.jsonl")
    assert len(rows) == 50
    assert rows[0]["prompt"] == "What is 0 and much more? ###"
    assert rows[0]["completion"] == " 7000.50 END"


@pytest.mark.parametrize(
    ("thought", "answer", "reason"),
    [
        (Answer("Two and two", "length"), Answer(" 4.", "stop"), Reason.TRUNCATED_RATIONALE),
        (Answer(" \n", "stop"), Answer(" 4.", "stop"), Reason.EMPTY_RATIONALE),
        (Answer("So --> 4", "stop"), Answer(" 4.", "stop"), Reason.MARKED_RATIONALE),
        (Answer("See ###", "stop"), Answer(" 4.", "stop"), Reason.MARKED_RATIONALE),
        (Answer("Fine.", "stop"), Answer(" four", "stop"), Reason.NO_ANSWER),
        (Answer("Fine.", "stop"), Answer(" 4", "length"), Reason.TRUNCATED_ANSWER),
        (Answer("Fine.", "stop"), Answer(" 4.", "length"), Reason.TRUNCATED_ANSWER),
        (Answer("Fine.", "stop"), Answer(" 4 and 5", "length"), None),
        (Answer("Fine.", "stop"), Answer(" 5, not 4", "stop"), Reason.WRONG_ANSWER),
        (Answer("Fine.", "stop"), Answer(" 4.", "stop"), None),
    ],
)
def test_every_reject_has_its_reason(tmp_path, thought, answer, reason):
    teacher = ScriptedTeacher(lambda ask: answer if "Therefore" in ask.prompt else thought)
    made = synthesize(FineTuneCoT(), teacher, [Question("q", "2 + 2?", "4")], tmp_path / "out")
    assert made.summary["reasons"] == ({} if reason is None else {reason: 1})
    assert made.summary["questions_without_a_row"] == (reason is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"samples": 2, "temperature": 0.0},
        {"kind": "colour"},
        {"tolerance": -1.0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        FineTuneCoT(**options)


def test_a_right_answer_that_none_can_match_is_found_before_any_call(tmp_path):
    teacher = Reasoner()
    with pytest.raises(RarefyError, match="'many' of question q is no number"):
        synthesize(FineTuneCoT(), teacher, [Question("q", "?", "many")], tmp_path / "out")
    assert teacher.asks == []


@pytest.mark.parametrize(
    ("kind", "text", "marker", "found"),
    [
        ("number", "first 5, then 1,250 --> $1,250 or 7 END", "-->", "1250"),
        ("number", "first 5, then 6", "-->", "6"),
        ("number", "5 --> none", "-->", None),
        ("number", " -3.50 is it, not 4", "", "-3.50"),
        ("number", "7-3 is 4", "", "7"),
        ("number", "7-3", None, "3"),
        ("number", "$1,234,567.", "", "1234567"),
        ("number", "1,2", "", "1"),
        ("number", "about .5", "", ".5"),
        ("number", "--> 1 --> 2", "-->", "1"),
        ("letter", "A dog; so (C).", "", "C"),
        ("letter", "B", "", "B"),
        ("letter", "I'd say D's not B's", None, None),
        ("yes-no", "Nothing is known. Yes", "", "yes"),
        ("yes-no", "FALSE", "", "no"),
        ("text", " \n nk.\nmore", "", "nk"),
        ("text", "", None, None),
    ],
)
def test_answers_are_found_by_the_rule(kind, text, marker, found):
    assert Extractor(kind).find(text, marker) == found


def test_answers_are_compared_by_kind():
    assert Extractor().agrees("4.0", "4")
    assert Extractor().agrees("1250", "$1,250")
    assert not Extractor().agrees("4.00001", "4")
    assert Extractor(tolerance=0.01).agrees("0.667", "0.6667")
    assert not Extractor().agrees("10000", "10001")
    assert Extractor("letter").agrees("C", "(C)")
    assert Extractor("yes-no").agrees("yes", "True")
    assert Extractor("text").agrees("The N.K", "n k")
    assert not Extractor("text").agrees("nk", "kn")


def test_questions_are_read_and_checked(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "a?", "answer": 3}\n\n{"id": 7, "question": "b\u2028?", "answer": "x"}\n'
    )
    one, two = read_questions(path)
    assert (one.text, one.answer, len(one.id)) == ("a?", "3", 16)
    assert two == Question("7", "b\u2028?", "x")
    for text, sentence in [
        ("", "no question"),
        ("{", "line 1 is no JSON object"),
        ("[1]", "line 1 is no JSON object"),
        ('{"question": "a?"}', "with 'question' and 'answer'"),
        ('{"question": "a?", "answer": null}', "a text or a number"),
        ('{"question": " ", "answer": "x"}', "must not be empty"),
        ('{"question": "\\ud83d", "answer": "x"}', "not Unicode"),
        ('{"id": 1, "question": "a", "answer": 1}\n' * 2, "two questions have the id 1"),
    ]:
        path.write_text(text)
        with pytest.raises(RarefyError, match=sentence):
            read_questions(path)
    with pytest.raises(RarefyError, match="cannot be read"):
        read_questions(tmp_path / "missing")


def test_beginnings_are_every_pair_or_an_even_spread():
    every = beginnings(5)
    assert len(set(every)) == 15
    assert {first for first, _ in every} == set(range(5))
    assert {length for _, length in every} == {3, 4, 5}
    for vocabulary, texts in [(1000, 30), (1000, 999), (100, 250), (7, 21)]:
        some = beginnings(vocabulary, texts)
        assert len(set(some)) == texts
        lengths = Counter(length for _, length in some)
        assert max(lengths.values()) - min(lengths.values()) <= 1
        firsts = sorted({first for first, _ in some})
        gaps = [b - a for a, b in pairwise(firsts)]
        assert max(gaps) - min(gaps) <= 1


def test_data_free_text_begins_greedily_and_reads_no_file(tmp_path):
    teacher = local()
    opened, listening = [], [True]

    def hear(event, arguments):
        if listening and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hear)
    method = DataFree(texts=60, max_length=14)
    made = synthesize(method, teacher, [], tmp_path / "out")
    listening.clear()
    assert opened
    assert not [path for path in opened if str(tmp_path) not in path]
    rows = lines(made.path / "rows.jsonl")
    assert len(rows) == 60
    model = teacher.weights()
    sampled = 0
    for row, (first, length) in zip(rows, beginnings(259, 60), strict=True):
        ids = row["ids"]
        assert ids[0] == first
        with torch.inference_mode():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert ids[1:length] == best[: length - 1][: len(ids) - 1]
        # The first drawn token is the one right after the greedy ones.
        sampled += len(ids) > length and ids[length] != best[length - 1]
        assert len(ids) == 14 or ids[-1] == 257
        assert row["provenance"]["teacher"] == "tiny"
    assert sampled > 40
    assert corpora.load(str(made.path / "rows.jsonl")).documents[0] == rows[0]["text"]


def test_data_free_text_does_not_depend_on_the_batch_but_on_the_seed(tmp_path):
    def ids(batch, seed, name):
        method = DataFree(texts=20, max_length=12, batch=batch)
        made = synthesize(method, local(), [], tmp_path / name, Settings(seed))
        return [row["ids"] for row in lines(made.path / "rows.jsonl")]

    first = ids(1, 0, "a")
    assert first == ids(7, 0, "b")
    other = ids(7, 1, "c")
    assert all(a[:3] == b[:3] for a, b in zip(first, other, strict=True))
    assert sum(a != b for a, b in zip(first, other, strict=True)) >= 18


def test_data_free_text_draws_among_the_most_probable_tokens(tmp_path):
    teacher = local()
    method = DataFree(texts=40, max_length=12, top_k=2)
    made = synthesize(method, teacher, [], tmp_path / "out")
    second = 0
    for row in lines(made.path / "rows.jsonl"):
        ids = torch.tensor([row["ids"]])
        with torch.inference_mode():
            best = teacher.weights()(ids).logits[0].topk(2).indices
        for place in range(5, ids.shape[1]):
            assert ids[0, place] in best[place - 1]
            second += int(ids[0, place] == best[place - 1, 1])
    assert second > 50


def test_data_free_text_ends_at_eos(tmp_path):
    _, model = tiny("llama")
    common = list(range(200))
    model.generation_config.eos_token_id = common
    teacher = LocalTeacher(model, tiny_tokenizer(), "ends")
    made = synthesize(DataFree(texts=30, max_length=40), teacher, [], tmp_path / "out")
    rows = lines(made.path / "rows.jsonl")
    for row in rows:
        assert not set(row["ids"][1:-1]) & set(common)
        assert (row["ids"][-1] in common) == (row["provenance"]["finish_reasons"] == ["stop"])
    assert sum(len(row["ids"]) < 40 for row in rows) > 20


def test_data_free_refusals(tmp_path):
    with pytest.raises(TeacherCapabilityError, match="data-free needs a teacher of level T4"):
        synthesize(DataFree(), ScriptedTeacher({}), [], tmp_path / "out")
    with pytest.raises(RarefyError, match="has 777 beginnings"):
        synthesize(DataFree(texts=778), local(), [], tmp_path / "out")
    with pytest.raises(RarefyError, match="give none"):
        synthesize(DataFree(texts=1), local(), QUESTIONS, tmp_path / "out")
    with pytest.raises(RarefyError, match="at most 256 tokens"):
        synthesize(DataFree(texts=1), local(), [], tmp_path / "long")
    for options in ({"texts": 0}, {"max_length": 4}, {"temperature": 0.0}, {"batch": 0}):
        with pytest.raises(ValueError):
            DataFree(**options)


def test_a_finished_run_is_reused_and_another_one_refused(tmp_path):
    out, teacher = tmp_path / "out", Reasoner()
    synthesize(FineTuneCoT(), teacher, QUESTIONS[:2], out)
    again = synthesize(FineTuneCoT(), teacher, QUESTIONS[:2], out)
    assert again.reused
    assert again.summary["rows"] == 2
    assert len(teacher.asks) == 4
    for method, questions, settings in [
        (FineTuneCoT(max_tokens=64), QUESTIONS[:2], Settings()),
        (FineTuneCoT(), QUESTIONS[:3], Settings()),
        (FineTuneCoT(), QUESTIONS[:2], Settings(seed=1)),
    ]:
        with pytest.raises(RarefyError, match="holds something else"):
            synthesize(method, teacher, questions, out, settings)
    assert len(teacher.asks) == 4
    fresh = synthesize(FineTuneCoT(), teacher, QUESTIONS[:3], out, Settings(fresh=True))
    assert (fresh.calls, len(lines(out / "rows.jsonl"))) == (6, 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(RarefyError, match="holds something else"):
        synthesize(FineTuneCoT(), teacher, QUESTIONS[:2], tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    assert synthesize(FineTuneCoT(), teacher, QUESTIONS[:2], tmp_path / "empty").calls == 4
    assert not list(tmp_path.glob("*.partial"))


def test_more_samples_reuse_the_calls_of_fewer(tmp_path):
    teacher, calls = Reasoner(), tmp_path / "calls.jsonl"
    synthesize(FineTuneCoT(2), teacher, QUESTIONS[:3], tmp_path / "two", Settings(calls=calls))
    made = synthesize(
        FineTuneCoT(5), teacher, QUESTIONS[:3], tmp_path / "five", Settings(calls=calls)
    )
    assert (made.calls, made.cached, made.summary["calls"]) == (18, 12, 30)
    alone = synthesize(FineTuneCoT(5), Reasoner(), QUESTIONS[:3], tmp_path / "alone")
    assert (alone.path / "rows.jsonl").read_bytes() == (made.path / "rows.jsonl").read_bytes()
    assert not (made.path / "calls.jsonl").exists()


def tokenizer(**special):
    made = tiny_tokenizer()
    for name, value in special.items():
        setattr(made, name, value)
    return made


ROWS = [
    {"prompt": "ab", "completion": " cd"},
    {"prompt": "a", "completion": "x"},
    {"prompt": "", "completion": "xyz"},
    {"prompt": "a", "completion": "x</s>more"},
]


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_the_loss_covers_the_completion_and_one_eos_whatever_the_padding(pad):
    made = token_rows(ROWS, tokenizer(pad_token=pad), 10)
    byte = {name: ids[0] for name in "abcdxyz" for ids in [tiny_tokenizer()(name)["input_ids"]]}
    space, eos = tiny_tokenizer()(" ")["input_ids"][0], 257
    wanted = [
        ([byte["a"], byte["b"], space, byte["c"], byte["d"], eos], 2),
        ([byte["a"], byte["x"], eos], 1),
        ([byte["x"], byte["y"], byte["z"], eos], 1),
        ([byte["a"], byte["x"], eos], 1),
    ]
    assert made.ids.shape == made.loss.shape == (4, 6)
    assert made.lengths.tolist() == [6, 3, 4, 3]
    assert made.left_out == 0
    for row, (ids, start) in enumerate(wanted):
        assert made.ids[row, : len(ids)].tolist() == ids
        mask = [start <= place < len(ids) for place in range(6)]
        assert made.loss[row].tolist() == mask
        assert made.ids[row][made.loss[row]].tolist().count(eos) == 1


def test_prompt_and_completion_are_tokenized_apart():
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert made("ab")["input_ids"] == [0, 4]
    rows = token_rows([{"prompt": "a", "completion": "b"}], made, 9)
    assert rows.ids.tolist() == [[0, 2, 3, 1]]
    assert rows.loss.tolist() == [[False, False, True, True]]


def test_rows_of_ids_are_learnt_from_the_second_token_to_the_first_eos():
    made = token_rows([{"ids": [5, 6, 257, 9]}, {"ids": [257, 6, 7, 8]}], tokenizer(), 9)
    assert made.lengths.tolist() == [3, 4]
    assert made.loss.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_rows_that_do_not_fit_are_left_out_not_cut(tmp_path):
    assert token_rows(ROWS, tokenizer(), 4).left_out == 1
    with pytest.raises(RarefyError, match="none of 4 rows"):
        token_rows(ROWS, tokenizer(), 2)
    with pytest.raises(RarefyError, match="no EOS"):
        token_rows(ROWS, tokenizer(eos_token=None), 9)
    synthesize(FineTuneCoT(2), Reasoner(), QUESTIONS[:3], tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    made = token_rows(rows, tiny_tokenizer(), 200)
    learnt = tiny_tokenizer().decode(made.ids[0][made.loss[0]])
    assert learnt == rows[0]["completion"] + "</s>"
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RarefyError, match=r"row 1 of .*bad.jsonl has neither"):
        read_rows(tmp_path / "bad.jsonl")
    with pytest.raises(RarefyError, match="cannot be read"):
        read_rows(tmp_path / "missing.jsonl")


def test_levels_are_declared():
    assert FineTuneCoT.needs == Level.T0
    assert DataFree.needs == Level.T4
