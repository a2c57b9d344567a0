"""``rarefy bench``: what it reports is what was asked, and the bytes are those of the files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from tiny import save_tiny
from typer.testing import CliRunner

import rarefy
import rarefy.cli
from rarefy.checkpoint.reader import Checkpoint
from rarefy.kernels import library

if TYPE_CHECKING:
    from pathlib import Path

RUN = CliRunner(env={"COLUMNS": "200"})
PROMPT, NEW = 12, 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small 16-bit model and the same in 4 bits."""
    work = tmp_path_factory.mktemp("bench")
    dense = save_tiny("llama", work / "dense", torch.bfloat16)
    recipe = work / "int4.yaml"
    scheme = {"*": {"format": "int", "bits": 4, "group": 32}}
    recipe.write_text(yaml.safe_dump({"stages": [{"solver": "nearest", "schemes": scheme}]}))
    return dense, rarefy.compress(dense, recipe, work / "small").path


@pytest.fixture(scope="module")
def report(folders: tuple[Path, Path]) -> dict[str, Any]:
    dense, small = folders
    done = RUN.invoke(
        rarefy.cli.app,
        ["bench", str(small), "--against", str(dense), "--prompt", str(PROMPT), "--new", str(NEW),
         "--threads", "1", "--rounds", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def matrix_bytes(folder: Path, scale: float = 1.0) -> float:
    """Stored bytes of everything but the embedding, which is looked up."""
    entries = Checkpoint(folder).entries
    return sum(scale * e.size for name, e in entries.items() if "embed" not in name)


def test_the_model_and_the_dense_one_are_measured(report: dict[str, Any]) -> None:
    engines = {row["name"]: row["speed"]["engine"] for row in report["rows"]}
    native = "native" if library.available() else "transformers"
    assert engines == {"this": native, "dense": native, "dense, transformers": "transformers"}
    for row in report["rows"]:
        speed = row["speed"]
        assert (speed["prompt_tokens"], speed["new_tokens"], speed["threads"]) == (PROMPT, NEW, 1)
        assert speed["prefill_tok_s"] == pytest.approx(PROMPT / speed["ttft_s"])
        assert speed["peak_bytes"] >= speed["baseline_bytes"] > 0
        used = speed["token_bytes"] * speed["decode_tok_s"]
        assert row["share"] == pytest.approx(used / report["read_bandwidth"])
    assert report["read_bandwidth"] > 1e8


def test_a_token_reads_the_stored_matrices(
    report: dict[str, Any], folders: tuple[Path, Path]
) -> None:
    dense, small = folders
    cache = (PROMPT + NEW // 2) * 3 * 2 * 32 * 4
    read = {row["name"]: row["speed"]["token_bytes"] - cache for row in report["rows"]}
    slack = 1000  # shapes, inverse frequencies
    assert read["dense, transformers"] == pytest.approx(matrix_bytes(dense, 2), abs=slack)
    if library.available():
        assert read["dense"] == pytest.approx(matrix_bytes(dense), abs=slack)
        assert read["this"] == pytest.approx(matrix_bytes(small), abs=slack)
        assert sum(report["rows"][0]["speed"]["phases"].values()) == pytest.approx(1)


def test_the_table_names_what_matters(folders: tuple[Path, Path]) -> None:
    done = RUN.invoke(
        rarefy.cli.app,
        ["bench", str(folders[1]), "--prompt", "4", "--new", "2", "--rounds", "1"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for what in ("time to first token", "prefill", "decode", "peak memory", "read bandwidth"):
        assert what in done.output


@pytest.mark.skipif(not library.available(), reason=library.reason() or "no kernels")
def test_rounded_inputs_are_a_row_of_their_own(folders: tuple[Path, Path]) -> None:
    dense, small = folders
    some = ["--prompt", "4", "--new", "2", "--rounds", "1", "--threads", "1", "--int8", "--json"]
    done = RUN.invoke(rarefy.cli.app, ["bench", str(small), *some])
    assert done.exit_code == 0, done.output
    plain, rounded = json.loads(done.stdout)["rows"]
    assert (plain["name"], rounded["name"]) == ("this", "this, 8-bit inputs")
    assert "int4 x fp32" in plain["speed"]["kernel"]
    assert "int4 x int8 g64" in rounded["speed"]["kernel"]
    done = RUN.invoke(rarefy.cli.app, ["bench", str(dense), *some])
    assert done.exit_code != 0
    assert "leave --int8 out" in done.output


def test_a_missing_model_is_named() -> None:
    done = RUN.invoke(rarefy.cli.app, ["bench", "./nowhere"])
    assert done.exit_code == 2
    assert "nowhere" in done.output
