"""The contract of a signal: one batch, one target, token by token, whatever surrounds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from policies import Table

from rarefy.errors import RarefyError
from rarefy.losses.base import LOSSES, Reading, Target, kinds
from rarefy.losses.divergence import top_k
from rarefy.losses.forward_kl import ForwardKL
from rarefy.objectives.rows import Rows
from rarefy.signals.base import SIGNALS, Signal
from rarefy.signals.cached import Cached
from rarefy.signals.hidden import Hidden
from rarefy.signals.teacher import Teacher
from rarefy.teachers.base import TeacherCapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# (a folder) -> what is tried; a signal without an entry is tried with its defaults.
SAMPLES: dict[str, list[Callable[[str], Signal]]] = {
    "cached": [
        lambda folder: Cached(folder, 3),
        lambda folder: Cached(folder, 64),
        lambda folder: Cached(folder, 2, tail=False),
    ],
    "hidden": [lambda _: Hidden(), lambda _: Hidden("0:1,1:2,-1:-1")],
}

TEACHER = Table(1, vocabulary=5, length=4)


def params() -> list[Any]:
    return [
        pytest.param(make, id=f"{card.name} {i}")
        for card in SIGNALS
        for i, make in enumerate(SAMPLES.get(card.name) or [lambda _, cls=card.cls: cls()])
    ]


@pytest.fixture(params=params())
def signal(request: pytest.FixtureRequest, tmp_path: Path) -> Signal:
    made: Signal = request.param(str(tmp_path / "signal"))
    return made


def batch() -> Rows:
    texts = [[1, 2, 3], [4], [2, 2], [], [3, 1, 4]]
    return Rows.join([torch.tensor([0])] * 5, [torch.tensor(t, dtype=torch.long) for t in texts])


def tensors(target: Target) -> list[torch.Tensor]:
    top = target.top
    found = [target.logits, target.labels, *target.states]
    found += [top.log_probs, top.indices, top.tail] if top else []
    return [tensor for tensor in found if tensor is not None]


def same(a: Target, b: Target) -> None:
    assert len(tensors(a)) == len(tensors(b)) > 0
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def part(target: Target, keep: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[keep] for tensor in tensors(target)]


def test_gives_what_it_declares(signal: Signal) -> None:
    rows = batch()
    target = signal.target(TEACHER, rows)
    assert kinds(target) == signal.gives
    assert len(target.states) == len(signal.student_layers)
    for tensor in tensors(target):
        assert len(tensor) == rows.tokens
        assert not tensor.requires_grad
    known = frozenset().union(*(card.cls.accepts for card in LOSSES))
    assert signal.gives <= known


def test_one_batch_one_target(signal: Signal) -> None:
    first = signal.target(TEACHER, batch())
    signal.target(TEACHER, Rows.text(torch.tensor([[0, 4, 4, 1]])))
    same(signal.target(TEACHER, batch()), first)


def test_a_row_does_not_depend_on_the_others(signal: Signal) -> None:
    rows = batch()
    order = torch.tensor([4, 0, 3, 2, 1])
    shuffled = Rows(rows.ids[order], rows.counted[order], rows.valid[order])
    owner = rows.counted.nonzero()[:, 0]
    places = torch.cat([(owner == row).nonzero()[:, 0] for row in order])
    whole = signal.target(TEACHER, rows)
    for a, b in zip(tensors(signal.target(TEACHER, shuffled)), part(whole, places), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_padding_takes_no_part(signal: Signal) -> None:
    rows = batch()
    pad = torch.zeros(5, 2, dtype=torch.bool)
    wider = Rows(
        torch.cat([rows.ids, torch.full((5, 2), 3)], 1),
        torch.cat([rows.counted, pad], 1),
        torch.cat([rows.valid, pad], 1),
    )
    same(signal.target(TEACHER, wider), signal.target(TEACHER, rows))


def test_only_counted_tokens_are_described(signal: Signal) -> None:
    rows = batch()
    counted = rows.counted.clone()
    counted[0, 1] = counted[4, 3] = False
    fewer = Rows(rows.ids, counted, rows.valid)
    kept = counted[rows.counted]
    whole = signal.target(TEACHER, rows)
    for a, b in zip(tensors(signal.target(TEACHER, fewer)), part(whole, kept), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_is_the_teacher_that_speaks(signal: Signal) -> None:
    """A student equal to the teacher has nothing to learn; another one has."""
    rows = batch()
    target = signal.target(TEACHER, rows)
    for student, distance in ((TEACHER, 0.0), (Table(2, 5, 4), 0.1)):
        reading = student.read(rows, signal.student_layers)
        if not signal.gives & ForwardKL.accepts or "top-k without tail" in signal.gives:
            continue
        found = float(ForwardKL().per_token(reading, target).mean())
        assert found == 0 if distance == 0 else found > distance


def test_refuses_a_missing_or_too_weak_teacher(signal: Signal) -> None:
    class Weak(Table):
        level = 1

    with pytest.raises(RarefyError, match="teacher"):
        signal.target(None, batch())
    with pytest.raises(TeacherCapabilityError, match=r"level T\d .*is of level T1"):
        signal.target(Weak(1, 5, 4), batch())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_stored_equals_fresh(tmp_path: Path, temperature: float, k: int) -> None:
    rows = batch()
    stored = Cached(str(tmp_path), k)
    logits = Teacher().target(TEACHER, rows).logits
    assert logits is not None
    expected = Target(top=top_k(logits, k, temperature))
    same(stored.target(TEACHER, rows, temperature), expected)
    alone = Cached(str(tmp_path), k, read_only=True).target(None, rows, temperature)
    same(alone, expected)
    if k == 5:
        reading = Reading(Table(2, 5, 4).read(rows).logits)
        torch.testing.assert_close(
            ForwardKL().per_token(reading, alone, temperature),
            ForwardKL().per_token(reading, Target(logits=logits), temperature),
        )


def test_stored_rows_ask_the_teacher_once(tmp_path: Path) -> None:
    teacher, stored = Table(1, 5, 4), Cached(str(tmp_path), 3)
    stored.target(teacher, batch())
    assert len(teacher.seen) == 1
    rows = batch()
    stored.target(teacher, Rows(rows.ids[1:3], rows.counted[1:3], rows.valid[1:3]))
    assert len(teacher.seen) == 1
    stored.target(teacher, rows, 2.0)
    assert len(teacher.seen) == 2
    Cached(str(tmp_path), 2).target(teacher, rows)
    assert len(teacher.seen) == 3
    stored.target(teacher, Rows.text(torch.tensor([[0, 4, 4]])))
    assert len(teacher.seen) == 4


def test_stored_distributions_belong_to_one_teacher(tmp_path: Path) -> None:
    Cached(str(tmp_path), 3).target(TEACHER, batch())
    with pytest.raises(RarefyError, match="another teacher's"):
        Cached(str(tmp_path), 3).target(Table(2, 5, 4), batch())


def test_read_only_refuses_what_is_not_there(tmp_path: Path) -> None:
    reader = Cached(str(tmp_path), 3, read_only=True)
    assert reader.level == 0
    with pytest.raises(RarefyError, match="holds no teacher's distributions"):
        reader.target(None, batch())
    Cached(str(tmp_path), 3).target(TEACHER, batch())
    with pytest.raises(RarefyError, match=r"is not in .* read_only"):
        reader.target(TEACHER, Rows.text(torch.tensor([[0, 4, 4]])))


@pytest.mark.parametrize("layers", ["", "1", "1:2:3", "a:b", "1:2,", "1-2"])
def test_layers_that_are_no_pairs(layers: str) -> None:
    with pytest.raises(ValueError, match="student:teacher pairs"):
        Hidden(layers)


def test_hidden_states_are_those_of_the_mapped_layers() -> None:
    rows = batch()
    target = Hidden("0:2,1:0").target(TEACHER, rows)
    every = TEACHER.hidden(rows.ids, rows.valid)
    assert torch.equal(target.states[0], every[2][rows.predicting])
    assert torch.equal(target.states[1], every[0][rows.predicting])
