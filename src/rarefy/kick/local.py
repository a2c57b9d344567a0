"""Jobs as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rarefy.kick.spec import LOG, read_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Tell = Callable[[str, str, int, int], None]
    """Called with (recipe, step, done, total)."""


def run_local(
    folders: Sequence[Path], *, workers: int, keep: bool, tell: Tell
) -> dict[Path, str | None]:
    """Run the jobs of some folders, ``workers`` at a time.

    Returns:
        For every folder what went wrong, as a sentence, or None.
    """
    running: set[subprocess.Popen[str]] = set()

    def one(folder: Path) -> str | None:
        return run_job(folder, keep=keep, tell=tell, running=running)

    pool = ThreadPoolExecutor(workers)
    try:
        return dict(zip(folders, pool.map(one, folders), strict=True))
    finally:
        # Only an interrupt leaves jobs running; what they finished is on disk.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()


def run_job(
    folder: Path,
    *,
    keep: bool = False,
    tell: Tell,
    running: set[subprocess.Popen[str]],
) -> str | None:
    """Run one job in a fresh process and pass its progress on.

    Args:
        folder: of the job; stderr is appended to ``job.log`` in it.
        keep: leave the compressed model there.
        tell: receives the progress.
        running: holds the process while it runs.

    Returns:
        What went wrong, as a sentence, or None.
    """
    spec = read_spec(folder)
    command = [sys.executable, "-m", "rarefy.kick.job", str(folder), *(["--keep"] * keep)]
    threads = {name: str(spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | threads
        )
        running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            step = _step(line)
            if step is not None:
                tell(spec.recipe, *step)
        status = process.wait()
        running.discard(process)
    return _trouble(status, folder) if status else None


def _step(line: str) -> tuple[str, int, int] | None:
    """Read a line of progress; libraries may print other things to stdout."""
    try:
        what, done, total = json.loads(line)
    except (ValueError, TypeError):
        return None
    return str(what), int(done), int(total)


def _trouble(status: int, folder: Path) -> str:
    """Say in one sentence why a job ended."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; perhaps the memory was full" if name == "SIGKILL" else ""
        return f"the process was stopped by {name}{hint}"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit status {status}"
    return last if status == 2 else f"{last} (see {LOG})"
