"""Thread control for stretches of many small operations."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run small operations on one thread.

    Waking a second thread costs more than a few thousand elements are worth, and on a busy machine
    each such wake-up waits for the scheduler: a column sweep was seen to take a hundred times
    longer with two threads than with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
