"""Packages, corpora and token rows; tokenizers and wheels are made here."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import zipfile

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rarefy.data import corpora, packages, tokens
from rarefy.data.wikitext import plain_text
from rarefy.errors import RarefyError

WHEEL = "some_data-1.0-py3-none-any.whl"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    return tmp_path / "packages"


def write_wheel(path, content=b"hello"):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("some_data/file.txt", content)
    return path


def tokenizer_of(words, *, bos=False, eos=False, adds_bos=False):
    specials = ["<s>"] * bos + ["</s>"] * eos
    vocab = {word: i for i, word in enumerate(["<unk>", *specials, *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
    )


def corpus_of(*documents):
    return corpora.Corpus("made", documents, "")


def words(prefix, count):
    return [f"{prefix}{i}" for i in range(count)]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "a"))
    assert packages.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("RAREFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert packages.cache_dir() == tmp_path / "b" / "rarefy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert packages.cache_dir() == tmp_path / "c" / ".cache" / "rarefy"


def test_member_reads_the_cached_wheel_under_any_spelling(cache, monkeypatch):
    write_wheel(cache / WHEEL)
    monkeypatch.setattr(subprocess, "run", None)
    assert packages.member("Some-Data", "1.0", "some_data/file.txt") == b"hello"


def test_member_prefers_the_installed_package(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    version = importlib.metadata.version("pytest")
    assert b"pytest" in packages.member("pytest", version, "pytest/__init__.py")


def test_fetch_downloads_once(cache, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        write_wheel(f"{command[command.index('--dest') + 1]}/{WHEEL}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert packages.fetch("some-data", "1.0") == packages.fetch("some-data", "1.0") == cache / WHEEL
    assert len(calls) == 1
    assert calls[0][-1] == "some-data==1.0"
    assert [p.name for p in cache.iterdir()] == [WHEEL]


def test_fetch_explains_a_failing_pip(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no route")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RarefyError, match=r"some-data==1\.0 .*no route.*local file"):
        packages.fetch("some-data", "1.0")
    assert not list(cache.iterdir())


def test_fetch_refuses_another_hash(cache):
    write_wheel(cache / WHEEL)
    with pytest.raises(RarefyError, match="not the expected 00"):
        packages.fetch("some-data", "1.0", sha256="00")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_wheel_is_named(cache, damage):
    path = write_wheel(cache / WHEEL)
    data = path.read_bytes()
    path.write_bytes(data[:40] if damage == "cut" else data.replace(b"hello", b"hullo"))
    with pytest.raises(RarefyError, match=f"{WHEEL} is .*delete it"):
        packages.member("some-data", "1.0", "some_data/file.txt")


def test_a_missing_member_is_named(cache):
    write_wheel(cache / WHEEL)
    with pytest.raises(RarefyError, match=r"has no file some_data/other\.txt"):
        packages.member("some-data", "1.0", "some_data/other.txt")


def test_plain_text_keeps_prose_and_nothing_else():
    markup = """{{Infobox|a={{b|c}}}}
