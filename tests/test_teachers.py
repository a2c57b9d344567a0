"""Teachers: levels, sampling, the local model and the ledger of calls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import save_tiny, tiny, tiny_tokenizer

from rarefy.errors import RarefyError
from rarefy.teachers.base import (
    Answer,
    Ask,
    Level,
    Sampling,
    TeacherCapabilityError,
    TokenScore,
)
from rarefy.teachers.cache import Ledger, key_of, request_of
from rarefy.teachers.local import LocalTeacher
from rarefy.teachers.sampling import Streams, draw, probabilities
from rarefy.teachers.scripted import ScriptedTeacher

GREEDY = Sampling(temperature=0.0, max_tokens=6)
RAW = Sampling(max_tokens=6)
PROMPTS = ["Water", "The capital of France", "One, two,", "a"]


def local(family="llama", batch=8, level=Level.T5, **overrides):
    _, model = tiny(family, **overrides)
    return LocalTeacher(model, tiny_tokenizer(), f"tiny-{family}", batch, level)


def argmax_continuation(model, ids, count):
    """The reference: a full forward pass for every token, one row, no cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


ABOVE_T0 = {
    Level.T1: lambda teacher: teacher.generate("x", sampling=replace(RAW, logprobs=2)),
    Level.T2: lambda teacher: teacher.score("x", "y"),
    Level.T3: lambda teacher: teacher.logits(torch.tensor([[1, 2]])),
    Level.T4: lambda teacher: teacher.decode(torch.tensor([[1]]), lambda i, z: z.argmax(-1), 3),
    Level.T5: lambda teacher: teacher.weights(),
}


@pytest.mark.parametrize("level", list(Level))
def test_a_call_works_at_its_level_and_is_refused_below(level):
    teacher = local(level=level)
    assert teacher.generate("x", sampling=GREEDY)[0].finish_reason in {"stop", "length"}
    for needed, call in ABOVE_T0.items():
        if needed <= level:
            call(teacher)
        else:
            with pytest.raises(TeacherCapabilityError, match=f"level {needed.name} .*{level.name}"):
                call(teacher)


def test_the_refusal_says_what_would_do_and_comes_before_the_call():
    called = []
    teacher = ScriptedTeacher(lambda ask: called.append(ask) or "text")
    with pytest.raises(TeacherCapabilityError, match="option logprobs, or a local model") as info:
        teacher.generate("x", sampling=replace(RAW, logprobs=1))
    assert (info.value.needed, info.value.offered) == (Level.T1, Level.T0)
    with pytest.raises(TeacherCapabilityError):
        _ = teacher.vocabulary
    assert not called


def test_a_scripted_teacher_plays_tables_and_functions():
    table = ScriptedTeacher({"one": "1", "many": ["a", "b"]})
    assert [a.text for a in table.generate("one", 2)] == ["1", "1"]
    assert [a.text for a in table.generate("many", 2)] == ["a", "b"]
    with pytest.raises(RarefyError, match="no answer 2"):
        table.generate("many", 3)
    with pytest.raises(RarefyError, match="no answer 0 to 'other'"):
        table.generate("other")
    spoken = ScriptedTeacher(lambda ask: Answer(f"{ask.prompt}{ask.sample}", "length"))
    assert spoken.generate("x", 2)[1] == Answer("x1", "length")


def test_a_scripted_teacher_of_a_higher_level_needs_what_it_declares():
    with pytest.raises(RarefyError, match="T2 needs scores"):
        ScriptedTeacher({}, level=Level.T2)
    scores = [TokenScore("y", -0.5, (("y", -0.5),))]
    with pytest.raises(RarefyError, match="T3 needs logits"):
        ScriptedTeacher({}, level=Level.T3, scores=lambda *_: scores)
    teacher = ScriptedTeacher(
        {"x": "y"}, level=Level.T3, scores=lambda *_: scores, logits=lambda ids: ids.float()
    )
    assert teacher.score("x", "y") == scores
    assert torch.equal(teacher.logits(torch.tensor([[3]])), torch.tensor([[3.0]]))
    with pytest.raises(RarefyError, match="no log-probabilities"):
        teacher.generate("x", sampling=replace(RAW, logprobs=1))
    with pytest.raises(TeacherCapabilityError):
        teacher.weights()


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}])
def test_bad_sampling_is_refused(bad):
    with pytest.raises(RarefyError, match="sampling needs"):
        Sampling(**bad)
    with pytest.raises(RarefyError, match="max_tokens"):
        Sampling(max_tokens=0)


def test_probabilities_follow_the_definition():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    raw = torch.tensor([2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.allclose(probabilities(logits, 1.0)[0], raw.softmax(-1))
    assert torch.allclose(probabilities(logits, 0.5)[0], (2 * raw).softmax(-1))
    two = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf], dtype=torch.float64).softmax(-1)
    assert torch.allclose(probabilities(logits, 1.0, top_k=2)[0], two)
    # 0.644, 0.237, 0.087, 0.032: two tokens are the smallest set with 0.7.
    assert torch.allclose(probabilities(logits, 1.0, top_p=0.7)[0], two)
    assert torch.allclose(probabilities(logits, 1.0, top_k=9)[0], raw.softmax(-1))


