"""The line on SmolLM2-135M: compressed, opened by stock tools, smaller in memory, and measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.state import read_state

pytestmark = [pytest.mark.slow, pytest.mark.network]

IDS = (torch.arange(48) * 977 % 40_000).view(1, 48)
_SRC = str(Path(rarefy.__file__).parents[1])

READER = """
import json, pathlib, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, plugin, out = sys.argv[1:]
torch.set_num_threads(2)
if plugin == "yes":
    import rarefy
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model((torch.arange(48) * 977 % 40_000).view(1, 48)).logits
status = pathlib.Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
imported = any(name.split(".")[0] == "rarefy" for name in sys.modules)
save_file({"logits": logits.contiguous()}, out)
print(json.dumps({"peak": peak * 1024, "imported": imported}))
"""


@dataclass
class Reading:
    """What a fresh process got: logits [1, T, V], peak resident bytes."""

    logits: torch.Tensor
    peak: int


@pytest.fixture(scope="module")
def dense() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rarefy.compress("demo", "rtn-int4-g64", tmp_path_factory.mktemp("real") / "int4").path


@pytest.fixture(scope="module")
def int3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    scheme = {"format": "int", "bits": 3, "group": 64}
    stage = {"solver": "nearest", "schemes": {"*": scheme}}
    (folder / "rtn-int3.yaml").write_text(yaml.safe_dump({"stages": [stage]}))
    return rarefy.compress("demo", folder / "rtn-int3.yaml", folder / "int3").path


def read(folder: Path, tmp_path: Path, *, plugin: bool) -> Reading:
    """Open a folder in a fresh process, with or without rarefy imported."""
    out = tmp_path / f"{folder.name}.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", READER, folder, "yes" if plugin else "no", out],
        env=os.environ | {"PYTHONPATH": _SRC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["imported"] is plugin
    return Reading(load_file(out)["logits"], said["peak"])


def expected(source: Path, folder: Path, reader: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of the dense model with the stored matrices in place, in the type of their reader."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    checkpoint = Checkpoint(folder)
    formats = read_state(folder).formats
    assert len(formats) == 30 * 7
    for name, fmt in formats.items():
        weight = model.get_submodule(name).weight
        suffixes = fmt.layout(*weight.shape)
        matrix = fmt.decode({s: checkpoint.read(f"{name}.{s}") for s in suffixes})
        weight.data.copy_(matrix.to(reader))
    with torch.no_grad():
        return model(IDS).logits


def test_four_bits_open_with_stock_transformers(dense: Path, int4: Path, tmp_path: Path) -> None:
    found = read(int4, tmp_path, plugin=False)
    # It multiplies scales and codes in their 16 bits; rarefy in 32.
    assert (found.logits - expected(dense, int4, torch.float16)).abs().max() <= 1e-3


def test_three_bits_run_packed_in_less_memory(dense: Path, int3: Path, tmp_path: Path) -> None:
    found = read(int3, tmp_path, plugin=True)
    plain = read(dense, tmp_path, plugin=True)
    assert (found.logits - expected(dense, int3)).abs().max() <= 1e-3
    assert (found.logits - plain.logits).abs().max() > 1
    # 106 M weights leave fp32 for 3.3 bits: about 380 MB less; a dense copy would show.
    assert found.peak < plain.peak - 200_000_000


def test_distance_of_plain_rounding_is_what_it_is_known_to_be(int4: Path) -> None:
    found = rarefy.evaluate(int4, "demo", text="wiki", sequences=2, length=256, speed=False)
    assert 0.2 < found.quality.kl_mean.value < 0.5
    assert found.quality.perplexity_ratio.value > 1.1


def test_dense_against_itself_is_no_distance(dense: Path) -> None:
    found = rarefy.evaluate(dense, "demo", text="wiki", sequences=1, length=128, speed=False)
    assert found.quality.kl_mean.value == 0
    assert found.quality.kl_max == 0
    assert found.quality.agreement.value == 1
    assert found.quality.delta_p_rms.value == 0
