"""Jobs as tasks of a Ray cluster.

A task receives the files of a job's folder, runs the same process as a local job on its node, and
returns the files: nodes need rarefy and the model, but no folder in common. What a node has begun
lies in its cache until it is done, so a second run goes on there.
"""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.writer import write_atomic
from rarefy.data.packages import cache_dir
from rarefy.errors import RarefyError
from rarefy.kick.local import run_job
from rarefy.kick.spec import JOURNAL, LOCK, LOG, RESULT, read_spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rarefy.kick.local import Tell

    Files = dict[str, bytes]


def run_ray(
    folders: Sequence[Path], *, address: str, fresh: bool, tell: Tell
) -> dict[Path, str | None]:
    """Run the jobs of some folders on a cluster, each on all the threads that it asks for.

    Args:
        folders: of the jobs, on this machine; the results are written into them.
        address: of the cluster; empty for the one of this machine, started if there is none.
        fresh: discard what nodes have begun.
        tell: called once for a finished job.

    Returns:
        For every folder what went wrong, as a sentence, or None.

    Raises:
        RarefyError: Ray is not installed, the cluster cannot be reached, or no node is large
            enough.
    """
    ray = _import_ray()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, address)
    try:
        return _run_all(ray, folders, fresh, tell)
    finally:
        if mine:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Hides a notice about accelerators that has nothing to do with what a user asked for.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise RarefyError("--ray needs Ray: pip install 'rarefy[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RarefyError(f"there is no Ray cluster at {address or 'this machine'}: {first}") from (
            error
        )


def _run_all(ray: Any, folders: Sequence[Path], fresh: bool, tell: Tell) -> dict[Path, str | None]:
    threads = max(read_spec(folder).threads for folder in folders)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= threads for node in nodes):
        raise RarefyError(
            f"no node of the cluster has {threads} CPUs, which a job asks for; give --threads"
        )
    gpus = int(any(node.get("GPU") for node in nodes))
    task = ray.remote(num_cpus=threads, num_gpus=gpus)(_on_node)
    keys = [read_spec(folder).key for folder in folders]
    waiting = {
        task.remote(_read(folder), key, fresh): folder
        for folder, key in zip(folders, keys, strict=True)
    }
    outcome: dict[Path, str | None] = {}
    while waiting:
        [done], _ = ray.wait(list(waiting), num_returns=1)
        folder = waiting.pop(done)
        try:
            files, outcome[folder] = ray.get(done)
        except ray.exceptions.RayError as error:
            files, outcome[folder] = {}, str(error).strip().splitlines()[-1]
        for name, content in files.items():
            write_atomic(folder / name, content)
        tell(read_spec(folder).recipe, "job", len(outcome), len(folders))
    return {folder: outcome[folder] for folder in folders}


def _on_node(files: Files, key: str, fresh: bool) -> tuple[Files, str | None]:
    """Run one job on this node; return its files and what went wrong."""
    import ray

    folder = cache_dir() / "kick" / key
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        file = folder / name
        # Only a journal grows; of two, the longer one knows more.
        if not file.is_file() or (name == JOURNAL and file.stat().st_size < len(content)):
            write_atomic(file, content)
    with (folder / LOG).open("a") as log:
        log.write(f"node {ray.get_runtime_context().get_node_id()}\n")
    error = run_job(folder, tell=lambda *_: None, running=set())
    found = _read(folder)
    if RESULT in found:
        shutil.rmtree(folder, ignore_errors=True)
    return found, error


def _read(folder: Path) -> Files:
    """Return the files of a job: not its model, nor what is half written."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != LOCK and file.suffix != ".tmp"
    }
