"""Grid rules of binary coding: ``w ~ beta + sum_i alpha_i b_i`` with signs ``b_i``, group by group.

    greedy        b_i = sign(r)    alpha_i = mean |r|    r <- r - alpha_i b_i
    alternating   alpha, beta <- least squares under the signs;  signs <- nearest of the 2^q sums

The alternation (Xu et al., 2018, arXiv 1802.00150; LUT-GEMM's own) never raises the error, since
each half-step is a minimum. It finds a minimum near its start, and from the greedy start at 4 bits
that is worse than rounding to nearest; so it is started from the uniform grid, too.

Symbols: W [m, G, g] weights in groups, h [G, g] weight of each column's squared error, q planes,
A [m, G, q + 1] the scales by falling size, then the offset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rarefy.rules.ranges import minmax

if TYPE_CHECKING:
    from collections.abc import Iterator

# Equal planes, or fewer columns than scales, leave the normal matrix singular: a share of its
# largest entry decides then, not the last bits of sums. It is far less than storing scales loses.
_RIDGE = 1e-8
_LESS = 1e-12  # of a group's energy: errors that differ by less are equal


def signs(bits: int, like: torch.Tensor) -> torch.Tensor:
    """The signs of every code, [2^q, q]: +1 where bit i of the code is set, -1 elsewhere."""
    codes = torch.arange(1 << bits, device=like.device).unsqueeze(1)
    places = torch.arange(bits, device=like.device)
    return ((codes >> places & 1) * 2 - 1).to(like.dtype)


def sums(A: torch.Tensor) -> torch.Tensor:
    """The value of every code [..., 2^q], added up from the offset on, in the order of the planes.

    Decoding adds in the same order, so that both have the same bits.
    """
    bits = A.shape[-1] - 1
    value = A[..., bits:]
    for i, column in enumerate(signs(bits, A).T):
        value = value + A[..., i : i + 1] * column
    return value


def nearest(W: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The code whose value is nearest to each weight.

    Args:
        W: [..., g]. values: of every code, [..., 2^q], in any order.

    Returns:
        int64 [..., g]; of two equally near values the lower one's.
    """
    ascending, order = values.sort(stable=True, dim=-1)
    low, high = ascending[..., :-1], ascending[..., 1:]
    middle = (low + high) / 2
    # The middle of two neighbouring numbers may be rounded to the upper one, which must keep its
    # own code.
    middle = torch.where(middle >= high, low, middle)
    return order.gather(-1, torch.searchsorted(middle.contiguous(), W.contiguous()))


def greedy(W: torch.Tensor, h: torch.Tensor, bits: int) -> torch.Tensor:
    """One plane after the other, each fitting what the ones before it left; no offset."""
    total = h.sum(-1).clamp(min=torch.finfo(h.dtype).tiny)
    R, found = W, []
    for _ in range(bits):
        alpha = (R.abs() * h).sum(-1) / total
        # A residual of zero has no sign of its own; a plane needs one.
        R = torch.where(R >= 0, R - alpha.unsqueeze(-1), R + alpha.unsqueeze(-1))
        found.append(alpha)
    return torch.stack([*found, torch.zeros_like(total.expand_as(found[0]))], -1)


def uniform(W: torch.Tensor, bits: int, offset: bool) -> torch.Tensor:
    """Evenly spaced sums: the min-max grid of rounding to nearest, or one centred on zero."""
    lo, hi = minmax(W)
    levels = (1 << bits) - 1
    if not offset:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    step = (hi - lo) / levels
    centre = (lo + hi) / 2
    if offset:  # zero lies on the grid
        zero = (-lo / torch.where(step > 0, step, torch.ones_like(step))).round()
        centre = step * (levels / 2 - zero)
    return torch.stack([step * 2.0**i for i in range(bits - 2, -2, -1)] + [centre], -1)


