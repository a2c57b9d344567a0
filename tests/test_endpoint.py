"""The endpoint teacher against a real HTTP server on this machine, of every kind of bad manners."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from rarefy.errors import RarefyError
from rarefy.synthesis.engine import Settings, synthesize
from rarefy.synthesis.fine_tune_cot import FineTuneCoT
from rarefy.synthesis.questions import Question
from rarefy.teachers.base import Ask, Level, Sampling, TeacherCapabilityError
from rarefy.teachers.endpoint import Endpoint, EndpointTeacher
from rarefy.teachers.transport import Patience, _retry_after

SECRET = "sk-very-secret-0123456789"
VARIABLE = "RAREFY_TEST_KEY"
QUICK = {"timeout": 10, "tries": 4, "backoff": 0.01}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.turn:
            server.seen.append((self.path, body, dict(self.headers), time.monotonic()))
            number = len(server.seen)
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            server.manners.get(number, server.usual)(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.turn:
                server.busy -= 1

    def send(self, status, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def chat(text, **choice):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}]}


def good(handler, body):
    handler.send(200, chat(f"{body['messages'][-1]['content']}!{body['seed']}"))


def status(code, content=b"busy", headers=()):
    return lambda handler, body: handler.send(code, content, headers)


def stall(handler, body):
    time.sleep(1.5)
    good(handler, body)


def trickle(handler, body):
    """A good answer, in pieces that are each in time and together are not."""
    data = json.dumps(chat("late")).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for at in range(0, len(data), 10):
        handler.wfile.write(data[at : at + 10])
        handler.wfile.flush()
        time.sleep(0.3)


def truncate(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(json.dumps(chat("half")).encode()[:30])
    handler.close_connection = True


def hang_up(handler, body):
    handler.close_connection = True


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.turn, made.seen, made.busy, made.most = threading.Lock(), [], 0, 0
    made.manners, made.usual = {}, good
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def teacher_of(server, *, patience=None, **options):
    patience = Patience(**{**QUICK, **(patience or {})})
    return EndpointTeacher(Endpoint(server.url, "big", patience=patience, **options))


def test_a_request_says_everything_and_every_sample_has_its_own_seed(server):
    how = Sampling(0.7, 0.9, max_tokens=5, stop=("END",), seed=3)
    said = teacher_of(server, extra={"min_p": 0}).generate("Hi", 3, how)
    assert [path for path, *_ in server.seen] == ["/v1/chat/completions"] * 3
    bodies = [body for _, body, *_ in server.seen]
    assert len({body.pop("seed") for body in bodies}) == 3
    assert (
        bodies
        == [
            {
                "model": "big",
                "messages": [{"role": "user", "content": "Hi"}],
                "temperature": 0.7,
                "top_p": 0.9,
                "max_tokens": 5,
                "stop": ["END"],
                "min_p": 0,
            }
        ]
        * 3
    )
    assert len({answer.text for answer in said}) == 3
    assert {answer.finish_reason for answer in said} == {"stop"}
    again = teacher_of(server, limit_field="max_completion_tokens").generate("Hi", 3, how)
    assert again == said
    assert "max_tokens" not in server.seen[-1][1]
    assert server.seen[-1][1]["max_completion_tokens"] == 5


@pytest.mark.parametrize(
    "manner",
    [
        status(500),
        status(503),
        status(408),
        status(429),
        stall,
        trickle,
        truncate,
        hang_up,
        status(200, b'{"choices": [{"mess'),
        status(200, b"<html>bad gateway</html>"),
        status(200, b""),
        status(200, b"\xff\xfe"),
    ],
)
def test_what_may_pass_is_tried_again(server, manner):
    server.manners = {1: manner, 2: manner}
    timeout = 0.8 if manner in {stall, trickle} else 10
    (answer,) = teacher_of(server, patience={"timeout": timeout}).generate("Hi")
    assert answer.text.startswith("Hi!")
    assert len(server.seen) == 3
    assert server.seen[0][1] == server.seen[2][1]


@pytest.mark.parametrize(
    ("manner", "sentence"),
    [
        (status(500), r"no answer in 4 tries, .* because it answered 500 \(busy\)"),
        (stall, "no answer in 4 tries, .* longer than 0.4 s"),
        (truncate, "no answer in 4 tries, .* connection failed"),
        (status(200, b"junk {"), r"because it answered what is no JSON \(junk {\)"),
    ],
)
def test_tries_end_with_the_last_reason(server, manner, sentence):
    server.usual = manner
    with pytest.raises(RarefyError, match=sentence):
        teacher_of(server, patience={"timeout": 0.4 if manner is stall else 10}).generate("Hi")
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("manner", "sentence"),
    [
        (status(401, b"who?"), r"refuses a request without a key \(401: who\?\)"),
        (status(404, b"no such model"), "404: no such model.*check the URL"),
        (status(400, b"bad " + b"x" * 999), "400: bad x{290,}"),
        (status(302, b""), "302: nothing"),
        (status(200, [1, 2]), "no JSON object"),
        (status(200, {}), r"without choices\[0\].message.content"),
        (status(200, {"choices": []}), r"without choices\[0\]"),
        (status(200, {"choices": [{"message": {"content": 5}}]}), r"without choices\[0\]"),
        (status(200, {"choices": "no"}), r"without choices\[0\]"),
        (status(200, {"error": {"message": "out of credit"}}), r"\(out of credit\)"),
    ],
)
def test_what_will_not_pass_is_one_sentence_at_once(server, manner, sentence):
    server.usual = manner
    with pytest.raises(RarefyError, match=sentence) as info:
        teacher_of(server).generate("Hi")
    assert len(server.seen) == 1
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 600


def test_an_empty_content_is_an_empty_answer(server):
    server.usual = status(200, chat(None, finish_reason="content_filter"))
    (answer,) = teacher_of(server).generate("Hi")
    assert (answer.text, answer.finish_reason) == ("", "content_filter")
    server.usual = status(200, b'{"choices": [{"message": {"content": "\\ud83d"}}]}')
    (answer,) = teacher_of(server).generate("Hi")
    assert (answer.text, answer.finish_reason) == ("?", "unknown")


def test_retry_after_is_honoured_by_all_requests(server):
    server.manners = {1: status(429, b"slow down", [("Retry-After", "1")])}
    list(teacher_of(server, patience={"concurrent": 1}).generate("Hi", 2))
    times = [at for *_, at in server.seen]
    assert len(times) == 3
    assert 1.0 <= times[1] - times[0] < 5.0


def test_retry_after_holds_back_requests_that_have_not_started(server):
    server.manners = {1: status(429, b"slow down", [("Retry-After", "1")])}
    server.usual = lambda handler, body: (time.sleep(0.2), good(handler, body))
    list(teacher_of(server, patience={"concurrent": 2}).generate("Hi", 4))
    times = sorted(at for *_, at in server.seen)
    # The two first are under way; what begins later waits for the second that was asked for.
    assert all(at - times[0] >= 1.0 for at in times[2:])


def test_too_long_a_wait_is_refused_with_a_sentence(server):
    server.usual = status(429, b"", [("Retry-After", "3600")])
    with pytest.raises(RarefyError, match=r"asks to wait 3600 s.*calls are kept"):
        teacher_of(server).generate("Hi")
    assert len(server.seen) == 1


def test_retry_after_may_be_a_date():
    assert 55 < _retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _retry_after(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0
    assert _retry_after("soon") == _retry_after(None) == _retry_after("-3") == 0
    assert _retry_after("1.5") == 1.5


def test_waiting_doubles(server):
    server.usual = status(500)
    with pytest.raises(RarefyError):
        teacher_of(server, patience={"backoff": 0.2}).generate("Hi")
    times = [at for *_, at in server.seen]
    gaps = [b - a for a, b in pairwise(times)]
    for gap, step in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert step / 2 <= gap < step + 3


def test_requests_at_once_and_in_a_minute_are_limited(server):
    server.usual = lambda handler, body: (time.sleep(0.1), good(handler, body))
    teacher_of(server, patience={"concurrent": 3}).generate("Hi", 9)
    assert 2 <= server.most <= 3
    before = len(server.seen)
    teacher_of(server, patience={"concurrent": 8, "per_minute": 600}).generate("Hi", 6)
    times = [at for *_, at in server.seen[before:]]
    assert max(times) - min(times) >= 0.45


def test_answers_under_way_at_a_failure_are_taken_in(server):
    failed = threading.Event()

    def refuse(handler, body):
        while len(server.seen) < 3:
            time.sleep(0.01)
        handler.send(400, b"no")
        failed.set()

    def after(handler, body):
        failed.wait(20)
        time.sleep(0.3)
        good(handler, body)

    server.manners, server.usual = {1: refuse}, after
    teacher, got = teacher_of(server, patience={"concurrent": 3}), []
    with pytest.raises(RarefyError, match="400"):
        for pair in teacher.answers([Ask("Hi", sample=n) for n in range(9)]):
            got.append(pair)
    assert len(got) == 2
    assert len(server.seen) == 3
    server.usual = good
    assert len(teacher.generate("Hi", 2)) == 2


def test_levels_are_what_the_options_declare(server):
    assert teacher_of(server).level == Level.T0
    assert teacher_of(server, logprobs=True).level == Level.T1
    assert teacher_of(server, prompt_logprobs=True).level == Level.T2
    with pytest.raises(TeacherCapabilityError, match="T1"):
        teacher_of(server).generate("Hi", sampling=Sampling(logprobs=2))
    for call in (lambda t: t.score("a", "b"), lambda t: t.logits(None), lambda t: t.weights()):
        with pytest.raises(TeacherCapabilityError):
            call(teacher_of(server, logprobs=True))
    assert server.seen == []


def test_log_probabilities_are_read_or_missed(server):
    top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.5}]
    entry = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": top}
    server.usual = status(200, chat("a", logprobs={"content": [entry]}))
    (answer,) = teacher_of(server, logprobs=True).generate("Hi", sampling=Sampling(logprobs=2))
    assert answer.tokens[0].top == (("a", -0.1), ("b", -2.5))
    assert server.seen[0][1]["logprobs"] is True
    assert server.seen[0][1]["top_logprobs"] == 2
    server.usual = status(200, chat("a"))
    with pytest.raises(RarefyError, match="offers what its options say"):
        teacher_of(server, logprobs=True).generate("Hi", sampling=Sampling(logprobs=2))


def vllm(handler, body):
    """Tokens are bytes; the log-probability of id i at place t is -(i + t) / 100."""
    if handler.path == "/tokenize":
        text = body.get("prompt") or "".join(m["content"] for m in body["messages"])
        handler.send(200, {"tokens": list(text.encode())})
        return
    places = [None]
    for place, token in enumerate(body["prompt"][1:], start=1):
        ids = {token, *range(65, 65 + body["prompt_logprobs"])}
        places.append(
            {str(i): {"logprob": -(i + place) / 100, "decoded_token": chr(i)} for i in ids}
        )
    handler.send(200, {"choices": [{"text": "", "prompt_logprobs": places}]})


def test_a_vllm_server_scores_given_text(server):
    server.usual = vllm
    scores = teacher_of(server, prompt_logprobs=True).score("Hi", " yz", top=2)
    assert [score.token for score in scores] == [" ", "y", "z"]
    assert [score.logprob for score in scores] == [-0.34, -(121 + 3) / 100, -(122 + 4) / 100]
    assert scores[1].top == (("A", -0.68), ("B", -0.69))
    assert [path for path, *_ in server.seen] == ["/tokenize", "/tokenize", "/v1/completions"]
    assert server.seen[0][1]["add_generation_prompt"] is True
    assert server.seen[1][1]["add_special_tokens"] is False


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "looks like http"),
        ("ftp://x/v1", "looks like http"),
        ("https://me:pw@host/v1", "at host holds a secret"),
        ("https://host/v1?key=pw", "holds a secret"),
    ],
)
def test_a_bad_url_is_refused_without_repeating_a_secret(url, sentence):
    with pytest.raises(RarefyError, match=sentence) as info:
        EndpointTeacher(Endpoint(url, "big"))
    assert "pw" not in str(info.value)


def test_a_server_that_is_not_there_is_one_sentence(server):
    server.server_close()
    with pytest.raises(RarefyError, match=r"gave no answer in 2 tries.*connection failed"):
        teacher_of(server, patience={"tries": 2}).generate("Hi")


def test_a_missing_key_is_found_before_any_request(server, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RarefyError, match=f"{VARIABLE} holds no API key"):
        teacher_of(server, key_variable=VARIABLE)


def leak(handler, body):
    """Repeat the key in the answer, as a server in debug mode may."""
    handler.send(200, chat(f"think {handler.headers['Authorization']} 4"))


def test_the_key_is_sent_and_stays_out_of_files_logs_and_messages(
    server, monkeypatch, tmp_path, caplog
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(VARIABLE, SECRET)
    server.usual = leak
    questions = [Question("q", "2 + 2?", "4"), Question("r", "2 + 3?", "5")]
    teacher = teacher_of(server, key_variable=VARIABLE)
    made = synthesize(FineTuneCoT(samples=2), teacher, questions, tmp_path / "out")
    assert (made.summary["rows"], made.summary["rejects"]) == (2, 2)
    assert server.seen[0][2]["Authorization"] == f"Bearer {SECRET}"
    server.usual = lambda handler, body: handler.send(
        403, f"no: {handler.headers['Authorization']}".encode()
    )
    with pytest.raises(RarefyError, match=rf"refuses the key in {VARIABLE} \(403: no: Bearer") as i:
        synthesize(FineTuneCoT(samples=2), teacher, questions, tmp_path / "refused")
    everything = [str(i.value), repr(i.value.__cause__), caplog.text, repr(vars(teacher))]
    everything += [str(vars(teacher._transport))]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 5
    everything += [file.read_text() for file in files]
    assert not [text for text in everything if SECRET in text]


QUESTIONS = [Question(f"q{n}", f"{n} + 1?", str(n + 1)) for n in range(6)]
RUN = """
import sys
from rarefy.synthesis.engine import synthesize
from rarefy.synthesis.fine_tune_cot import FineTuneCoT
from test_endpoint import QUESTIONS, EndpointTeacher, Endpoint, Patience
patience = Patience(timeout=20, concurrent=int(sys.argv[3]))
teacher = EndpointTeacher(Endpoint(sys.argv[1], "big", patience=patience))
synthesize(FineTuneCoT(samples=2), teacher, QUESTIONS, sys.argv[2])
"""


def reckon(handler, body):
    text = body["messages"][-1]["content"]
    number = int(re.search(r"Q: (\d+)", text).group(1))
    done = "Therefore" in text
    handler.send(200, chat(f" {number + 1}." if done else f" Think {body['seed']}."))


@pytest.mark.parametrize(("concurrent", "die_at"), [(1, 5), (3, 17)])
def test_after_a_kill_no_answered_call_is_repeated(server, tmp_path, concurrent, die_at):
    def die(handler, body):
        process.send_signal(signal.SIGKILL)
        handler.close_connection = True

    server.usual, server.manners = reckon, {die_at: die}
    out = tmp_path / "out"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, server.url, str(out), str(concurrent)],
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.wait(120) == -signal.SIGKILL
    time.sleep(0.3)  # requests that were on their way arrive
    before = len(server.seen)
    ledger = tmp_path / "out.partial" / "calls.jsonl"
    kept = ledger.read_bytes().count(b"\n")
    assert not out.exists()
    assert before >= die_at
    assert 1 <= before - kept <= concurrent
    with ledger.open("ab") as stream:
        stream.write(b'{"key": "torn')

    teacher = teacher_of(server, patience={"timeout": 20})
    made = synthesize(FineTuneCoT(samples=2), teacher, QUESTIONS, out)
    assert (made.calls, made.cached) == (24 - kept, kept)
    asked = Counter(json.dumps(body, sort_keys=True) for _, body, *_ in server.seen)
    assert len(asked) == 24
    # Asked twice: what was under way when the process died, and nothing else.
    assert len(server.seen) - 24 == before - kept
    rows = (out / "rows.jsonl").read_bytes()
    assert rows.count(b"\n") == 12
    synthesize(FineTuneCoT(samples=2), teacher, QUESTIONS, tmp_path / "undisturbed")
    assert (tmp_path / "undisturbed" / "rows.jsonl").read_bytes() == rows


def test_settings_reach_the_progress(server, tmp_path):
    server.usual, heard = reckon, []
    settings = Settings(tell=lambda *news: heard.append(news))
    synthesize(
        FineTuneCoT(), teacher_of(server), [Question("q", "1 + 1?", "2")], tmp_path / "o", settings
    )
    assert heard == [
        ("rationales", 0, 1),
        ("rationales", 1, 1),
        ("answers", 0, 1),
        ("answers", 1, 1),
    ]
