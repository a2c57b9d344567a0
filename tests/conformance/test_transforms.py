"""The contract of a transform: another basis, the same function."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from planted import moved, planted, tensors, transformed, watching
from tiny import save_tiny

from rarefy.formats.integer import Int
from rarefy.transforms.awq import AWQ
from rarefy.transforms.base import TRANSFORMS, EdgeView, Transform
from rarefy.transforms.smoothquant import SmoothQuant

if TYPE_CHECKING:
    from pathlib import Path

# A new transform adds a line here.
TRANSFORM_SAMPLES: dict[str, list[Transform]] = {
    "smoothquant": [SmoothQuant(), SmoothQuant(0.85, inner=True, value=True)],
    "awq": [AWQ(), AWQ(duo=True)],
}

_ALL = [(name, i, t) for name, some in TRANSFORM_SAMPLES.items() for i, t in enumerate(some)]
every_transform = pytest.mark.parametrize(
    "transform", [pytest.param(t, id=f"{name} {i}") for name, i, t in _ALL]
)
FMT = Int(3, 32)


@pytest.mark.parametrize("name", [card.name for card in TRANSFORMS])
def test_has_samples(name: str) -> None:
    if not TRANSFORM_SAMPLES.get(name):
        pytest.fail(
            f"add samples for the transform {name!r} to TRANSFORM_SAMPLES in "
            "tests/conformance/test_transforms.py"
        )


@every_transform
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt2"])
def test_the_function_stays_and_the_weights_do_not(
    transform: Transform, family: str, tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "dense")
    out = transformed(source, tmp_path / "out", transform, FMT)
    assert moved(source, out) <= 1e-4
    before, after = tensors(source), tensors(out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert any(not torch.allclose(before[n], after[n], rtol=0.01) for n in before)


@every_transform
def test_loud_channels_do_not_break_it(transform: Transform, tmp_path: Path) -> None:
    source = planted("gemma2", tmp_path, 100)
    out = transformed(source, tmp_path / "out", transform, FMT)
    assert moved(source, out) <= 1e-4


@every_transform
def test_factors_are_positive_and_one_for_each_channel(
    transform: Transform, tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    with watching(type(transform)) as seen:
        transformed(source, tmp_path / "out", transform, FMT)
    assert len(seen) == 3 * 4
    answers = [(view, answer) for view, answer in seen if answer is not None]
    assert answers
    for view, answer in answers:
        assert answer.factors.shape == (view.width,)
        assert bool((answer.factors.isfinite() & (answer.factors > 0)).all())


@every_transform
def test_what_it_is_shown_is_untouched_and_the_answer_repeats(
    transform: Transform, tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    with watching(type(transform)) as seen:
        transformed(source, tmp_path / "out", transform, FMT)
    for view, answer in seen:
        shown = _copy(view)
        again = transform.fit(shown)
        assert (again is None) == (answer is None)
        if again is not None and answer is not None:
            assert torch.equal(again.factors, answer.factors)
            assert again.notes == answer.notes
        for a, b in zip(shown.readers, view.readers, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(shown.moments.peak, view.moments.peak)
        assert torch.equal(shown.moments.size, view.moments.size)
        assert shown.gram is None or torch.equal(shown.gram, view.gram)


@every_transform
def test_two_runs_write_the_same_weights(transform: Transform, tmp_path: Path) -> None:
    source = save_tiny("gemma2", tmp_path / "dense")
    a, b = (tensors(transformed(source, tmp_path / out, transform, FMT)) for out in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _copy(view: EdgeView) -> EdgeView:
    gram = None if view.gram is None else view.gram.clone()
    moments = replace(view.moments, peak=view.moments.peak.clone(), size=view.moments.size.clone())
    readers = tuple(W.clone() for W in view.readers)
    return replace(view, readers=readers, moments=moments, gram=gram)