def alternate(
    W: torch.Tensor, h: torch.Tensor, A: torch.Tensor, offset: bool, rounds: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Refine scales and offset; yields them and the error after each half-step.

    Args:
        W: [m, G, g]. h: [G, g], zero for columns that are not there. A: [m, G, q + 1], the start.
        offset: whether the offset is free; otherwise it stays what it is.
        rounds: of two half-steps each.

    Yields:
        (A [m, G, q + 1], squared error of each group [m, G], float64), first of the start.
    """
    bits = A.shape[-1] - 1
    P = torch.nn.functional.pad(signs(bits, A), (0, 1), value=1.0).double()
    P[:, bits] *= offset
    energy = _energy(W, h)
    fixed = 0.0 if offset else A[..., bits:].double()

    def score(A: torch.Tensor) -> torch.Tensor:
        values = sums(A).double()
        return energy + (count * values.square() - 2 * total * values).sum(-1)

    def assign(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = nearest(W, sums(A))
        empty = torch.zeros(*W.shape[:-1], 1 << bits, dtype=torch.float64, device=W.device)
        weights = h.double().expand(W.shape)
        return (
            empty.scatter_add(-1, codes, weights),
            empty.scatter_add(-1, codes, weights * W),
        )

    count, total = assign(A)
    error = score(A)
    yield A, error
    for _ in range(rounds):
        # Written out: a matrix product's last bits depend on how many rows it has.
        normal = [[(count * (a * b)).sum(-1) for a in P.T] for b in P.T]
        right = [((total - fixed * count) * a).sum(-1) for a in P.T]
        matrix = torch.stack([torch.stack(row, -1) for row in normal], -2)
        solved = _solve(matrix, torch.stack(right, -1))
        solved[..., bits:] += fixed
        solved = solved.to(A.dtype)
        better = score(solved) < error - _LESS * energy
        A = torch.where(better.unsqueeze(-1), solved, A)
        error = torch.where(better, score(solved), error)
        yield A, error
        count, total = assign(A)
        error = torch.minimum(score(A), error)
        yield A, error


def _energy(W: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """What a group's squared error is when nothing is fitted: float64 [m, G]."""
    return (W.double().square() * h).sum(-1)


def fitted(W: torch.Tensor, h: torch.Tensor, bits: int, offset: bool, rounds: int) -> torch.Tensor:
    """Alternate from the greedy and from the uniform start; of each group the better one's end."""
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in (greedy(W, h, bits), uniform(W, bits, offset)):
        for end in alternate(W, h, start, offset, rounds):
            A, error = end
        if best is None:
            best = A, error
            continue
        better = error < best[1] - _LESS * _energy(W, h)
        best = torch.where(better.unsqueeze(-1), A, best[0]), torch.where(better, error, best[1])
    assert best is not None
    return best[0]


def descending(A: torch.Tensor) -> torch.Tensor:
    """Positive scales by falling size; the set of sums stays the same."""
    scales = A[..., :-1].abs().sort(-1, descending=True).values
    return torch.cat([scales, A[..., -1:]], -1)


def _solve(normal: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve symmetric systems [..., k, k] by elimination, each with the same steps.

    A library's batched solver takes other steps for other batches, and then a row fitted alone
    would differ in its last bits from the same row among others.
    """
    size = right.shape[-1]
    ridge = normal.diagonal(dim1=-2, dim2=-1).amax(-1) * _RIDGE + torch.finfo(right.dtype).tiny
    N = normal.clone()
    N.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    x = right.clone()
    for i in range(size):
        for j in range(i + 1, size):
            factor = N[..., j, i] / N[..., i, i]
            N[..., j, :] -= factor.unsqueeze(-1) * N[..., i, :]
            x[..., j] -= factor * x[..., i]
    for i in reversed(range(size)):
        rest = (N[..., i, i + 1 :] * x[..., i + 1 :]).sum(-1)
        x[..., i] = (x[..., i] - rest) / N[..., i, i]
    return x
