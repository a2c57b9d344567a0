"""Products with stored matrices: their share of the memory's read bandwidth, beside torch's.

    python bench/kernels.py [--threads 2] [--rounds 9] [--out FILE.json]

At batch 1 a product reads every weight once, so reading sets its limit: what a plain loop over the
same threads, or torch's float32 product, reads per second, whichever is more. Matrices take turns,
so many that no cache holds them all, and so do the candidates, with a few products each. The pace
of a shared machine changes within seconds: a share compares what was measured in the same round,
and the median of the rounds counts. At 256 vectors the limit is arithmetic, and what counts is the
time of torch's float32 product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import OUT, Criterion, close, machine, show
from torch.nn import functional as F

from rarefy.formats.bcq import BCQ
from rarefy.formats.integer import Int
from rarefy.kernels import library, ops_int, ops_lut, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from rarefy.formats.base import Format

    Run = Callable[[Any, Tensor], Tensor]

SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = 256
FLOATS = "torch fp32"
SHARES = {
    "int4 g128": 0.6, "int4 g64": 0.6, "int4 g64, int8 activations": 0.6,
    "int4 g64, int8 activations g64": 0.6, "int8 row": 0.7, "int8 row, int8 activations": 0.7,
}  # fmt: skip
SLACK = 1.05  # of a ratio of two medians
NEAR = 1e-5
BURST = 6  # products on end
WORKING_SET = 384 << 20  # bytes that the matrices of one candidate take: more than a last cache
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass
class Candidate:
    """A product that is timed.

    Attributes:
        name: for the table. bytes: that one product reads of its matrix.
        copies: of the matrix. run: the product with one of them.
        expected: what it should give for the first copy, where that is checked.
    """

    name: str
    bytes: int
    copies: list[Any]
    run: Run
    expected: Run | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


def main() -> None:
    """Measure both shapes, then many vectors, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUT / "kernels.json")
    options = parser.parse_args()
    if not library.available():
        raise SystemExit(f"no kernels: {library.reason()}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {"bench": "kernels", "machine": machine(0)}
    report |= {"instructions": library.instructions(), "rounds": options.rounds}
    criteria: list[Criterion] = []
    for rows, columns in SHAPES:
        shape = f"{rows} x {columns}"
        found = decode_speed(rows, columns, options.rounds)
        criteria += judged(shape, found)
        report[shape] = found | {"prefill": prefill(rows, columns, options.rounds)}
        for row in report[shape]["prefill"][1:]:
            name = f"{shape}, {TOKENS} tokens: {row['name']}, time of fp32"
            ratio = row["of_fp32"]
            criteria.append(Criterion(name, ratio, f"<= {SLACK}", ratio <= SLACK))
    close(options.out, report, criteria)


def judged(shape: str, found: dict[str, Any]) -> list[Criterion]:
    """Shares of the bandwidth, and errors."""
    criteria = []
    for row in found["products"]:
        if row["name"] in SHARES:
            least, share = SHARES[row["name"]], row["share"]
            criteria.append(
                Criterion(f"{shape}: {row['name']}, share of bandwidth", share, f">= {least}",
                          share >= least)
            )  # fmt: skip
        if row["error"] is not None:
            near = row["error"] <= NEAR
            criteria.append(
                Criterion(f"{shape}: {row['name']}, error", row["error"], f"<= {NEAR}", near)
            )
    return criteria


def decode_speed(rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """Every candidate with one vector."""
    x = torch.randn(1, columns)
    # As much at a time as a matrix of bytes has, so that what else runs disturbs both alike.
    memory = torch.randint(1 << 30, (WORKING_SET // 4,), dtype=torch.int32)
    parts = [part for part in memory.split(rows * columns // 4) if part.nbytes == rows * columns]
    reading = Candidate("reading", rows * columns, parts, lambda data, _: read(data))
    candidates = [reading, *ours(rows, columns), *torchs(rows, columns)]
    errors = {one.name: error(one, x) for one in candidates}
    take_turns(candidates, x, rounds)
    # The limit of a round is what its fastest reader reached.
    readers = [reading, *(one for one in candidates if one.name == FLOATS)]
    rates = [max(one.bytes / one.seconds[i] for one in readers) for i in range(rounds)]
    rate = statistics.median(rates)
    table = [
        {
            "name": one.name,
            "megabytes": one.bytes / 1e6,
            "milliseconds": one.median * 1e3,
            "gigabytes_per_second": one.bytes / one.median / 1e9,
            "share": statistics.median(
                one.bytes / seconds / limit
                for seconds, limit in zip(one.seconds, rates, strict=True)
            ),
            "error": errors[one.name],
        }
        for one in candidates
    ]
    head = ("product", "MB", "ms", "GB/s", "of reading", "error")
    show(f"{rows} x {columns}, one vector, {torch.get_num_threads()} threads", head,
         [tuple("" if v is None else v for v in row.values()) for row in table])  # fmt: skip
    return {"read_gigabytes_per_second": rate / 1e9, "products": table}


def read(data: Tensor) -> Tensor:
    """Read all bytes once with the library's threads."""
    call = library.library().rarefy_read
    return torch.tensor(call(data.data_ptr(), data.nbytes, torch.get_num_threads()) & 0xFF)


def take_turns(candidates: list[Candidate], x: Tensor, rounds: int) -> None:
    """Time every candidate once a round: some products on end, as in a model, of other matrices."""
    for turn in range(-1, rounds):
        for number, one in enumerate(candidates):
            # Neighbours may share their matrices: none may find the other's in the cache.
            first = BURST * turn + number * len(one.copies) // 2
            matrices = [one.copies[(first + i) % len(one.copies)] for i in range(BURST)]
            start = time.perf_counter()
            for stored in matrices:
                one.run(stored, x)
            if turn >= 0:
                one.seconds.append((time.perf_counter() - start) / BURST)


def error(one: Candidate, x: Tensor) -> float | None:
    """Relative difference in norm from what is expected."""
    if one.expected is None:
        return None
    expected = one.expected(one.copies[0], x).double()
    return float((one.run(one.copies[0], x).double() - expected).norm() / expected.norm())


def ours(rows: int, columns: int) -> list[Candidate]:
    """The library's products."""
    formats = {
        "int4 g128": Int(4, 128),
        "int4 g64": Int(4, 64),
        "int4 g64 bf16": Int(4, 64, scale_dtype="bfloat16"),
        "int8 row": Int(8, symmetric=True),
        "int8 g128": Int(8, 128),
        "int3 g64": Int(3, 64),
        "int2 g64": Int(2, 64),
    }
    found = []
    for name, fmt in formats.items():
        stored = several(fmt, rows, columns)
        found.append(Candidate(name, size(stored), stored, by_floats(fmt), decoded(fmt)))
        if fmt.bits in (4, 8):
            beside = (by_int8(fmt), integer_sums(fmt))
            found.append(Candidate(f"{name}, int8 activations", size(stored), stored, *beside))
        if name == "int4 g64":
            group = ops_int.INPUT_GROUP
            beside = (by_int8(fmt, group), integer_sums(fmt, group))
            label = f"{name}, int8 activations g{group}"
            found.append(Candidate(label, size(stored), stored, *beside))
    binary = BCQ(4, 128, offset=True)
    stored = several(binary, rows, columns)

    def look_up(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return ops_lut.BCQKernel(binary).product(x, tensors, None)

    name = "look-up table, 4 planes g128"
    return [*found, Candidate(name, size(stored), stored, look_up, decoded(binary))]


def by_floats(fmt: Int) -> Run:
    """The product with float activations."""

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return ops_int.cpu_int_linear(x, *taken(tensors), fmt.bits, fmt.group or 0)

    return run


def by_int8(fmt: Int, together: int = 0) -> Run:
    """The product with activations rounded to int8, some or all of a vector with one scale."""

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        group = fmt.group or 0
        return ops_int.cpu_int8_linear(x, *taken(tensors), None, fmt.bits, group, together)

    return run


def decoded(fmt: Format) -> Run:
    """What a product should give."""

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return x.double() @ fmt.decode(tensors).double().T

    return run


def integer_sums(fmt: Int, together: int = 0) -> Run:
    """What a product with int8 activations should give."""

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        group = fmt.group or 0
        return reference.int8_linear(x, *taken(tensors), None, fmt.bits, group, together)

    return run


def size(stored: list[dict[str, Tensor]]) -> int:
    """Bytes that a product reads."""
    return sum(tensor.nbytes for key, tensor in stored[0].items() if key != "weight_shape")


def taken(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operators' arguments."""
    zeros = tensors.get("weight_zero_point")
    return tensors["weight_packed"], tensors["weight_scale"], zeros


def several(fmt: Format, rows: int, columns: int) -> list[dict[str, Tensor]]:
    """Stored matrices of random codes and plausible scales that fill the working set."""

    def one() -> dict[str, Tensor]:
        tensors = {}
        for suffix, (size, dtype) in fmt.layout(rows, columns).items():
            if dtype in _TYPES:
                tensors[suffix] = torch.empty(size).uniform_(0.002, 0.01).to(_TYPES[dtype])
            elif dtype == "I64":
                tensors[suffix] = torch.tensor([rows, columns])
            else:
                tensors[suffix] = torch.randint(-(2**31), 2**31, size, dtype=torch.int32)
        return tensors

    first = one()
    copies = WORKING_SET // sum(tensor.nbytes for tensor in first.values())
    return [first, *({key: t.clone() for key, t in first.items()} for _ in range(copies))]


def torchs(rows: int, columns: int) -> list[Candidate]:
    """What torch has: float32, and its operators for 4 and 8 bits, which it calls private."""
    group = 128
    weight, octets = torch.randn(rows, columns), torch.randint(-128, 128, (rows, columns))
    codes = torch.randint(16, (rows, columns), dtype=torch.int32)
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    found = [Candidate(FLOATS, weight.nbytes, filled(weight), lambda w, x: F.linear(x, *w))]

    def four(stored: tuple[Tensor, ...], x: Tensor) -> Tensor:
        packed, affine = stored
        x = x.to(affine.dtype)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, affine)

    def eight(stored: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.to(stored[1].dtype), *stored)

    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        stored = filled(nibbles, torch.rand(columns // group, rows, 2).to(dtype))
        bytes_read = sum(t.nbytes for t in stored[0])
        found.append(Candidate(f"torch int4 g{group} {kind}", bytes_read, stored, four))
        stored = filled(octets.to(torch.int8), torch.rand(rows).to(dtype))
        bytes_read = sum(t.nbytes for t in stored[0])
        found.append(Candidate(f"torch int8 row {kind}", bytes_read, stored, eight))
    return found


def filled(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """So many copies that they fill the working set."""
    copies = WORKING_SET // sum(t.nbytes for t in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies))]


def prefill(rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """Times for many vectors, over that of float32."""
    x, weight = torch.randn(TOKENS, columns), torch.randn(rows, columns)
    candidates = [Candidate(FLOATS, weight.nbytes, [weight], lambda w, x: F.linear(x, w))]
    for name, fmt in {"int4 g64": Int(4, 64), "int8 row": Int(8, symmetric=True)}.items():
        stored = several(fmt, rows, columns)[:1]
        candidates.append(Candidate(name, size(stored), stored, by_floats(fmt)))
        label = f"{name}, int8 activations"
        candidates.append(Candidate(label, size(stored), stored, by_int8(fmt)))
        if fmt.bits == 4:
            run = by_int8(fmt, ops_int.INPUT_GROUP)
            label += f" g{ops_int.INPUT_GROUP}"
            candidates.append(Candidate(label, size(stored), stored, run))
    take_turns(candidates, x, max(5, rounds // 2))
    dense = candidates[0].median
    table = [
        {"name": one.name, "milliseconds": one.median * 1e3, "of_fp32": one.median / dense}
        for one in candidates
    ]
    head = ("product", "ms", "of fp32")
    show(f"{rows} x {columns}, {TOKENS} vectors", head, [tuple(row.values()) for row in table])
    return table


if __name__ == "__main__":
    main()
