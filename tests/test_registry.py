"""The registry: announcing, finding by scan, building from plain options."""

from __future__ import annotations

import sys
from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from rarefy.errors import RarefyError
from rarefy.formats.base import FORMATS
from rarefy.registry import Registry, suggest
from rarefy.solvers.base import SOLVERS
from rarefy.solvers.gptq import GPTQ

if TYPE_CHECKING:
    from pathlib import Path


class Tool(ABC):  # noqa: B024
    pass


@pytest.fixture
def registry() -> Registry[Tool]:
    registry = Registry("tool", Tool, "rarefy.rules")

    @registry.register("saw", family="cutting", paper="A paper", arxiv="1234.5678")
    @dataclass(frozen=True)
    class Saw(Tool):
        teeth: int
        length: float = 0.5
        name: str | None = None
        sharp: bool = True

        def __post_init__(self) -> None:
            if self.teeth < 1:
                raise ValueError(f"teeth must be at least 1, not {self.teeth}")

    return registry


def test_builds_from_plain_options(registry: Registry[Tool]) -> None:
    saw = registry.build("saw", {"teeth": 3, "length": 2}, "here")
    assert (saw.teeth, saw.length, saw.name, saw.sharp) == (3, 2, None, True)
    assert registry.name_of(saw) == "saw"
    card = registry.card("saw")
    assert (card.role, card.family, card.paper, card.arxiv) == (
        "tool",
        "cutting",
        "A paper",
        "1234.5678",
    )
    assert card.options == {"teeth": ..., "length": 0.5, "name": None, "sharp": True}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sew", {}, "no tool called 'sew'; did you mean 'saw'"),
        ("hammer", {}, "no tool called 'hammer'; known: saw"),
        ("saw", {"teeth": 1, "lenght": 1}, "place: 'lenght' is not an option.*mean 'length'"),
        ("saw", {}, "place: the tool 'saw' needs teeth"),
        ("saw", {"teeth": "3"}, "place: teeth .* must be int, and '3' is not"),
        ("saw", {"teeth": 3.0}, "teeth .* must be int"),
        ("saw", {"teeth": True}, "teeth .* must be int"),
        ("saw", {"teeth": None}, "teeth .* must be int"),
        ("saw", {"teeth": [3]}, "teeth .* must be int"),
        ("saw", {"teeth": 3, "sharp": 1}, "sharp .* must be bool"),
        ("saw", {"teeth": 3, "name": 7}, r"name .* must be str \| None"),
        ("saw", {"teeth": 0}, "place: teeth must be at least 1"),
    ],
)
def test_refuses_in_one_sentence(
    registry: Registry[Tool], name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(RarefyError, match=words):
        registry.build(name, options, "place")


def test_a_name_is_taken_once(registry: Registry[Tool]) -> None:
    with pytest.raises(ValueError, match="'saw' is taken"):

        @registry.register("saw", family="x")
        @dataclass(frozen=True)
        class Other(Tool):
            pass


def test_only_frozen_dataclasses_of_the_role_may_register(registry: Registry[Tool]) -> None:
    class Bare(Tool):
        pass

    @dataclass
    class Mutable(Tool):
        pass

    @dataclass(frozen=True)
    class Stranger:
        pass

    for cls in (Bare, Mutable, Stranger):
        with pytest.raises(TypeError, match="frozen dataclass derived from Tool"):
            registry.register("x", family="x")(cls)  # type: ignore[arg-type]
    assert [card.name for card in registry] == ["saw"]


def package(folder: Path, name: str, **modules: str) -> str:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)
    return name


def test_adding_a_file_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from dataclasses import dataclass
from scanned_tools.base import TOOLS, Tool

@TOOLS.register("axe", family="cutting")
@dataclass(frozen=True)
class Axe(Tool):
    pass
"""
    base = """
from rarefy.registry import Registry

class Tool:
    pass

TOOLS = Registry("tool", Tool, "scanned_tools")
"""
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "scanned_tools", base=base, axe=code)
    from scanned_tools.base import TOOLS

    assert "scanned_tools.axe" not in sys.modules
    assert [card.name for card in TOOLS] == ["axe"]


def test_a_broken_method_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = package(tmp_path, "broken_tools", axe="import a_module_that_does_not_exist")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        list(Registry("tool", Tool, name))


def test_the_shipped_methods_are_found() -> None:
    assert "int" in [card.name for card in FORMATS]
    assert {"gptq", "nearest"} <= {card.name for card in SOLVERS}
    card = SOLVERS.card("gptq")
    assert card.cls is GPTQ
    assert card.file == "solvers/gptq.py"
    assert card.arxiv == "2210.17323"


def test_suggestions() -> None:
    assert suggest("grup", ["group", "bits"]) == "; did you mean 'group'?"
    assert suggest("zzz", ["group", "bits"]) == "; known: bits, group"
