"""AdamW whose state lies on disk and visits memory page by page.

    page = a span of one parameter's two moments, mapped from a file
    for each page:  map it (dropping the pages unused for longest),  step,  leave it mapped

The idea is the paged optimizer of QLoRA (Dettmers et al., NeurIPS 2023, section 3), which moves
state between the GPU and the CPU; here it moves between memory and a file, so that it works on any
machine. The arithmetic is PyTorch's own, page by page, hence the parameters are those of
``torch.optim.AdamW`` bit for bit.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from rarefy.errors import RarefyError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PAGE = 1 << 20  # bytes
_ALIGNED = 512  # bytes; cutting vectors at odd places could change their last bits


class PagedAdamW(torch.optim.Optimizer):
    """AdamW within a budget of memory for its state.

    Args:
        params: parameters or groups, as ``torch.optim.AdamW`` takes them; contiguous tensors.
        lr, betas, eps, weight_decay: as there.
        budget: bytes of state that may be mapped at a time.
        folder: where the state is written; by default a temporary folder, removed with the object.

    Attributes:
        evictions: pages that had to make room so far.
        peak: largest number of bytes that were mapped at a time.

    Raises:
        RarefyError: the budget is below one page of 1 KiB.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        budget: int,
        folder: Path | None = None,
    ) -> None:
        self.page = min(_PAGE, budget // (2 * _ALIGNED) * 2 * _ALIGNED)
        if self.page <= 0:
            raise RarefyError(
                f"a paged optimizer cannot work with {budget} bytes of memory; "
                f"give at least {2 * _ALIGNED}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.budget = budget
        self.evictions = 0
        self.peak = 0
        self._kept = tempfile.TemporaryDirectory(prefix="rarefy-pages-", dir=folder)
        self._pages: OrderedDict[tuple[int, int], list[torch.Tensor]] = OrderedDict()
        self._resident = 0

    @property
    def _leaves(self) -> list[torch.Tensor]:
        return [leaf for group in self.param_groups for leaf in group["params"]]

    def _mapped(self, number: int, moment: str, span: slice) -> torch.Tensor:
        """Some entries of a moment of leaf ``number``, mapped from its file; made of zeros."""
        leaf = self._leaves[number]
        file = Path(self._kept.name, f"{number}.{moment}")
        size = leaf.element_size()
        with disk_errors(file):
            if not file.exists():
                with file.open("wb") as stream:
                    stream.truncate(leaf.numel() * size)
            octets = np.memmap(file, np.uint8, "r+", span.start * size, (_length(span) * size,))
        return torch.from_numpy(octets).view(leaf.dtype)

    def _page_of(self, number: int, span: slice) -> list[torch.Tensor]:
        """Both moments of a span, after making room for them."""
        key = (number, span.start)
        if key in self._pages:
            self._pages.move_to_end(key)
            return self._pages[key]
        needed = 2 * _length(span) * self._leaves[number].element_size()
        while self._resident + needed > self.budget:
            _, dropped = self._pages.popitem(last=False)
            self._resident -= sum(moment.nbytes for moment in dropped)
            self.evictions += 1
        self._pages[key] = [self._mapped(number, moment, span) for moment in _MOMENTS]
        self._resident += needed
        self.peak = max(self.peak, self._resident)
        return self._pages[key]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            RarefyError: a parameter is not contiguous, or the disk is full.
        """
        number = 0
        for group in self.param_groups:
            for leaf in group["params"]:
                if leaf.grad is not None:
                    self._update(number, leaf, group)
                number += 1

    def _update(self, number: int, leaf: torch.Tensor, group: dict[str, Any]) -> None:
        if not leaf.is_contiguous():
            raise RarefyError("a paged optimizer moves contiguous parameters only")
        assert leaf.grad is not None
        state = self.state[leaf]
        state.setdefault("step", torch.tensor(0.0))
        values, gradient = leaf.view(-1), leaf.grad.reshape(-1)
        entries = self.page // 2 // leaf.element_size()
        for first in range(0, leaf.numel(), entries):
            span = slice(first, min(first + entries, leaf.numel()))
            page = self._page_of(number, span)
            mean, square = (moment.to(leaf.device) for moment in page)
            adamw(
                [values[span]],
                [gradient[span]],
                [mean],
                [square],
                [],
                [state["step"].clone()],
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for moment, moved in zip(page, (mean, square), strict=True):
                if moved is not moment:
                    moment.copy_(moved)
        state["step"] += 1

    def state_dict(self) -> dict[str, Any]:
        """As that of ``torch.optim.AdamW``; the moments are mapped from their files when read."""
        state = super().state_dict()
        leaves = self._leaves
        for number, entry in state["state"].items():
            whole = slice(0, leaves[number].numel())
            moments = {
                moment: self._mapped(number, moment, whole).view(leaves[number].shape)
                for moment in _MOMENTS
            }
            state["state"][number] = entry | moments
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a paged or plain AdamW."""
        entries = state_dict["state"]
        steps = {number: {"step": entry["step"].clone()} for number, entry in entries.items()}
        super().load_state_dict(state_dict | {"state": steps})
        for number, entry in entries.items():
            whole = slice(0, self._leaves[number].numel())
            for moment in _MOMENTS:
                self._mapped(number, moment, whole).copy_(entry[moment].reshape(-1))


def _length(span: slice) -> int:
    return int(span.stop - span.start)
