"""Energy: arithmetic on readings that are known, and once through codecarbon itself."""

from __future__ import annotations

import sys

import pytest
import torch

from rarefy.evaluate import energy as module
from rarefy.evaluate.energy import energy

CPU = torch.device("cpu")


def _reading(cpu=0.0, gpu=0.0, ram=0.0, runs=1, seconds=1.0) -> module._Reading:
    return module._Reading(cpu, gpu, ram, runs, seconds)


def _pretend(monkeypatch, counter: str, *readings: module._Reading) -> list[float]:
    """Stand in for codecarbon: the readings in order; returns the durations asked for."""
    left, asked = list(readings), []
    monkeypatch.setitem(sys.modules, "codecarbon", object())
    monkeypatch.setattr(module, "_counter", lambda _: counter)
    monkeypatch.setattr(module, "_watch", lambda _, s: asked.append(s) or left.pop(0))
    return asked


def test_without_counters_the_model_is_summed_and_called_so(monkeypatch):
    asked = _pretend(monkeypatch, "", _reading(cpu=60.0, gpu=6.0, ram=14.0, runs=4, seconds=10.0))
    found = energy(lambda: None, 5, seconds=9.0, device=CPU)
    assert found.joules_per_token == 80 / (4 * 5)
    assert found.source == "modelled"
    assert asked == [9.0]
    assert (found.runs, found.seconds) == (4, 10.0)


@pytest.mark.parametrize("part", ["cpu", "gpu"])
def test_counters_alone_are_counted_and_idle_power_is_subtracted(monkeypatch, part):
    busy = _reading(**{"ram": 500.0, part: 300.0}, runs=2, seconds=10.0)
    idle = _reading(**{"ram": 500.0, part: 20.0}, seconds=4.0)
    _pretend(monkeypatch, part, busy, idle)
    found = energy(lambda: None, 5, device=CPU)
    assert found.joules_per_token == (300 - 10 * 20 / 4) / (2 * 5)
    assert found.source == "measured"
    assert "idle" in found.detail


def test_no_reading_is_no_energy(monkeypatch):
    _pretend(monkeypatch, "", _reading())
    found = energy(lambda: None, 5, device=CPU)
    assert (found.joules_per_token, found.source) == (None, "none")


def test_without_codecarbon_nothing_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    found = energy(lambda: pytest.fail("ran"), 5, device=CPU)
    assert (found.joules_per_token, found.source) == (None, "none")
    assert "rarefy[energy]" in found.detail


def test_codecarbon_reads_a_workload_quietly_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    pytest.importorskip("codecarbon")
    requests = pytest.importorskip("requests")
    for name in ("TMPDIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("CODECARBON_SAVE_TO_FILE", "true")
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv")
    monkeypatch.setattr(requests.Session, "request", lambda *_, **__: pytest.fail("network"))
    monkeypatch.chdir(tmp_path)
    x = torch.rand(256, 256)
    found = energy(lambda: [x @ x for _ in range(50)], 10, seconds=2.5, device=CPU)
    assert found.source in ("measured", "modelled")
    assert found.seconds >= 2.5
    assert found.runs > 1
    power = found.joules_per_token * 10 * found.runs / found.seconds
    assert 0.5 < power < 2000
    out = capfd.readouterr()
    assert out.out == out.err == ""
    assert list(tmp_path.iterdir()) == []
