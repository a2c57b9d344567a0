"""A run killed with SIGKILL and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tiny import save_tiny

import rarefy
from rarefy.engine.stage import Watcher

if TYPE_CHECKING:
    from pathlib import Path

DATA = {"sequences": 2, "length": 64, "seed": 3}
INT4 = {"format": "int", "bits": 4, "group": 32}
RECIPE = {"stages": [{"solver": "gptq", "schemes": {"*": INT4}}]}
# Each way to die, at a moment that does not depend on the speed of the machine.
AFTER_TWO_BLOCKS = """
def step(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
IN_THE_JOIN = """
import rarefy.checkpoint.writer as writer

step = lambda done, total: None
write = writer._write_shard

def die(path, shard):
    write(path, dict(list(shard.items())[:5]))
    os.kill(os.getpid(), signal.SIGKILL)

writer._write_shard = die
"""
SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import rarefy
from rarefy.engine.stage import Watcher
{how}
arguments, data = json.loads(sys.argv[1])
rarefy.compress(*arguments, calibration=rarefy.Calibration(**data), watcher=Watcher(step=step))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, rarefy.Calibration]:
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny("llama", folder / "model")
    text = folder / "text.txt"
    text.write_text(" ".join(f"{n * n} and {n}" for n in range(200)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    return model, recipe, rarefy.Calibration(str(text), **DATA)


@pytest.fixture(scope="module")
def undisturbed(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(inputs, tmp_path_factory.mktemp("undisturbed") / "out")


def run(inputs: Any, out: Path, **options: Any) -> Path:
    model, recipe, data = inputs
    return rarefy.compress(model, recipe, out, calibration=data, **options).path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "timings.json"
    }


def test_the_same_seed_gives_the_same_bytes(inputs: Any, undisturbed: Path, tmp_path: Path) -> None:
    again = run(inputs, tmp_path / "again")
    assert "model.safetensors" in content(again)
    assert content(again) == content(undisturbed)
    assert (again / "timings.json").is_file()


@pytest.mark.parametrize(
    ("how", "blocks"), [(AFTER_TWO_BLOCKS, 2), (IN_THE_JOIN, 3)], ids=["two blocks", "join"]
)
def test_a_killed_run_goes_on(
    inputs: Any, undisturbed: Path, tmp_path: Path, how: str, blocks: int
) -> None:
    model, recipe, data = inputs
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    job = json.dumps([[str(model), str(recipe), str(out)], vars(data)])
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(how=how), job], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    parts = json.loads((partial / "journal.json").read_text())["parts"]
    finished = [part for part in parts if part != "outside"]
    assert len(finished) == blocks
    before = {part: (partial / f"part-{part}.safetensors").stat().st_mtime_ns for part in finished}
    seen: list[dict[str, int]] = []

    def look(done: int, total: int) -> None:
        files = {part: partial / f"part-{part}.safetensors" for part in finished}
        seen.append({part: file.stat().st_mtime_ns for part, file in files.items()})

    run(inputs, out, watcher=Watcher(step=look))
    assert content(out) == content(undisturbed)
    assert seen, "no progress was reported"
    assert all(stamps == before for stamps in seen), "a finished block was written again"
    assert not partial.exists()
