"""The journal of finished requests."""

from __future__ import annotations

import json

import pytest

from rarefy.errors import RarefyError
from rarefy.evaluate.journal import open_journal

ASKED = ("loglikelihood", ["Water is", " wet"])


def test_a_later_run_finds_the_answers(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with open_journal(path, "one") as journal:
        key = journal.key(*ASKED)
        assert key not in journal
        journal.add(key, (-1.5, True))
    with open_journal(path, "one") as journal:
        assert journal[journal.key(*ASKED)] == [-1.5, True]


def test_an_answer_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    with open_journal(path, "one") as journal:
        journal.add("k", "wet")
        assert json.loads(path.read_text()) == {"key": "k", "answer": "wet"}


def test_a_key_depends_on_all_that_the_answer_depends_on(tmp_path):
    with open_journal(tmp_path / "a", "one") as one, open_journal(tmp_path / "b", "two") as two:
        context, options = "Water is", {"until": ["\n"], "max_gen_toks": 8}
        keys = [
            one.key("generate_until", (context, options)),
            two.key("generate_until", (context, options)),
            one.key("generate_until", (context, {**options, "max_gen_toks": 9})),
            one.key("generate_until", (context + " ", options)),
            one.key("loglikelihood", (context, options)),
        ]
        assert len(set(keys)) == len(keys)
        reordered = dict(reversed(options.items()))
        assert one.key("generate_until", (context, reordered)) == keys[0]


@pytest.mark.parametrize("torn", [b'{"key": "b", "ans', b'{"key": "b"}\n', b"\0\0\0\n"])
def test_a_torn_last_line_is_forgotten(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    with open_journal(path, "one") as journal:
        journal.add("a", 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with open_journal(path, "one") as journal:
        assert "a" in journal and "b" not in journal
        journal.add("b", 2.0)
    assert path.read_bytes() == whole + b'{"key": "b", "answer": 2.0}\n'


def test_damage_elsewhere_is_reported(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'garbage\n{"key": "a", "answer": 1.0}\n')
    damaged = pytest.raises(RarefyError, match=r"line 1 of .*journal\.jsonl")
    with damaged, open_journal(path, "one"):
        pass
    assert path.read_bytes().startswith(b"garbage")


def test_infinite_answers_survive(tmp_path):
    with open_journal(tmp_path / "j", "one") as journal:
        journal.add("a", [float("-inf"), False])
    with open_journal(tmp_path / "j", "one") as journal:
        assert journal["a"] == [float("-inf"), False]
