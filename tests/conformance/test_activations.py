"""The contract of an activation format, on activations that are awkward to round."""

from __future__ import annotations

import pytest
import torch

from rarefy.formats.activation import ACTIVATIONS, Activation, IntActivation
from rarefy.formats.llm_int8 import LLMInt8
from rarefy.recipe import activation_from, describe

# A new activation format adds a line here: (instance, bits of a code).
ACTIVATION_SAMPLES: dict[str, list[tuple[Activation, int]]] = {
    "int": [
        *((IntActivation(bits), bits) for bits in range(2, 9)),
        (IntActivation(4, per="tensor"), 4),
        (IntActivation(8, per="group"), 8),
        (IntActivation(4, per="group", group=27), 4),
        *((IntActivation(bits, per="tensor", dynamic=False), bits) for bits in (2, 4, 8)),
    ],
    "llm-int8": [(LLMInt8(), 8), (LLMInt8(threshold=40.0), 8)],
}

_ALL = [pair for pairs in ACTIVATION_SAMPLES.values() for pair in pairs]
every_activation = pytest.mark.parametrize(
    ("rounding", "bits"), [pytest.param(a, b, id=a.label()) for a, b in _ALL]
)


def tokens() -> torch.Tensor:
    """[2, 8, 40]: ordinary tokens, then zero, constant, spiked, tiny, large, one-sided ones."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 40, generator=g)
    x[0, 1] = 0
    x[0, 2] = -0.37
    x[0, 3, 7] = 500.0
    x[0, 4] *= 1e-9
    x[0, 5] *= 1e4
    x[0, 6].abs_()
    x[1, 0, ::3] = 0
    x[1, 1] = 1e-42
    return x


def scale_for(rounding: Activation, x: torch.Tensor, share: float = 1.0) -> torch.Tensor | None:
    return rounding.scale(share * x.abs().flatten(0, -2).amax(0)) if rounding.static else None


@pytest.mark.parametrize("name", [card.name for card in ACTIVATIONS])
def test_has_samples(name: str) -> None:
    if not ACTIVATION_SAMPLES.get(name):
        pytest.fail(
            f"add samples for the activation format {name!r} to ACTIVATION_SAMPLES in "
            "tests/conformance/test_activations.py"
        )


@every_activation
def test_rounding_twice_is_rounding_once(rounding: Activation, bits: int) -> None:
    x = tokens()
    scale = scale_for(rounding, x)
    once = rounding.round(x, scale)
    twice = rounding.round(once, scale)
    if rounding.static:
        assert torch.equal(twice, once)
    else:  # the scale is found anew, from a peak that was rounded
        torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


@every_activation
def test_what_shares_a_scale_has_no_more_values_than_codes(rounding: Activation, bits: int) -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    grouped = isinstance(rounding, IntActivation) and rounding.per == "group"
    together = rounding.group if grouped else 5000
    for share in (1.0, 0.4):  # the second clips
        rounded = rounding.round(x, scale_for(rounding, x, share))
        for row in rounded:
            for part in row.split(together):
                assert 2 < len(part.unique()) <= 2**bits


@every_activation
def test_zero_stays_zero_and_signs_stay(rounding: Activation, bits: int) -> None:
    x = tokens()
    rounded = rounding.round(x, scale_for(rounding, x))
    assert not rounded[x == 0].any()
    assert bool((rounded * x >= 0).all())


@every_activation
def test_shape_type_and_input_stay(rounding: Activation, bits: int) -> None:
    x = tokens()
    before, scale = x.clone(), scale_for(rounding, x)
    rounded = rounding.round(x, scale)
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    assert rounded.isfinite().all()
    assert torch.equal(x, before)
    assert scale is None or (scale.shape, scale.dtype) == ((1,), torch.float32)
    assert torch.equal(rounding.round(x, scale), rounded)
    # A stored scale is what makes a static format: tokens may then be rounded one by one.
    if rounding.static:
        assert torch.equal(rounding.round(x[0, 3], scale), rounded[0, 3])


@every_activation
def test_more_of_it_stays_than_goes(rounding: Activation, bits: int) -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    error = (rounding.round(x, scale_for(rounding, x)) - x).square().sum() / x.square().sum()
    assert error < 20 * 4.0**-bits


@every_activation
def test_survives_plain_data(rounding: Activation, bits: int) -> None:
    assert activation_from(describe(rounding)) == rounding
    assert describe(rounding)["format"] == ACTIVATIONS.name_of(rounding)
    assert str(bits) in rounding.label()
