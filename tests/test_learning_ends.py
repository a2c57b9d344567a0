"""Learning from end to end: masks through a whole recipe, adapters in peft, reasons into a student.

Also a process that is killed outright, which must end with the bytes of one that was not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from layers import recipe, supports, words
from tiny import save_tiny
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.synthesis.engine import synthesize
from rarefy.synthesis.fine_tune_cot import FineTuneCoT
from rarefy.synthesis.questions import Question
from rarefy.teachers.scripted import ScriptedTeacher

if TYPE_CHECKING:
    from pathlib import Path

TEXT = {"rows": 16, "length": 24}
IDS = (torch.arange(2 * 16) * 29 % 250).view(2, 16)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


def run(folder: Path, dense: Path, *stages: dict[str, Any], name: str) -> Path:
    plan = recipe(folder, *stages, name=name)
    return rarefy.compress(dense, plan, folder / name, calibration=words(folder)).path


def history(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["history"]
    return entries


def test_a_mask_goes_through_recovery_and_rounding_bit_for_bit(tmp_path: Path, dense: Path) -> None:
    prune = {"solver": "wanda", "schemes": {"*": {"format": "sparse", "kept": 2, "of": 4}}}
    learn = {"tuner": "full", "steps": 8, "learning_rate": 2e-3, "text": TEXT}
    packed = {"solver": "gptq", "schemes": {"*": {"format": "int", "bits": 4, "group": 32}}}
    first = supports(run(tmp_path, dense, prune, name="first"))
    last = run(tmp_path, dense, prune, learn, packed, name="last")
    final = supports(last)
    assert len(first) == 21
    assert first.keys() == final.keys()
    assert all(torch.equal(first[name], final[name]) for name in first)
    assert [entry["name"] for entry in history(last)] == ["wanda", "full", "gptq"]


def adapted(base: Any, adapter: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def test_the_adapter_of_qlora_opens_in_plain_peft(tmp_path: Path, dense: Path) -> None:
    tune = {
        "tuner": "qlora", "rank": 4, "steps": 12, "learning_rate": 5e-3, "text": TEXT,
        "objective": "cross-entropy", "schemes": {"*": {"format": "nf4"}},
    }  # fmt: skip
    out = run(tmp_path, dense, tune, name="tuned")
    assert history(out)[0]["losses"][-1] < history(out)[0]["losses"][0]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    base = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        plain = base(IDS).logits
    # The packed base, unpacked into an ordinary model, is what the adapter was trained beside.
    unpacked = rarefy.export(out, tmp_path / "plain")
    stock = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(stock(IDS).logits, plain, atol=2e-2)
    moved = adapted(stock, out / "adapter")
    assert float((moved - plain).abs().max()) > 0.1


def test_reasons_of_a_teacher_train_a_truncated_student(tmp_path: Path, dense: Path) -> None:
    questions = [Question(f"q{i}", f"What is {i} plus {i}?", str(2 * i)) for i in range(6)]

    def say(ask: Any) -> str:
        number = int(ask.prompt.split("is ")[1].split(" plus")[0])
        if "Therefore" not in ask.prompt:
            return f"{number} and {number} make {2 * number}."
        return str(2 * number if number != 3 else 7)

    method = FineTuneCoT(samples=1)
    made = synthesize(method, ScriptedTeacher(say), questions, tmp_path / "reasons")
    assert (made.summary["rows"], made.summary["rejects"]) == (5, 1)
    cut = {"surgery": "truncate", "blocks": 1}
    learn = {
        "tuner": "full", "steps": 20, "learning_rate": 3e-3, "objective": "cross-entropy",
        "embeddings": True, "text": {"file": str(made.path / "rows.jsonl"), "length": 200},
    }  # fmt: skip
    student = run(tmp_path, dense, cut, learn, name="student")
    losses = history(student)[-1]["losses"]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((student / "config.json").read_text())["num_hidden_layers"] == 2


SCRIPT = """
import sys, rarefy
from rarefy.engine import train
from rarefy.engine.stage import Watcher
train._SAVE_SECONDS = 0.0
model, plan, out, text = sys.argv[1:]
data = rarefy.Calibration(text, 4, 24)
tell = Watcher(step=lambda done, total: print(done, total, flush=True))
rarefy.compress(model, plan, out, calibration=data, watcher=tell)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path: Path, dense: Path) -> None:
    prune = {"solver": "wanda", "schemes": {"*": {"format": "sparse", "sparsity": 0.5}}}
    plan = recipe(tmp_path, prune, {"tuner": "full", "steps": 30, "text": TEXT}, name="plan")
    data = words(tmp_path)

    def start(out: Path) -> subprocess.Popen[str]:
        order = [sys.executable, "-c", SCRIPT, dense, plan, out, data.text]
        return subprocess.Popen(list(map(str, order)), stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait(120) == 0
    broken = start(tmp_path / "broken")
    assert broken.stdout is not None
    for line in broken.stdout:
        if line.split() == ["9", "30"]:
            broken.send_signal(signal.SIGKILL)
            break
    assert broken.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    again = start(tmp_path / "broken")
    assert again.stdout is not None
    steps = [line for line in again.stdout if line.endswith(" 30\n")]
    assert again.wait(120) == 0
    assert 20 <= len(steps) <= 22
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
