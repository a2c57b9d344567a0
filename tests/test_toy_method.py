"""A new method is one file and one decorator: everything else finds it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rarefy
from rarefy.methods import methods_markdown

ROOT = Path(__file__).parents[1]
TOY = '''"""Round down instead of to nearest, then repair: a toy."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.solvers.base import SOLVERS, Problem, Solution, Solver


@SOLVERS.register("toy", family="quantization", paper="Nobody, Toy, 2026", arxiv="0000.00000")
@dataclass(frozen=True)
class Toy(Solver):
    """Nearest under another name."""

    pull: float = 1.0

    def solve(self, problem, fmt):
        grid = fmt.fit(problem.weight, support=problem.support)
        return Solution(grid.round(problem.weight * self.pull), grid)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its conformance suites with one file more."""
    root = tmp_path_factory.mktemp("copy")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", root / "src", ignore=skip)
    shutil.copytree(ROOT / "tests" / "conformance", root / "tests" / "conformance", ignore=skip)
    shutil.copy(ROOT / "tests" / "tiny.py", root / "tests")
    (root / "src" / "rarefy" / "solvers" / "toy.py").write_text(TOY)
    return root


# An editable installation puts a finder of its own in front of PYTHONPATH.
RUN = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(copy: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_line_lists_it(copy: Path) -> None:
    rows = {row["name"]: row for row in json.loads(run(copy, "rarefy", "methods", "--json"))}
    assert rows["toy"]["file"] == "solvers/toy.py"
    assert rows["toy"]["options"] == {"pull": 1.0}


def test_the_recipe_checker_knows_its_options(copy: Path) -> None:
    recipe = copy / "r.yaml"
    scheme = '"*": {format: int, bits: 4}'
    recipe.write_text(f"stages: [{{solver: toy, pul: 2.0, schemes: {{{scheme}}}}}]")
    code = f"""
from rarefy.errors import RarefyError
from rarefy.recipe import load_recipe
try:
    load_recipe({str(recipe)!r})
except RarefyError as error:
    print(error)
"""
    (copy / "probe.py").write_text(code)
    assert "did you mean 'pull'" in run(copy, "probe")


def test_the_docs_table_has_a_row_for_it(copy: Path) -> None:
    run(copy, "rarefy", "methods", "--markdown", "table.md")
    assert "| `toy` | quantization | [Nobody, Toy, 2026]" in (copy / "table.md").read_text()


def test_the_conformance_suite_tries_it(copy: Path) -> None:
    suite = "tests/conformance/test_solvers.py"
    said = run(copy, "pytest", suite, "-q", "-k", "toy", "-p", "no:cacheprovider", "--rootdir", ".")
    assert " passed" in said
    passed = int(said.split(" passed")[0].split()[-1])
    assert passed >= 10


def test_the_committed_table_is_up_to_date() -> None:
    assert rarefy.methods()
    assert (ROOT / "docs" / "methods.md").read_text() == methods_markdown(), (
        "run: rarefy methods --markdown docs/methods.md"
    )
