"""The one exception a person is meant to read, and the system's refusals turned into it."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class RarefyError(Exception):
    """Bad input or a condition that the user can mend.

    The message is one clear sentence that names the thing and the mend; the command line prints
    it alone and exits with status 2.
    """


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into one sentence about ``path``."""
    try:
        yield
    except OSError as error:
        mend = {
            errno.ENOSPC: "free some space and run the same command again to go on",
            errno.EDQUOT: "free some space and run the same command again to go on",
            errno.EACCES: "choose a folder that you may write to",
            errno.EPERM: "choose a folder that you may write to",
            errno.EROFS: "choose a folder that you may write to",
            errno.ENOTDIR: "choose another folder: a part of this path is a file",
        }.get(error.errno or 0)
        if mend is None:
            raise
        raise RarefyError(f"cannot write to {path}: {error.strerror}; {mend}") from error
