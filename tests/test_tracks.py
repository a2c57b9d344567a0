"""The six tracks, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rarefy.evaluate.tracks import TRACKS, Run, least, tracks

ABILITIES = {"facts": "knowledge", "facts2": "knowledge", "nli": "inference", "mc1": "trust",
             "style": None}  # fmt: skip
DENSE = {"disk_bytes": 400, "peak_bytes": 900, "flops": 100, "decode_tok_s": 10.0}


def _entry(cost: dict[str, Any], **relatives: float | None) -> dict[str, Any]:
    tasks = {name: {"relative": r, "sensitive": True} for name, r in relatives.items()}
    return {"cost": {**DENSE, **cost}, "tasks": tasks}


def test_every_track_by_hand():
    cost = {"disk_bytes": 100, "peak_bytes": 450, "flops": 100, "decode_tok_s": 5.0,
            "compress_s": 20.0, "compress_peak_bytes": 700}  # fmt: skip
    entry = _entry(cost, facts=0.5, facts2=0.7, nli=0.9, mc1=1.1, style=0.0)
    best = {"compress_s": 10.0, "compress_peak_bytes": 700}
    found = tracks([Run(entry, _entry({}), best=best)], ABILITIES)
    assert set(found) == set(TRACKS)
    performance = found["performance"]
    assert performance.ratios == pytest.approx({"knowledge": 0.6, "inference": 0.9})
    assert performance.om == pytest.approx(100 * math.sqrt((0.36 + 0.81) / 2))
    assert performance.geometric == pytest.approx(100 * math.sqrt(0.54))
    assert found["generalization"] is None
    assert found["trust"].ratios == {"mc1": 1.1}
    assert found["training consumption"].ratios == {"time": 0.5, "memory": 1.0}
    inference = found["inference consumption"]
    assert inference.ratios == {"size": 4.0, "peak memory": 2.0, "flops": 1.0}
    assert inference.om == pytest.approx(100 * math.sqrt(21 / 3))
    assert inference.geometric == pytest.approx(200)
    assert found["acceleration"].ratios == {"decode": 0.5}
    assert found["acceleration"].om == found["acceleration"].geometric == pytest.approx(50)


def test_the_dense_model_scores_one_hundred():
    dense = _entry({}, facts=1.0, nli=1.0, mc1=1.0)
    found = tracks([Run(dense, dense)], ABILITIES)
    for name in ("performance", "inference consumption", "acceleration", "trust"):
        assert found[name].om == found[name].geometric == 100
    assert found["training consumption"] is None


def test_several_models_are_averaged_before_squaring():
    dense = _entry({})
    models = ((10.0, 1.0, "a"), (30.0, 0.4, "a"), (20.0, 0.8, "b"))
    runs = [
        Run(_entry({"decode_tok_s": speed}, facts=relative), dense, family)
        for speed, relative, family in models
    ]
    found = tracks(runs, ABILITIES)
    assert found["acceleration"].om == pytest.approx(200)
    assert found["performance"].ratios["knowledge"] == pytest.approx(2.2 / 3)
    assert found["generalization"].ratios == pytest.approx({"a": 0.7, "b": 0.8})
    assert found["generalization"].om == pytest.approx(100 * math.sqrt((0.49 + 0.64) / 2))


def test_what_cannot_show_damage_or_was_not_measured_is_left_out():
    entry = _entry({"peak_bytes": None, "decode_tok_s": None}, facts=0.5, nli=None)
    entry["tasks"]["facts2"] = {"relative": 1.0, "sensitive": False}
    found = tracks([Run(entry, _entry({}))], ABILITIES)
    assert found["performance"].ratios == {"knowledge": 0.5}
    assert found["inference consumption"].ratios == {"size": 1.0, "flops": 1.0}
    assert found["acceleration"] is None
    assert found["trust"] is None


def test_a_ratio_of_zero_sinks_the_geometric_mean_only():
    found = tracks([Run(_entry({}, facts=0.0, nli=1.0), _entry({}))], ABILITIES)
    assert found["performance"].geometric == 0
    assert found["performance"].om == pytest.approx(100 * math.sqrt(0.5))


def test_least_is_taken_part_by_part():
    costs = ({"compress_s": 3.0, "compress_peak_bytes": 9}, {"compress_s": 5.0},
             {"compress_s": None, "compress_peak_bytes": 7})  # fmt: skip
    assert least(_entry(c) for c in costs) == {"compress_s": 3.0, "compress_peak_bytes": 7}
    assert least([]) == {}