def test_draws_have_the_distribution_and_no_impossible_token():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(p.expand(len(u), -1), u)
    assert (drawn.bincount(minlength=6) / len(u) - p).abs().sum() / 2 < 0.01
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(p.expand(2, -1), edges).tolist() == [1, 4]


def test_streams_are_the_rows_own():
    together, alone = Streams([5, 6]), Streams([6])
    for _ in range(3):
        assert together.uniform()[1] == alone.uniform()[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3_text"])
def test_padded_batches_answer_like_the_plain_model(family):
    teacher = local(family)
    tokenizer = tiny_tokenizer()
    asks = [Ask(prompt, GREEDY) for prompt in PROMPTS]
    said = dict(teacher.answers(asks))
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        wanted = argmax_continuation(teacher.weights(), ids, GREEDY.max_tokens)[len(ids) :]
        assert said[index].text == tokenizer.decode(wanted, skip_special_tokens=True)


def test_sampling_is_the_raw_policy_whatever_the_model_suggests():
    plain, swayed = local(), local()
    config = swayed.weights().generation_config
    config.do_sample, config.top_k, config.temperature, config.repetition_penalty = (
        True,
        1,
        0.1,
        9.0,
    )
    first = [answer.text for answer in plain.generate("Water", 20, RAW)]
    assert first == [answer.text for answer in swayed.generate("Water", 20, RAW)]
    assert len(set(first)) == 20


def test_samples_do_not_depend_on_the_batch():
    asks = [Ask(prompt, RAW, sample) for prompt in PROMPTS for sample in range(3)]
    texts = [dict(local(batch=batch).answers(asks)) for batch in (1, 5, 12)]
    assert texts[0] == texts[1] == texts[2]
    assert len({answer.text for answer in texts[0].values()}) == len(asks)


def test_seed_and_sample_index_name_different_streams():
    streams = {Ask("x", Sampling(seed=seed), n).stream for seed in range(9) for n in range(9)}
    assert len(streams) == 81
    assert all(0 <= stream < 2**31 for stream in streams)


def test_scores_are_log_probabilities_of_the_given_text():
    teacher = local()
    tokenizer = tiny_tokenizer()
    scores = teacher.score("Water is", " wet", top=3)
    ids = tokenizer("Water is wet")["input_ids"]
    with torch.inference_mode():
        logp = teacher.weights()(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, score in enumerate(scores, start=len("Water is")):
        assert score.logprob == pytest.approx(float(logp[place - 1, ids[place]]), abs=1e-5)
        assert [value for _, value in score.top] == pytest.approx(
            logp[place - 1].topk(3).values.tolist(), abs=1e-5
        )
    assert "".join(score.token for score in scores) == " wet"


def test_generated_tokens_carry_the_raw_log_probabilities():
    teacher = local()
    how = replace(RAW, temperature=0.5, logprobs=2)
    (answer,) = teacher.generate("Water", sampling=how)
    assert len(answer.tokens) == how.max_tokens
    first = teacher.logits(torch.tensor([tiny_tokenizer()("Water")["input_ids"]]))[0, -1]
    assert answer.tokens[0].top[0][1] == pytest.approx(float(first.log_softmax(-1).max()), abs=1e-5)
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer


def test_an_answer_ends_at_eos_or_a_stop_text_or_is_cut():
    teacher = local()
    (whole,) = teacher.generate("Water", sampling=replace(GREEDY, max_tokens=12))
    assert whole.finish_reason == "length"
    ids = argmax_continuation(teacher.weights(), tiny_tokenizer()("Water")["input_ids"], 12)[5:]
    stop = whole.text[4]
    cut = teacher.generate("Water", sampling=replace(GREEDY, max_tokens=12, stop=("@@", stop)))[0]
    assert cut == Answer(whole.text[: whole.text.index(stop)], "stop")

    _, model = tiny("llama")
    model.generation_config.eos_token_id = [ids[3], 257]
    ended = LocalTeacher(model, tiny_tokenizer(), "ends").generate("Water", sampling=GREEDY)[0]
    first = ids.index(ids[3])
    assert ended.finish_reason == "stop"
    assert ended.text == tiny_tokenizer().decode(ids[: first + 1])


def test_messages_need_a_chat_template_and_are_rendered_by_it():
    teacher = local()
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(RarefyError, match="no chat template"):
        teacher.generate(messages, sampling=GREEDY)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    _, model = tiny("llama")
    chatty = LocalTeacher(model, tokenizer, "chatty")
    assert chatty.render(messages) == "<user>Hi<assistant>"
    wanted = chatty.generate("<user>Hi<assistant>", sampling=GREEDY)
    assert chatty.generate(messages, sampling=GREEDY) == wanted


def test_what_does_not_fit_is_refused():
    with pytest.raises(RarefyError, match="at most 256 tokens"):
        local().generate("Water", sampling=Sampling(max_tokens=252))
    with pytest.raises(RarefyError, match="empty prompt"):
        local().generate("")


def test_the_caller_chooses_every_token():
    teacher = local()
    seen = []

    def choose(ids, logits):
        seen.append((tuple(ids.shape), tuple(logits.shape)))
        return torch.tensor([7, 257 if ids.shape[1] == 3 else 8])

    rows = teacher.decode(torch.tensor([[1, 2], [3, 4]]), choose, 6)
    assert rows == [[1, 2, 7, 7, 7, 7], [3, 4, 8, 257]]
    assert seen == [((2, t), (2, 320)) for t in range(2, 6)]


def test_a_folder_is_opened_under_a_name_that_follows_its_weights(tmp_path):
    one = LocalTeacher.open(save_tiny("llama", tmp_path / "model"))
    two = LocalTeacher.open(save_tiny("llama", tmp_path / "other" / "model", hidden_size=32))
    assert one.name.startswith("model@")
    assert one.name != two.name
    assert str(tmp_path) not in one.name
    assert one.vocabulary == 259
    assert one.ends == {257}


class Counted(ScriptedTeacher):
    """Says its own count, so that an answer that was asked again would show."""

    def __init__(self, fail_at=None):
        super().__init__(self._say)
        self.count, self._fail_at = 0, fail_at

    def _say(self, ask):
        if self.count == self._fail_at:
            raise RarefyError("gone")
        self.count += 1
        return f"{ask.prompt}/{ask.sample}: {self.count}"


ASKS = [Ask(prompt, Sampling(temperature=0.7), n) for prompt in ("a", "b") for n in range(3)]


def test_the_ledger_asks_once_and_keeps_samples_apart(tmp_path):
    teacher, path = Counted(), tmp_path / "deep" / "calls.jsonl"
    with Ledger(path) as ledger:
        first = ledger.answers(teacher, [*ASKS, *ASKS])
        assert (ledger.calls, ledger.cached, teacher.count) == (6, 0, 6)
    assert first[:6] == first[6:]
    assert len({answer.text for answer in first}) == 6
    heard = []
    with Ledger(path, lambda *news: heard.append(news)) as ledger:
        assert ledger.answers(teacher, ASKS, "again") == first[:6]
        assert (ledger.calls, ledger.cached, teacher.count) == (0, 6, 6)
    assert heard == [("again", 6, 6)]


def test_answers_before_a_failure_are_kept(tmp_path):
    with pytest.raises(RarefyError, match="gone"), Ledger(tmp_path / "c") as ledger:
        ledger.answers(Counted(fail_at=4), ASKS)
    teacher = Counted()
    with Ledger(tmp_path / "c") as ledger:
        ledger.answers(teacher, ASKS)
        assert (ledger.calls, ledger.cached, teacher.count) == (2, 4, 2)


def test_a_key_depends_on_all_that_an_answer_depends_on():
    teacher = ScriptedTeacher({})
    ask = Ask("a", Sampling())
    others = [
        Ask("b"),
        Ask([{"role": "user", "content": "a"}]),
        Ask("a", sample=1),
        *(
            Ask("a", Sampling(**change))
            for change in (
                {"temperature": 0.5},
                {"top_p": 0.5},
                {"top_k": 5},
                {"max_tokens": 5},
                {"stop": ("x",)},
                {"seed": 5},
                {"logprobs": 5},
            )
        ),
    ]
    keys = [key_of(request_of(teacher, other)) for other in (ask, *others)]
    keys.append(key_of(request_of(ScriptedTeacher({}, "other"), ask)))
    assert len(set(keys)) == len(keys)
    request = request_of(teacher, ask)
    assert key_of(dict(reversed(request.items()))) == keys[0]


@pytest.mark.parametrize("torn", [b'{"key": "b", "out', b'{"key": "b"}\n', b"\0\0\n"])
def test_a_torn_last_line_is_asked_again(tmp_path, torn):
    path = tmp_path / "calls.jsonl"
    with Ledger(path) as ledger:
        ledger.answers(Counted(), ASKS[:3])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    teacher = Counted()
    with Ledger(path) as ledger:
        ledger.answers(teacher, ASKS[:4])
    assert teacher.count == 1
    assert path.read_bytes().startswith(whole)
    assert len(path.read_bytes().split(b"\n")) == 5


def test_damage_elsewhere_and_a_second_process_are_refused(tmp_path):
    path = tmp_path / "calls.jsonl"
    with Ledger(path) as ledger:
        ledger.answers(Counted(), ASKS)
        with pytest.raises(RarefyError, match="another process"), Ledger(path):
            pass
    path.write_bytes(b"oops\n" + path.read_bytes())
    with pytest.raises(RarefyError, match=r"line 1 of .* is no finished call"), Ledger(path):
        pass
    path.write_bytes(b"")
    with Ledger(path) as ledger:
        assert ledger.answers(Counted(), ASKS[:1])
    assert [file.name for file in tmp_path.iterdir()] == ["calls.jsonl"]
