"""Fisher's bits: the expected divergence, the budget, and the walk that follows the choice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from layers import recipe, words
from tiny import save_tiny

import rarefy
from rarefy.allocate.base import Offer
from rarefy.allocate.fisher import Fisher
from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.importance import fisher
from rarefy.engine.skeleton import Skeleton, matrix_of
from rarefy.engine.whole import whole
from rarefy.errors import RarefyError
from rarefy.recipe import parse_recipe

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


def offer(size: int, damage: list[float], given: float) -> Offer:
    bits = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    return Offer(bits * size, torch.tensor(damage, dtype=torch.float64), given * size)


def test_choice_is_the_best_of_all_where_steps_fit() -> None:
    of = {
        "a": offer(10, [9.0, 3.0, 1.0], 3),
        "b": offer(10, [4.5, 2.0, 1.5], 3),
        "c": offer(10, [90.0, 30.0, 10.0], 3),
        "d": offer(10, [0.4, 0.1, 0.0], 3),
    }
    allocator = Fisher((2, 3, 4))
    found = allocator.choose(of)
    budget = sum(o.given for o in of.values())

    def total(widths: tuple[int, ...], what: str) -> float:
        pairs = zip(of.values(), widths, strict=True)
        return sum(float(getattr(o, what)[w - 2]) for o, w in pairs)

    allowed = [w for w in itertools.product((2, 3, 4), repeat=4) if total(w, "bytes") <= budget]
    best = min(allowed, key=lambda w: total(w, "damage"))
    assert tuple(found[name] for name in of) == best


def test_narrowest_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RarefyError, match="2 bits everywhere take more"):
        Fisher((2, 3, 4)).choose({"a": offer(10, [9.0, 3.0, 1.0], 1.5)})


@pytest.mark.parametrize("bits", [(4,), (4, 3), (3, 3), (2, 3.5)])
def test_widths_have_to_rise(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        Fisher(bits)


def test_information_is_the_curvature_of_the_divergence(tmp_path: Path) -> None:
    """Against the divergence itself, for a small random change of each matrix."""
    skeleton = Skeleton(Checkpoint(save_tiny("llama", tmp_path / "dense")), CPU)
    vocabulary = skeleton.model.config.vocab_size
    ids = torch.randint(vocabulary, (192, 8), generator=torch.Generator().manual_seed(1))
    names = [f"{skeleton.map.blocks}.0.{node.path}" for node in skeleton.linears(0)]
    found = fisher(skeleton, names, ids)
    generator = torch.Generator().manual_seed(2)
    with whole(skeleton), torch.no_grad():
        logs = skeleton.model(input_ids=ids).logits.double().log_softmax(-1)
        for name in names:
            weight = matrix_of(skeleton.model.get_submodule(name))
            kept, measured, expected = weight.clone(), 0.0, 0.0
            for _ in range(8):
                change = 0.02 * kept.std() * torch.randn(kept.shape, generator=generator)
                weight.copy_(kept + change)
                moved = skeleton.model(input_ids=ids).logits.double().log_softmax(-1)
                measured += float((logs.exp() * (logs - moved)).sum(-1).mean())
                expected += float((found[name] * change.square()).sum()) / 2
            weight.copy_(kept)
            assert measured == pytest.approx(expected, rel=0.35), name


@pytest.mark.parametrize("role", [{"solver": "nearest"}, {"tuner": "signround", "steps": 2}])
def test_the_walk_rounds_as_was_chosen(tmp_path: Path, role: dict[str, object]) -> None:
    stage = role | {
        "allocate": {"method": "fisher", "bits": [3, 4, 5], "length": 16, "pieces": 8},
        "schemes": {"*": {"format": "int", "bits": 4, "group": 16}},
    }
    even = {key: value for key, value in stage.items() if key != "allocate"}
    model, text = save_tiny("llama", tmp_path / "dense"), words(tmp_path)
    out, flat = (
        rarefy.compress(model, recipe(tmp_path, one), tmp_path / name, calibration=text).path
        for name, one in (("out", stage), ("flat", even))
    )
    mixed, plain = (read_manifest(folder) for folder in (out, flat))
    assert mixed is not None
    assert plain is not None
    size = {name: sum(node["bytes"] for node in m["nodes"]) for name, m in
            (("mixed", mixed), ("plain", plain))}  # fmt: skip
    assert 0.9 * size["plain"] < size["mixed"] <= size["plain"]
    chosen = mixed["history"][-1]["bits"]
    kinds = {node["name"]: node["format"] for node in mixed["nodes"]}
    told = {bits for block in chosen for bits in block.values()}
    assert len(told) > 1
    for index, block in enumerate(chosen):
        for path, bits in block.items():
            [kind] = [k for n, k in kinds.items() if n.endswith(f".{index}.{path}")]
            assert kind.startswith(f"int{bits} ")


def test_allocation_needs_schemes_and_a_walk_by_blocks() -> None:
    stage = {"tuner": "codes", "allocate": {"method": "fisher"}}
    with pytest.raises(RarefyError, match="leave it out"):
        parse_recipe({"stages": [stage]}, "r")
    surgery = {"surgery": "shortgpt", "allocate": {"method": "fisher"}}
    with pytest.raises(RarefyError, match="allocate belongs to a solver or tuner stage"):
        parse_recipe({"stages": [surgery]}, "r")


def test_a_format_without_widths_is_named(tmp_path: Path) -> None:
    stage = {
        "solver": "nearest",
        "allocate": {"method": "fisher", "length": 16, "pieces": 2},
        "schemes": {"*": {"format": "nf4"}},
    }
    model = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RarefyError, match="no bits that could differ"):
        rarefy.compress(
            model, recipe(tmp_path, stage), tmp_path / "out", calibration=words(tmp_path)
        )
