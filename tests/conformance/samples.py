"""Instances of the registered classes that the conformance suites try.

A method without an entry here is tried with its default options (a solver with the formats of its
family), so a new file is covered at once; an entry in ``FORMAT_SAMPLES`` or ``SOLVER_SAMPLES``
gives it harder cases.
"""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.formats.base import FORMATS
from rarefy.formats.bcq import BCQ
from rarefy.formats.bilevel import Bilevel
from rarefy.formats.floating import Float
from rarefy.formats.ggml import TYPES, Ggml
from rarefy.formats.integer import Int
from rarefy.formats.low_rank import LowRank
from rarefy.formats.nf4 import NF4
from rarefy.formats.sparse import Sparse
from rarefy.solvers.asvd import ASVD
from rarefy.solvers.awq_clip import AWQClip
from rarefy.solvers.base import SOLVERS
from rarefy.solvers.dsnot import DSnoT
from rarefy.solvers.gptq import GPTQ
from rarefy.solvers.nearest import Nearest
from rarefy.solvers.sparsegpt import SparseGPT
from rarefy.solvers.svd_llm import Whitened
from rarefy.solvers.wanda import Wanda
from rarefy.solvers.wanda_variant import WandaVariant

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
    "bilevel": [
        *(Bilevel(bits, group=16, zero_bits=min(8, bits + 2)) for bits in range(2, 9)),
        Bilevel(4, group=7, scale_bits=3, zero_bits=6),
        Bilevel(3, group=40, zero_bits=3, rule="minmax"),
        Bilevel(2, group=64, scale_bits=2, zero_bits=5, **_BF16),
        Bilevel(8, group=1, scale_bits=6, zero_bits=8),
    ],
    "ggml": [Ggml(name) for name in TYPES],
    "nf4": [NF4(), NF4(double_quantization=False)],
    "bcq": [
        *(BCQ(bits, group=16) for bits in range(1, 5)),
        BCQ(3, group=None),
        BCQ(3, group=64, offset=False),
        BCQ(2, group=40, **_BF16),
        BCQ(4, group=None, offset=False, scale_dtype="float32"),
        BCQ(3, group=24, offset=False, rule="greedy"),
        *(BCQ(bits, group=16, rule="uniform") for bits in (2, 3, 8)),
        BCQ(4, group=None, rule="uniform", **_BF16),
        BCQ(2, group=8, rule="uniform", offset=False),
    ],
    "float": [Float("float16"), Float("bfloat16"), Float("float32")],
    "sparse": [
        Sparse(0.5),
        Sparse(0.7, scope="matrix", values=Float("bfloat16")),
        Sparse(0.55, scope="row", values=Int(4)),
        Sparse(0.4, scope="matrix", values=Int(3, group=16)),
        Sparse(0.0, values=Float("float32")),
        Sparse(0.3, scope="free", values=Int(8, symmetric=True)),
        Sparse(kept=2, of=4),
        Sparse(kept=2, of=4, values=Int(4, group=16)),
        Sparse(kept=1, of=4, values=Int(3, group=24, rule="mse", **_BF16)),
        Sparse(kept=3, of=7, values=Float("bfloat16")),
        Sparse(0.4, values=Bilevel(4, group=16)),
        Sparse(0.5, values=BCQ(3, group=16, rule="uniform")),
    ],
    "low-rank": [LowRank(0.9), LowRank(0.8, dtype="bfloat16"), LowRank(rank=2, dtype="float32")],
}

_INT_TARGETS = (Int(4), Int(3, group=16), Int(2, group=24, symmetric=True, rule="mse"))
_F32 = Float("float32")
_SPARSE_TARGETS = (
    Sparse(0.5, values=_F32),
    Sparse(0.6, scope="matrix", values=_F32),
    Sparse(kept=1, of=2, values=_F32),
    Sparse(0.4, values=Int(4)),
    Sparse(kept=1, of=2, values=Int(3, group=16)),
)
_BINARY_TARGETS = (BCQ(3, group=16, rounds=4), BCQ(2, group=None, offset=False, rounds=4))
_THIN_TARGETS = (LowRank(0.6, dtype="float32"), LowRank(rank=3, dtype="float32"))

SOLVER_SAMPLES: dict[str, list[tuple[Any, Any]]] = {
    "nearest": [
        (Nearest(), fmt)
        for fmt in (*_INT_TARGETS, _F32, *_SPARSE_TARGETS, *_THIN_TARGETS, *_BINARY_TARGETS)
    ],
    "awq-clip": [(AWQClip(), fmt) for fmt in _INT_TARGETS],
    "wanda-variant": [
        (WandaVariant(), Sparse(share, scope="free", values=values))
        for share in (0.4, 0.6)
        for values in (_F32, Int(4))
    ],
    # The threshold has the inputs' unit.
    "dsnot": [(DSnoT(threshold=0.0), fmt) for fmt in _SPARSE_TARGETS],
    "wanda": [(Wanda(), fmt) for fmt in _SPARSE_TARGETS],
    "sparsegpt": [(SparseGPT(), fmt) for fmt in (*_SPARSE_TARGETS, *_INT_TARGETS)],
    "asvd": [(ASVD(), fmt) for fmt in _THIN_TARGETS],
    "svd-llm": [(Whitened(), fmt) for fmt in _THIN_TARGETS],
    "gptq": [
        (GPTQ(activation_order=order, static_groups=static, block=7), fmt)
        for order in (False, True)
        for static in (False, True)
        for fmt in (*_INT_TARGETS, *_SPARSE_TARGETS, *_BINARY_TARGETS)
    ],
}


_TARGETS_BY_FAMILY = {
    "quantization": _INT_TARGETS,
    "pruning": _SPARSE_TARGETS,
    "low-rank": _THIN_TARGETS,
}


def samples(role: str, name: str) -> list[Any]:
    """What is tried of a registered format or solver; empty when it has no defaults to try."""
    table: dict[str, list[Any]] = {"format": FORMAT_SAMPLES, "solver": SOLVER_SAMPLES}[role]
    if name in table:
        return table[name]
    card: Any = (FORMATS if role == "format" else SOLVERS).card(name)
    if ... in card.options.values():
        return []
    if role == "format":
        return [card.cls()]
    return [(card.cls(), fmt) for fmt in _TARGETS_BY_FAMILY.get(card.family, _INT_TARGETS)]


def require_samples(role: str, name: str) -> None:
    """Fail with the mend when a registered name is not tried."""
    if not samples(role, name):
        pytest.fail(
            f"add samples for the {role} {name!r} to {role.upper()}_SAMPLES in "
            "tests/conformance/samples.py: an option of it has no default"
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
        for i, fmt in enumerate(samples("format", name))
    ]


def solver_params(*, calibrated: bool | None = None) -> list[Any]:
    """One pytest parameter (solver, format) for each sample of each registered solver."""
    return [
        pytest.param(solver, fmt, id=f"{name} {i} {fmt.label()}")
        for name in registered_solvers()
        for i, (solver, fmt) in enumerate(samples("solver", name))
        if calibrated is None or bool(solver.needs) == calibrated
    ]
