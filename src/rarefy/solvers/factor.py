"""The triangular factor of an inverse Hessian, in place and without forming the inverse.

With the columns taken backwards, H = L L^T (Cholesky) becomes H = R R^T with R upper triangular in
sweep order, and ``U = R^-1`` satisfies ``H^-1 = U^T U``. One factorization and one triangular
inverse replace the usual factor, invert, factor again: less work, and no inverse to lose digits
in. Both run in place on one fp64 matrix, which for a wide layer is the largest thing in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rarefy.solvers.base import Problem

_STRIP = 256
_LADDER = (0.1, 1.0)  # dampings that are tried when the one asked for is too small


def damped_factor(
    problem: Problem, dead: torch.Tensor, order: torch.Tensor, damping: float
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """U [n, n] of the problem's damped Gram matrix, climbing the ladder of dampings.

    Args:
        problem: its ``gram`` is H.
        dead: columns whose input never fires, bool [n].
        order: storage index of each visited column, [n].
        damping: share of mean(diag(H)) added to the diagonal.

    Returns:
        U, or None past the end of the ladder, and a sentence for every fallback.
    """
    key = "factor", damping, tuple(order.tolist())
    if key not in problem.shared:
        problem.shared[key] = _climb(problem, dead, order, damping)
    found: tuple[torch.Tensor | None, tuple[str, ...]] = problem.shared[key]
    return found


def _climb(
    problem: Problem, dead: torch.Tensor, order: torch.Tensor, damping: float
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    H, name = problem.gram, problem.name
    assert H is not None
    mean = float(H.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    notes: tuple[str, ...] = ()
    for share in sorted({damping, *(d for d in _LADDER if d > damping)}):
        U = inverse_factor(H, dead, order, share * mean)
        if U is not None:
            return U, notes
        notes = (
            f"the Hessian of {name} is not positive definite at damping {share:g}; "
            "damping was raised",
        )
    return None, (
        f"the Hessian of {name} is not positive definite even at damping 1; "
        "the matrix was rounded to nearest",
    )


def inverse_factor(
    H: torch.Tensor, dead: torch.Tensor, order: torch.Tensor, damping: float
) -> torch.Tensor | None:
    """Upper triangular U with ``(H + damping I)^-1 = U^T U``, rows and columns in sweep order.

    fp64 inside: the small eigenvalues of H decide where the error goes, and fp32 loses them.

    Args:
        H: symmetric, float [n, n].
        dead: columns whose input never fires, bool [n]; their diagonal counts as 1.
        order: storage index of each visited column, [n].
        damping: added to the diagonal.

    Returns:
        [n, n] in H's type, or None when the damped H is not positive definite.
    """
    n = len(order)
    backwards = order.flip(0)
    A = torch.empty(n, n, dtype=torch.float64, device=H.device)
    for a in range(0, n, _STRIP):
        A[a : a + _STRIP] = H[backwards[a : a + _STRIP]][:, backwards]
    diagonal = A.diagonal()
    diagonal[dead[backwards]] = 1.0
    diagonal += damping
    if not _cholesky_(A):
        return None
    _invert_lower_(A)
    U = torch.empty_like(H)
    for a in range(0, n, _STRIP):
        strip = A[a : a + _STRIP].tril(a).flip(0, 1)
        U[n - a - strip.shape[0] : n - a] = strip
    return U


def _cholesky_(A: torch.Tensor) -> bool:
    """Replace the lower triangle of A by its Cholesky factor; False if there is none."""
    n = A.shape[0]
    for a in range(0, n, _STRIP):
        b = min(a + _STRIP, n)
        A[a:, a:b] -= A[a:, :a] @ A[a:b, :a].T
        corner, info = torch.linalg.cholesky_ex(A[a:b, a:b])
        if int(info) != 0 or not bool(torch.isfinite(corner.diagonal()).all()):
            return False
        A[a:b, a:b] = corner
        # X corner^T = A, for the rows below.
        A[b:, a:b] = torch.linalg.solve_triangular(corner.T, A[b:, a:b], upper=True, left=False)
    return True


def _invert_lower_(L: torch.Tensor) -> None:
    """Replace a lower triangular L by its inverse; what stands above the diagonal is not read."""
    n = L.shape[0]
    for a in range(0, n, _STRIP):
        b = min(a + _STRIP, n)
        eye = torch.eye(b - a, dtype=L.dtype, device=L.device)
        corner = torch.linalg.solve_triangular(L[a:b, a:b].tril(), eye, upper=False)
        # Rows above are inverted already: X_ba = -X_bb (L_ba X_aa).
        L[a:b, :a] = -corner @ _times_lower(L[a:b, :a], L)
        L[a:b, a:b] = corner


def _times_lower(B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """``B X`` for B [s, a] and the leading lower triangle of X, strip by strip."""
    a = B.shape[1]
    out = torch.empty_like(B)
    for c in range(0, a, _STRIP):
        d = min(c + _STRIP, a)
        # Above its diagonal corner X is zero; corners are stored whole, so no masking is needed.
        out[:, c:d] = B[:, c:] @ X[c:a, c:d]
    return out
