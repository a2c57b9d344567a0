"""Recipes: what is read, who wins, and one sentence for every mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from rarefy.errors import RarefyError
from rarefy.formats.integer import Int
from rarefy.recipe import (
    Scheme,
    describe,
    format_from,
    iterate_formats,
    load_recipe,
    parse_recipe,
    presets,
)
from rarefy.solvers.gptq import GPTQ
from rarefy.solvers.nearest import Nearest

if TYPE_CHECKING:
    from pathlib import Path

INT4 = {"format": "int", "bits": 4, "group": 64}


def stage(**changes: Any) -> dict[str, Any]:
    return {"solver": "nearest", "schemes": {"*": INT4}} | changes


def parse(*stages: dict[str, Any]) -> Any:
    return parse_recipe({"stages": list(stages)}, "trial")


def test_first_match_wins_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(
        """
stages:
  - solver: gptq
    damping: 0.05
    schemes:
      "*.mlp.down_proj": {format: int, bits: 8, group: 64}
      "model.layers.0.*": keep
      "lm_head": {format: int, bits: 8}
      "*": {format: int, bits: 4, group: 64}
      "*.q_proj": keep
"""
    )
    recipe = load_recipe(file)
    assert recipe.name == "mixed"
    assert recipe.needs_data
    [only] = recipe.stages
    assert only.method == GPTQ(damping=0.05)

    def inside(name: str) -> Any:
        scheme = only.scheme_for(name, inside=True)
        return scheme and scheme.weight

    assert inside("model.layers.0.mlp.down_proj") == Int(8, 64)
    assert inside("model.layers.0.self_attn.q_proj") is None
    assert inside("model.layers.1.self_attn.q_proj") == Int(4, 64)
    assert inside("model.layers.10.mlp.up_proj") == Int(4, 64)
    assert only.scheme_for("lm_head", inside=False) == Scheme(Int(8))
    assert list(iterate_formats(recipe)) == [Int(8, 64), Int(8), Int(4, 64)]


def test_a_bare_star_means_the_linears_of_the_blocks() -> None:
    [only] = parse(stage()).stages
    assert only.scheme_for("model.layers.0.mlp.up_proj", inside=True) == Scheme(Int(4, 64))
    assert only.scheme_for("model.embed_tokens", inside=False) is None
    assert only.scheme_for("lm_head", inside=False) is None
    [spelled] = parse(stage(schemes={"*embed*": INT4, "*": "keep"})).stages
    assert spelled.scheme_for("model.embed_tokens", inside=False) == Scheme(Int(4, 64))
    assert spelled.scheme_for("model.layers.0.mlp.up_proj", inside=True) is None


def test_patterns_know_upper_and_lower_case() -> None:
    [only] = parse(stage(schemes={"LM_HEAD": INT4, "*": INT4})).stages
    assert only.scheme_for("lm_head", inside=False) is None


def test_what_matches_no_pattern_is_left_alone() -> None:
    [only] = parse(stage(schemes={"*.mlp.*": INT4})).stages
    assert only.scheme_for("model.layers.0.self_attn.q_proj", inside=True) is None


def test_stages_keep_their_order() -> None:
    recipe = parse(stage(), stage(solver="gptq", block=16))
    assert [type(s.method) for s in recipe.stages] == [Nearest, GPTQ]
    assert recipe.needs_data
    assert not parse(stage()).needs_data


def test_the_presets_are_what_their_names_say() -> None:
    expected = {
        "rtn-int4-g64": (Nearest(), Int(4, 64)),
        "gptq-int4-g64": (GPTQ(static_groups=True), Int(4, 64, rule="mse")),
        "gptq-int3-g64": (GPTQ(static_groups=True), Int(3, 64, rule="mse")),
    }
    assert set(expected) <= set(presets())
    for name, (solver, fmt) in expected.items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        [only] = recipe.stages
        assert only.method == solver
        assert only.scheme_for("model.layers.3.mlp.up_proj", inside=True) == Scheme(fmt)
        assert only.scheme_for("model.embed_tokens", inside=False) is None


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_a_valid_recipe_under_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_recipe_of_the_documentation_parses() -> None:
    from rarefy import recipe as module

    assert module.__doc__ is not None
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    import yaml

    recipe = parse_recipe(yaml.safe_load("\n".join(lines)), "doc")
    assert (recipe.name, len(recipe.stages[0].schemes)) == ("mixed", 4)


@pytest.mark.parametrize("fmt", [Int(4, 64), Int(3, None, True, "mse", "bfloat16")])
def test_formats_survive_plain_data(fmt: Int) -> None:
    assert format_from(describe(fmt)) == fmt
    assert describe(fmt)["format"] == "int"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "trial: stages: field required"),
        ({"stages": []}, "stages is empty"),
        ({"stages": 3}, "stages:"),
        ({"stages": [stage()], "stage": 1}, "unknown key 'stage'; did you mean 'stages'"),
        ({"stages": [stage()], "zzz": 1}, "unknown key 'zzz'; known: name, description, stages"),
        (
            {"stages": [{"schemes": {"*": INT4}}]},
            "stage 1: the key solver, transform, surgery or tuner is missing",
        ),
        ({"stages": [{"solvr": "gptq", "schemes": {}}]}, "is missing; did you mean 'solver'"),
        ({"stages": [stage(), stage(solver="gtpq")]}, "no solver called 'gtpq'.*'gptq'"),
        ({"stages": [stage(), stage(dampin=1)]}, "stage 2: 'dampin' is not an option"),
        ({"stages": [stage(solver="gptq", dampin=1)]}, "did you mean 'damping'"),
        ({"stages": [stage(solver="gptq", damping=-1)]}, "damping must not be negative"),
        ({"stages": [stage(solver="gptq", block="big")]}, "block .* must be int"),
        ({"stages": [stage(schemes={})]}, "give schemes"),
        ({"stages": [stage(schemes=["*"])]}, "give schemes"),
        ({"stages": [stage(schemes={"*": "skip"})]}, r"'\*': give 'keep' or a mapping"),
        ({"stages": [stage(schemes={"*": {"bits": 4}})]}, "key format"),
        ({"stages": [stage(schemes={"*": {"format": "posit"}})]}, "no format called 'posit'"),
        ({"stages": [stage(schemes={"*": {"format": "int"}})]}, "needs bits"),
        ({"stages": [stage(schemes={"*": INT4 | {"bits": 9}})]}, r"bits must lie in 2\.\.8"),
        ({"stages": [stage(schemes={"*": INT4 | {"groups": 9}})]}, "did you mean 'group'"),
    ],
)
def test_every_mistake_is_one_sentence(data: dict[str, Any], words: str) -> None:
    with pytest.raises(RarefyError, match=words) as caught:
        parse_recipe(data, "trial")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"stages: [", "not valid YAML"), (b"- 1", "must be a mapping"), (b"\xff\xfe\x80", "YAML")],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(RarefyError, match=words) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(RarefyError, match="did you mean 'gptq-int4-g64'"):
        load_recipe("gptq-int4-g46")


def test_other_values_go_to_every_place_that_sets_them() -> None:
    plain, edited = load_recipe("wanda-50"), load_recipe("wanda-50@sparsity=0.3")
    assert edited.name == "wanda-50@sparsity=0.3"
    [(_, scheme)] = edited.stages[0].schemes
    assert scheme.weight.density == pytest.approx(0.7)  # type: ignore[union-attr]
    assert edited.source != plain.source
    two = load_recipe("wanda-2of4@kept=4,of=8").stages[0].schemes[0][1]
    assert (two.weight.kept, two.weight.of) == (4, 8)  # type: ignore[union-attr]
    assert load_recipe("wanda-50").source == plain.source, "a preset was changed for good"


@pytest.mark.parametrize("ref", ["wanda-50@sparsty=0.3", "wanda-50@sparsity", "wanda-50@sparsity="])
def test_other_values_for_keys_that_are_not_there_are_refused(ref: str) -> None:
    with pytest.raises(RarefyError, match="is not key=value with a key that wanda-50 sets"):
        load_recipe(ref)
    with pytest.raises(RarefyError, match=r"there is no recipe 'wanda-5@sparsity=0\.3'"):
        load_recipe("wanda-5@sparsity=0.3")
