"""Two Ray nodes on this machine give the figures of a local run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from kicking import make, profile, run_here

import rarefy
from rarefy.kick import run
from rarefy.kick.run import Options

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
# What a clock says, and the peaks of the machine, differ from run to run.
MEASURED = {"compress_s", "compress_peak_bytes", "peak_flops", "peak_bandwidth"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two nodes with one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "cache"))
    # Nodes import rarefy from where this process has it.
    folder = os.path.dirname(os.path.dirname(rarefy.__file__))
    monkeypatch.setenv("PYTHONPATH", folder)
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    two.add_node(num_cpus=1)
    two.wait_for_nodes()
    yield two.address
    two.shutdown()


def figures(board: dict[str, Any]) -> dict[str, Any]:
    """A board without what was measured with a clock."""
    for entry in (board["dense"], *board["entries"]):
        entry["cost"] = {k: v for k, v in entry["cost"].items() if k not in MEASURED}
        entry["tracks"].pop("training consumption", None)
    return {k: v for k, v in board.items() if k != "created"}


def test_a_cluster_gives_the_same_figures(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make(tmp_path / "work")
    tasks = f"{work / 'quiz.jsonl'},{work / 'songs.jsonl'}"
    told: list[tuple[object, ...]] = []

    def start(out: Path, ray: str | None) -> Any:
        return rarefy.kick(
            work / "dense", f"{work}/*.yaml", out, profile=profile(work),
            options=Options(tasks, threads=1, ray=ray), tell=lambda *step: told.append(step),
        ).content  # fmt: skip

    there = start(tmp_path / "there", cluster)
    assert {step[0] for step in told} == {"dense", "round", "prune", "cut"}
    assert not any((tmp_path / "cache" / "kick").glob("*/result.json"))
    logs = [log.read_text() for log in (tmp_path / "there").glob("*/job.log")]
    assert len({line for log in logs for line in log.split("\n") if line.startswith("node ")}) == 2
    monkeypatch.setattr(run, "run_local", run_here)
    here = start(tmp_path / "here", None)
    assert [entry["recipe"] for entry in here["entries"]] == ["prune", "round"]
    assert figures(there) == figures(here)
    with pytest.raises(rarefy.RarefyError, match="no node of the cluster has 3 CPUs"):
        rarefy.kick(
            work / "dense", f"{work}/round.yaml", tmp_path / "wide", profile=profile(work),
            options=Options(tasks, threads=3, ray=cluster),
        )  # fmt: skip
