"""The one exception a person is meant to read."""

from __future__ import annotations


class RarefyError(Exception):
    """Bad input or a condition that the user can mend.

    The message is one clear sentence that names the thing and the mend; the command line prints
    it alone and exits with status 2.
    """
