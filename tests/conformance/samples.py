"""Instances of the registered classes that the conformance suites try.

A new format adds a line to ``FORMAT_SAMPLES``; a new solver adds (solver, format) pairs to
``SOLVER_SAMPLES``. The suites themselves stay as they are.
"""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.formats.base import FORMATS
from rarefy.formats.integer import Int
from rarefy.solvers.base import SOLVERS
from rarefy.solvers.gptq import GPTQ
from rarefy.solvers.nearest import Nearest

_BF16 = {"scale_dtype": "bfloat16"}

FORMAT_SAMPLES: dict[str, list[Any]] = {
    "int": [
        *(Int(bits, group=16) for bits in range(2, 9)),
        Int(4),
        Int(4, symmetric=True),
        Int(3, group=64),
        Int(3, group=40, symmetric=True),
        Int(5, group=7, rule="mse"),
        Int(4, group=16, symmetric=True, rule="mse", **_BF16),
        Int(2, group=40, rule="mse", **_BF16),
        Int(8, **_BF16),
        Int(8, symmetric=True, **_BF16),
    ],
}

_INT_TARGETS = (Int(4), Int(3, group=16), Int(2, group=24, symmetric=True, rule="mse"))

SOLVER_SAMPLES: dict[str, list[tuple[Any, Any]]] = {
    "nearest": [(Nearest(), fmt) for fmt in _INT_TARGETS],
    "gptq": [
        (GPTQ(activation_order=order, static_groups=static, block=7), fmt)
        for order in (False, True)
        for static in (False, True)
        for fmt in _INT_TARGETS
    ],
}


def require_samples(role: str, name: str) -> None:
    """Fail with the mend when a registered name is not tried."""
    table = {"format": FORMAT_SAMPLES, "solver": SOLVER_SAMPLES}[role]
    if not table.get(name):
        pytest.fail(
            f"add samples for the {role} {name!r} to {role.upper()}_SAMPLES in "
            "tests/conformance/samples.py"
        )


def registered_formats() -> list[str]:
    return [card.name for card in FORMATS]


def registered_solvers() -> list[str]:
    return [card.name for card in SOLVERS]


def format_params() -> list[Any]:
    """One pytest parameter for each sample of each registered format."""
    return [
        pytest.param(fmt, id=f"{fmt.label()} {i}")
        for name in registered_formats()
        for i, fmt in enumerate(FORMAT_SAMPLES.get(name, ()))
    ]


def solver_params(*, needs_gram: bool | None = None) -> list[Any]:
    """One pytest parameter (solver, format) for each sample of each registered solver."""
    return [
        pytest.param(solver, fmt, id=f"{name} {i} {fmt.label()}")
        for name in registered_solvers()
        for i, (solver, fmt) in enumerate(SOLVER_SAMPLES.get(name, ()))
        if needs_gram is None or solver.needs_gram == needs_gram
    ]