[[File:x.jpg|thumb|A [[linked]] caption]]<!-- hidden -->
'''Albedo''' ({{IPA|x}}) is, in [[physics|the physics]] of [[light]],<ref name="a">cite</ref> a
{{convert|5|km|mi}} thing<ref name="b"/> of {{lang|la|albus}}&nbsp;kind [http://a.b see here].
==Uses &amp; ways==
{| class="wikitable"
|-
| cell || {| inner
| x
|}
|}
* first ''item''
[[Category:Light]]
== See also ==
* [[Nothing]]
"""
    assert plain_text(markup).split("\n\n") == [
        "Albedo is, in the physics of light, a",
        "5 km thing of albus kind see here.",
        "Uses & ways",
        "first item",
    ]


def test_txt_is_one_document_and_jsonl_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ntwo", encoding="utf-8")
    assert corpora.load(str(tmp_path / "a.txt")).documents == ("one\n\ntwo",)
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in ("a\u2028b", " ", "c")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = corpora.load(str(tmp_path / "b.jsonl"))
    assert corpus.documents == ("a\u2028b", "c")
    assert corpus.name == "b.jsonl"


def test_several_corpora_are_joined(tmp_path):
    one, other = tmp_path / "a.txt", tmp_path / "b.jsonl"
    one.write_text("one")
    other.write_text('{"text": "two"}\n{"text": "three"}')
    corpus = corpora.load(f"{one}+{other}")
    assert corpus.documents == ("one", "two", "three")
    assert corpus.name == "a.txt+b.jsonl"
    (tmp_path / "c+d.txt").write_text("a plus in a name")
    assert corpora.load(str(tmp_path / "c+d.txt")).documents == ("a plus in a name",)
    with pytest.raises(RarefyError, match="no corpus called 'wikii'"):
        corpora.load(f"{one}+wikii")


def test_corpus_hash_depends_on_where_documents_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "c"}')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "bc"}')
    a, b = (corpora.load(str(tmp_path / f)) for f in ("a.jsonl", "b.jsonl"))
    assert a.sha256 != b.sha256


def test_messages_go_through_the_chat_template(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    tokenizer = tokenizer_of(["hi"])
    for bare in (None, tokenizer):
        with pytest.raises(RarefyError, match=r"line 1 has 'messages'.*no chat template"):
            corpora.load(str(path), bare)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert corpora.load(str(path), tokenizer).documents == ("[user] hi",)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RarefyError, match=r"line 1: the chat template refuses.*must alternate"):
        corpora.load(str(path), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"ab\xff", r"not UTF-8 \(byte 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}', "line 1 needs a string 'text'"),
        ("a.jsonl", b'["a"]', "line 1 needs a string 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}', "not Unicode"),
        ("a.csv", b"a", "must end in .txt or .jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RarefyError, match=message):
        corpora.load(str(tmp_path / name))


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(RarefyError, match="no corpus called 'wikii'; did you mean 'wiki'"):
        corpora.load("wikii")
    with pytest.raises(RarefyError, match=r"none\.txt does not exist"):
        corpora.load(str(tmp_path / "none.txt"))
    with pytest.raises(RarefyError, match="not a file"):
        corpora.load(str(tmp_path))


def test_calibration_is_the_shuffled_stream_cut_into_rows():
    texts = [words("a", 3), words("b", 4), words("c", 5)]
    tokenizer = tokenizer_of([word for text in texts for word in text], bos=True, eos=True)
    corpus = corpus_of(*(" ".join(text) for text in texts))
    rows = tokens.calibration(corpus, tokenizer, 3, 4, seed=1)
    stream = tokenizer.convert_ids_to_tokens(rows.ids.flatten().tolist())
    pieces = " ".join(stream).split(" <s> ")
    assert set(pieces[:-1]) < set(corpus.documents)
    assert corpus.documents[int(rows.document[0])] == pieces[0]
    for row, index in zip(rows.ids, rows.document, strict=True):
        first = tokenizer.convert_ids_to_tokens(row.tolist())[0]
        assert first == "<s>" or first in texts[int(index)]
    assert rows.tokens == 12


def test_calibration_is_seeded():
    vocabulary = words("w", 60)
    corpus, tokenizer = corpus_of(*vocabulary), tokenizer_of(vocabulary)
    one, same, other = (tokens.calibration(corpus, tokenizer, 5, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(one.ids, same.ids)
    assert one.sha256 == same.sha256 != other.sha256
    assert one.sample.split() == [vocabulary[i - 1] for i in one.ids[0].tolist()]


@pytest.mark.parametrize(("bos", "eos", "expected"), [(1, 1, "<s>"), (0, 1, "</s>"), (0, 0, None)])
def test_separator_prefers_bos_then_eos(bos, eos, expected):
    tokenizer = tokenizer_of(["a"], bos=bool(bos), eos=bool(eos))
    length = 3 if expected else 2
    row = tokens.calibration(corpus_of("a", "a"), tokenizer, 1, length, 0).ids[0].tolist()
    between = [expected] if expected else []
    assert tokenizer.convert_ids_to_tokens(row) == ["a", *between, "a"]


def test_a_short_corpus_says_what_would_work():
    tokenizer = tokenizer_of(["a"])
    corpus = corpus_of("a " * 10)
    with pytest.raises(RarefyError, match=r"10 tokens.*use --sequences 2,"):
        tokens.calibration(corpus, tokenizer, 3, 4, 0)
    with pytest.raises(RarefyError, match="--length of at most 10"):
        tokens.calibration(corpus, tokenizer, 1, 20, 0)
    with pytest.raises(RarefyError, match="--length of at most 10"):
        tokens.held_out(corpus, tokenizer, 1, 20)
    with pytest.raises(RarefyError, match=r"has 2 windows of 4.*use --sequences 2,"):
        tokens.held_out(corpus, tokenizer, 3, 4)
    with pytest.raises(RarefyError, match="makes no token"):
        tokens.calibration(corpus_of(" "), tokenizer, 1, 4, 0)
    with pytest.raises(RarefyError, match="--sequences must be at least 1"):
        tokens.calibration(corpus, tokenizer, 0, 4, 0)
    with pytest.raises(RarefyError, match="--length must be at least 2"):
        tokens.held_out(corpus, tokenizer, 1, 1)


def test_held_out_takes_first_windows_first_and_stays_inside_documents():
    texts = [words("a", 7), words("b", 2), words("c", 9)]
    tokenizer = tokenizer_of([word for text in texts for word in text], bos=True)
    rows = tokens.held_out(corpus_of(*(" ".join(t) for t in texts)), tokenizer, 5, 3)
    seen = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows.ids]
    a, _, c = texts
    assert seen == [a[:3], c[:3], a[3:6], c[3:6], c[6:9]]
    assert rows.document.tolist() == [0, 2, 0, 2, 2]


def test_held_out_begins_with_bos_only_where_the_tokenizer_adds_it():
    tokenizer = tokenizer_of(words("a", 4), bos=True, adds_bos=True)
    rows = tokens.held_out(corpus_of("a0 a1 a2 a3"), tokenizer, 2, 3)
    seen = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows.ids]
    assert seen == [["<s>", "a0", "a1"], ["<s>", "a2", "a3"]]


def test_held_out_concatenates_short_documents():
    tokenizer = tokenizer_of(["a", "b", "c", "d"], eos=True)
    rows = tokens.held_out(corpus_of("a a", "b b", "c c", "d d"), tokenizer, 2, 4)
    seen = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows.ids]
    assert seen == [["a", "a", "</s>", "b"], ["b", "</s>", "c", "c"]]
    assert rows.document.tolist() == [0, 1]


def test_long_text_is_cut_without_a_warning(caplog):
    tokenizer = tokenizer_of(["a"])
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger="transformers")
    try:
        tokens.held_out(corpus_of("a " * 10), tokenizer, 1, 8)
        assert not caplog.records
        tokenizer("a " * 10)
        assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_check_vocabulary_finds_the_wrong_tokenizer():
    rows = tokens.held_out(corpus_of("a b"), tokenizer_of(["a", "b"]), 1, 2)
    tokens.check_vocabulary(rows, 3)
    with pytest.raises(RarefyError, match=r"token id 2.*only 2 tokens.*wrong tokenizer"):
        tokens.check_vocabulary(rows, 2)


@pytest.mark.slow
@pytest.mark.network
def test_named_corpora_have_the_published_text():
    expected = {"web": (1150, 168_453), "wiki-passages": (1000, 98_879), "wiki": (103, None)}
    for name, (documents, count) in expected.items():
        corpus = corpora.load(name)
        counted = sum(len(document.split()) for document in corpus.documents)
        assert len(set(corpus.documents)) == documents
        assert counted == count if count else 400_000 < counted < 456_000
    leftovers = ("{{", "[[", "<ref", "''", "&nbsp;", "http://")
    text = "\n".join(corpora.load("wiki").documents)
    assert sum(text.count(mark) for mark in leftovers) < 5
