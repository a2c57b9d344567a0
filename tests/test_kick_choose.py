"""What --recipes and --tasks stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from kicking import make

from rarefy.errors import RarefyError
from rarefy.kick.choose import choose_recipes, choose_tasks, split_entries
from rarefy.kick.profiles import FULL, SMOKE
from rarefy.kick.roles import methods, prunes, role
from rarefy.recipe import load_recipe
from rarefy.tasks.catalogue import catalogue, profile

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("choose"))


def names(text: str) -> list[str]:
    return [recipe.name for recipe in choose_recipes(text, ())]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ", ["a", "b"]),
        ("a@x=1,y=2,b", ["a@x=1,y=2", "b"]),
        ("a@x=1,b@x=2,y=3", ["a@x=1", "b@x=2,y=3"]),
        ("a=1,b", ["a=1", "b"]),
    ],
)
def test_overrides_stay_with_their_recipe(text: str, entries: list[str]) -> None:
    assert split_entries(text) == entries


def test_globs_over_presets_and_files_each_recipe_once(work: Path) -> None:
    assert names("wanda-?0,magnitude-50,wanda-*0") == [
        "wanda-50",
        "magnitude-50",
        "wanda-variant-50",
    ]
    assert names(f"{work}/*un*.yaml") == ["prune", "round"]


def test_only_what_is_before_the_at_is_a_pattern() -> None:
    found = choose_recipes("magnitude-*@sparsity=0.3,wanda-50", ())
    assert [recipe.name for recipe in found] == ["magnitude-50@sparsity=0.3", "wanda-50"]
    assert found[0].stages[0].schemes[0][1].weight.sparsity == 0.3  # type: ignore[union-attr]


def test_what_names_nothing_is_refused(work: Path) -> None:
    with pytest.raises(RarefyError, match="did you mean 'wanda-50'"):
        names("wanda-5")
    with pytest.raises(RarefyError, match="empty"):
        names(" , ")
    other = work / "wanda-50.yaml"
    other.write_text((work / "round.yaml").read_text())
    with pytest.raises(RarefyError, match="two different recipes are called wanda-50"):
        names(f"wanda-50,{other}")


def test_the_profiles_own_recipes_exist() -> None:
    smoke, full = (choose_recipes(None, chosen.recipes) for chosen in (SMOKE, FULL))
    assert len(smoke) >= 8
    assert {role(r) for r in smoke} >= {"quantization", "pruning", "surgery", "low rank"}
    levels = {r.name for r in full if r.name.startswith("wanda-50@")}
    assert levels == {f"wanda-50@sparsity={level}" for level in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)}


@pytest.mark.parametrize(
    ("name", "kind", "called", "zeros"),
    [
        ("rtn-int4-g64", "quantization", ["rtn"], False),
        ("smoothquant-w8a8", "quantization", ["smoothquant", "rtn"], False),
        ("magnitude-50", "pruning", ["magnitude"], True),
        ("owl-sparsegpt-70", "pruning", ["sparsegpt", "owl"], True),
        ("svd-80", "low rank", ["svd"], False),
        ("shortgpt-6", "surgery", ["shortgpt"], False),
        ("wanda-2of4-gptq-int4-g64", "composition", ["wanda", "gptq"], True),
        ("llm-pruner-20-gptq-int4-g64", "composition", ["llm-pruner", "gptq"], False),
    ],
)
def test_roles_and_methods(name: str, kind: str, called: list[str], zeros: bool) -> None:
    recipe = load_recipe(name)
    assert (role(recipe), methods(recipe), prunes(recipe)) == (kind, called, zeros)


def test_tasks_by_glob_by_short_name_and_from_a_file(work: Path) -> None:
    full, smoke = choose_tasks(None, "full"), choose_tasks(None, "smoke")
    assert full.counts == profile("full")
    assert smoke.counts == profile("smoke")
    file = work / "quiz.jsonl"
    mixed = choose_tasks(f"sciq,{file}", "full")
    assert mixed.counts == {"rarefy_sciq": None, "local_quiz": None}
    assert mixed.files == [file]
    assert [info.family for info in mixed.infos.values()] == ["choice", "choice"]


def test_a_glob_keeps_to_the_profile_and_a_name_does_not() -> None:
    left_out = next(i.name for i in catalogue().values() if not i.smoke)
    assert left_out not in choose_tasks("*", "smoke").counts
    assert choose_tasks(left_out, "smoke").counts[left_out] > 0  # type: ignore[operator]
    with pytest.raises(RarefyError, match="no task matches 'sciqq'"):
        choose_tasks("sciqq", "smoke")
