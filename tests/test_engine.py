"""The engine: the walk against a naive replay, the Gram, and folders that are all or nothing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import save_tiny
from torch import nn

import rarefy
from rarefy import Calibration
from rarefy.checkpoint import writer as writer_module
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.writer import Writer
from rarefy.engine.capture import Batch, capture_all
from rarefy.engine.skeleton import Skeleton, matrix_of, set_matrix
from rarefy.engine.stage import Watcher
from rarefy.engine.walk import BlockTask, compress_block
from rarefy.errors import RarefyError
from rarefy.formats.integer import Int
from rarefy.solvers.base import Problem, output_error
from rarefy.solvers.gptq import GPTQ
from rarefy.statistics import Gram

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.maps.model_map import Node

CPU = torch.device("cpu")
INT4 = {"format": "int", "bits": 4, "group": 32}
INT3 = {"format": "int", "bits": 3, "group": 32}
ROW8 = {"format": "int", "bits": 8}


def recipe(folder: Path, *stages: dict[str, Any], name: str = "recipe") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"stages": list(stages)}, sort_keys=False))
    return file


def nearest(**schemes: Any) -> dict[str, Any]:
    return {"solver": "nearest", "schemes": schemes}


def gptq(**schemes: Any) -> dict[str, Any]:
    return {"solver": "gptq", "schemes": schemes}


@pytest.fixture
def data(tmp_path: Path) -> Calibration:
    """Eight rows of pseudo-random words."""
    g = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000,), generator=g).tolist()
    words = "".join(" " if i % 6 == 5 else chr(c) for i, c in enumerate(letters))
    (tmp_path / "calibration.txt").write_text(words)
    return Calibration(str(tmp_path / "calibration.txt"), sequences=4, length=32)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def digests(folder: Path) -> dict[str, str]:
    """Hashes of the files that do not depend on time."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "timings.json"
    }


# The Gram


def test_gram_is_the_mean_outer_product() -> None:
    # More channels than two strips, so that the mirrored part is made of several pieces.
    X = torch.randn(50, 800, generator=torch.Generator().manual_seed(0)) + 0.5
    gram = Gram(800, CPU)
    gram.add(X.reshape(5, 10, 800))
    mean = gram.mean()
    exact = X.double().T @ X.double() / 50
    assert gram.tokens == 50
    assert torch.equal(mean, mean.T)
    assert (mean - exact).abs().max() < 1e-6 * exact.abs().max()


def test_gram_is_additive() -> None:
    X = torch.randn(60, 30, generator=torch.Generator().manual_seed(1))
    parts, whole = Gram(30, CPU), Gram(30, CPU)
    for part in X.split([7, 1, 52]):
        parts.add(part)
    whole.add(X)
    assert parts.tokens == whole.tokens == 60
    assert torch.allclose(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-6)


# The walk


@dataclass
class Setting:
    skeleton: Skeleton
    batches: list[Batch]


def setting(family: str, folder: Path, rows: int = 6, length: int = 12) -> Setting:
    path = save_tiny(family, folder / family)
    skeleton = Skeleton(Checkpoint(path), CPU)
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        batches = capture_all(skeleton, ids, batch_tokens=2 * length)
    assert len(batches) == rows // 2
    return Setting(skeleton, batches)


def formats_of(skeleton: Skeleton) -> dict[str, Int]:
    """Mixed formats, and one node left alone: its group must still be in the right order."""
    out: dict[str, Int] = {}
    for i, node in enumerate(skeleton.map.linears):
        if node.path.endswith("k_proj"):
            continue
        out[node.path] = Int(8, 24) if i % 3 == 1 else Int(3, 16)
    return out


def naive_group(
    module: nn.Module, index: int, nodes: list[Node], batches: list[Batch]
) -> tuple[torch.Tensor | None, int]:
    """Run the block from its inputs once more and take the Gram of one group."""
    seen: list[torch.Tensor] = []
    first = module.get_submodule(nodes[0].path)
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in batches:
        batch.run(module, index)
    handle.remove()
    if not seen:
        return None, 0
    gram = Gram(seen[0].shape[-1], CPU)
    for x in seen:
        gram.add(x)
    return gram.mean(), gram.tokens


def naive_block(
    skeleton: Skeleton,
    index: int,
    module: nn.Module,
    formats: dict[str, Int],
    batches: list[Batch],
) -> dict[str, tuple[dict[str, torch.Tensor], float | None, int]]:
    """True-sequential GPTQ by replay; node path -> (stored tensors, error, tokens)."""
    solver, results = GPTQ(), {}
    for group in skeleton.map.shared_inputs:
        nodes = [node for node in group if node.path in formats]
        if not nodes:
            continue
        H, tokens = naive_group(module, index, nodes, batches)
        for node in nodes:
            linear, fmt = module.get_submodule(node.path), formats[node.path]
            W = matrix_of(linear).clone()
            if H is None:
                grid = fmt.fit(W)
                Q, error = grid.round(W), None
            else:
                solution = solver.solve(Problem(node.path, W, H), fmt)
                Q, grid = solution.weight, solution.grid
                error = output_error(W, Q, H)
            results[node.path] = (grid.encode(Q), error, tokens)
            set_matrix(linear, Q)
    for batch in batches:
        batch.hidden = batch.run(module, index)
    return results


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe"])
def test_one_suspended_pass_equals_replaying_the_block(family: str, tmp_path: Path) -> None:
    ours, theirs = setting(family, tmp_path), setting(family, tmp_path)
    formats = formats_of(ours.skeleton)
    with torch.no_grad():
        for index in range(len(ours.skeleton.blocks)):
            with ours.skeleton.block(index) as module:
                groups = ours.skeleton.map.shared_inputs
                task = BlockTask("block", index, module, groups, dict(formats), GPTQ())
                compress_block(task, ours.batches)
            with theirs.skeleton.block(index) as module:
                naive = naive_block(theirs.skeleton, index, module, formats, theirs.batches)
            assert task.results.keys() == naive.keys() == formats.keys()
            for path, (packed, error, tokens) in naive.items():
                assert same(task.results[path].packed, packed), path
                assert task.results[path].tokens == tokens
                assert (error is None) == (task.results[path].error is None)
                # Stacked matrices are summed in another order.
                assert error is None or task.results[path].error == pytest.approx(error, rel=1e-4)
            for mine, replayed in zip(ours.batches, theirs.batches, strict=True):
                assert torch.equal(mine.hidden, replayed.hidden)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_outputs_passed_on_are_those_of_the_compressed_block(family: str, tmp_path: Path) -> None:
    case = setting(family, tmp_path)
    inputs = [Batch(batch.hidden.clone(), batch.calls) for batch in case.batches]
    groups = case.skeleton.map.shared_inputs
    with torch.no_grad(), case.skeleton.block(0) as module:
        dense = [batch.run(module, 0) for batch in inputs]
        task = BlockTask("block", 0, module, groups, formats_of(case.skeleton), GPTQ())
        compress_block(task, case.batches)
        for node in case.skeleton.map.linears:
            if node.path in task.formats:
                stored = task.formats[node.path].decode(task.results[node.path].packed)
                assert torch.equal(matrix_of(module.get_submodule(node.path)), stored)
        for before, after, was in zip(inputs, case.batches, dense, strict=True):
            assert torch.equal(after.hidden, before.run(module, 0))
            assert not torch.allclose(after.hidden, was, rtol=1e-3)
        assert not any(module._forward_pre_hooks for module in module.modules())


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3_moe"])
def test_each_linear_runs_once_per_calibration_token(
    family: str, tmp_path: Path, data: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: Counter[int] = Counter()
    alive: dict[int, nn.Linear] = {}
    forward = nn.Linear.forward

    def count(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        tokens[id(self)] += x.shape[:-1].numel()
        alive[id(self)] = self
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", count)
    model = save_tiny(family, tmp_path / "dense")
    out = rarefy.compress(
        model, recipe(tmp_path, gptq(**{"*": INT4})), tmp_path / "out", calibration=data
    )
    total = data.sequences * data.length
    nodes = out.manifest["nodes"]
    if family == "qwen3_moe":
        # Two of four experts for every token, of three linears each, in two blocks.
        experts = [n for n in nodes if ".experts." in n["name"]]
        others = [n for n in nodes if ".experts." not in n["name"]]
        assert sum(n["tokens"] for n in experts) == 2 * 3 * 2 * total
        assert sum(tokens.values()) == (2 * 3 * 2 + len(others)) * total
    else:
        assert len(tokens) == len(nodes)
        assert set(tokens.values()) == {total}
        assert {n["tokens"] for n in nodes} == {total}


def test_an_expert_without_tokens_is_rounded_and_reported(
    tmp_path: Path, data: Calibration
) -> None:
    # Two tokens of two experts each: at least four of the eight experts of a block stay idle.
    model = save_tiny("qwen3_moe", tmp_path / "dense", num_experts=8)
    few = Calibration(data.text, sequences=1, length=2)
    out = rarefy.compress(
        model, recipe(tmp_path, gptq(**{"*": INT4})), tmp_path / "out", calibration=few
    )
    experts = {n["name"]: n for n in out.manifest["nodes"] if ".experts." in n["name"]}
    idle = {name for name, node in experts.items() if node["tokens"] == 0}
    assert len(experts) == 2 * 8 * 3
    assert 2 * 4 * 3 <= len(idle) < len(experts)
    reported = {f["node"] for f in out.manifest["fallbacks"] if "no calibration" in f["what"]}
    assert reported == idle
    assert {experts[name]["solver"] for name in idle} == {"nearest"}
    dense, stored = tensors(model), tensors(out.path)
    name = min(name for name in idle if name.endswith("down_proj"))
    W = dense[f"{name}.weight"]
    fmt = Int(4, 32)
    packed = {suffix: stored[f"{name}.{suffix}"] for suffix in fmt.layout(*W.shape)}
    assert same(packed, fmt.fit(W).encode(W))


# Recipes at work


def test_mixed_precision_and_kept_layers(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    table = {"*.mlp.down_proj": ROW8, "model.layers.0.*": "keep", "*": INT4, "*.q_proj": ROW8}
    out = rarefy.compress(model, recipe(tmp_path, nearest(**table)), tmp_path / "out")
    labels = {node["name"]: node["format"] for node in out.manifest["nodes"]}
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up")]
    expected = {f"model.layers.{i}.mlp.down_proj": "int8 row" for i in range(3)}
    expected |= {f"model.layers.{i}.{path}": "int4 g32" for i in (1, 2) for path in linears}
    assert labels == expected
    kept = {node["name"] for node in out.manifest["kept"]}
    assert {f"model.layers.0.{path}" for path in linears} <= kept
    before, after = tensors(model), tensors(out.path)
    for name in (*(f"model.layers.0.{path}.weight" for path in linears), "lm_head.weight"):
        assert torch.equal(before[name], after[name])
    down = "model.layers.0.mlp.down_proj"
    assert f"{down}.weight" not in after
    W = before[f"{down}.weight"]
    packed = {s: after[f"{down}.{s}"] for s in Int(8).layout(*W.shape)}
    assert torch.equal(Int(8).decode(packed), Int(8).fit(W).round(W))
    weights = sum(node["weights"] for node in out.manifest["nodes"])
    assert out.manifest["coverage"] == weights / sum(t.numel() for t in before.values())


def test_two_stages_of_rounding_equal_one(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stages = (
        nearest(**{"*.mlp.*": INT3}),
        nearest(**{"*.mlp.*": "keep", "*": INT4}),
    )
    both = nearest(**{"*.mlp.*": INT3, "*": INT4})
    two = rarefy.compress(model, recipe(tmp_path, *stages), tmp_path / "two")
    one = rarefy.compress(model, recipe(tmp_path, both, name="one"), tmp_path / "one")
    assert same(tensors(two.path), tensors(one.path))
    configs = [json.loads((r.path / "config.json").read_text()) for r in (one, two)]
    for config in configs:
        for group in config["quantization_config"]["groups"]:
            group["modules"] = sorted(group["modules"])
        config["quantization_config"]["groups"].sort(key=lambda g: g["scheme"]["bits"])
    assert configs[0] == configs[1]
    assert sorted(p.name for p in tmp_path.iterdir() if "stage" in p.name) == []


def test_two_stages_equal_two_runs(tmp_path: Path, data: Calibration) -> None:
    model = save_tiny("qwen2", tmp_path / "dense")
    stages = (gptq(**{"*.mlp.*": INT3}), gptq(**{"*.mlp.*": "keep", "*": INT4}))
    two = rarefy.compress(model, recipe(tmp_path, *stages), tmp_path / "two", calibration=data)
    source = model
    for i, stage in enumerate(stages):
        file = recipe(tmp_path, stage, name=f"stage{i}")
        source = rarefy.compress(source, file, tmp_path / f"run{i}", calibration=data).path
    assert same(tensors(two.path), tensors(source))


def test_the_manifest_tells_of_every_stage(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stages = (
        nearest(**{"*.mlp.*": INT3}),
        nearest(**{"*.mlp.*": "keep", "*": INT4}),
    )
    out = rarefy.compress(model, recipe(tmp_path, *stages), tmp_path / "two")
    assert len(out.manifest["nodes"]) == 3 * 7
    assert not [node for node in out.manifest["kept"] if ".mlp." in node["name"]]
    one = nearest(**{"*.mlp.*": INT3, "*": INT4})
    whole = rarefy.compress(model, recipe(tmp_path, one, name="one"), tmp_path / "one")
    assert out.manifest["coverage"] == whole.manifest["coverage"]


def test_a_matrix_is_compressed_once(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stages = (nearest(**{"*.mlp.*": INT3}), nearest(**{"*": INT4}))
    with pytest.raises(RarefyError, match=r"mlp.*stored as int3 g32 already"):
        rarefy.compress(model, recipe(tmp_path, *stages), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_the_source_do_not_matter(tmp_path: Path, data: Calibration) -> None:
    whole = save_tiny("llama", tmp_path / "whole")
    from tiny import tiny, tiny_tokenizer

    tiny("llama")[1].save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    file = recipe(tmp_path, gptq(**{"*": INT4}))
    outs = [
        rarefy.compress(model, file, tmp_path / f"out-{model.name}", calibration=data).path
        for model in (whole, tmp_path / "cut")
    ]
    assert same(tensors(outs[0]), tensors(outs[1]))


# Interruption


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def killer(at: int) -> Watcher:
    calls = iter(range(1, 100))

    def step(done: int, total: int) -> None:
        if next(calls) == at:
            raise Killed

    return Watcher(step=step)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    at: int, tmp_path: Path, data: Calibration
) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    file = recipe(tmp_path, gptq(**{"*": INT4}))
    straight = rarefy.compress(model, file, tmp_path / "straight", calibration=data)
    with pytest.raises(Killed):
        rarefy.compress(model, file, tmp_path / "out", calibration=data, watcher=killer(at))
    assert not (tmp_path / "out").exists()
    parts = {f: f.stat().st_mtime_ns for f in (tmp_path / "out.partial").glob("part-*")}
    assert len(parts) == at
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        seen.append(done)
        assert all(f.stat().st_mtime_ns == time for f, time in parts.items())

    resumed = rarefy.compress(
        model, file, tmp_path / "out", calibration=data, watcher=Watcher(step=watch)
    )
    assert seen == [1, 2, 3]
    assert digests(resumed.path) == digests(straight.path)
    assert not (tmp_path / "out.partial").exists()
    assert rarefy.compress(model, file, tmp_path / "out", calibration=data).reused


def test_a_run_interrupted_in_its_second_stage_goes_on(tmp_path: Path, data: Calibration) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    stages = (gptq(**{"*.mlp.*": INT3}), gptq(**{"*.mlp.*": "keep", "*": INT4}))
    file = recipe(tmp_path, *stages)
    straight = rarefy.compress(model, file, tmp_path / "straight", calibration=data)
    with pytest.raises(Killed):
        rarefy.compress(model, file, tmp_path / "out", calibration=data, watcher=killer(5))
    assert not (tmp_path / "out").exists()
    resumed = rarefy.compress(model, file, tmp_path / "out", calibration=data)
    assert same(tensors(resumed.path), tensors(straight.path))


def test_another_configuration_is_refused_unless_fresh(tmp_path: Path, data: Calibration) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    four, three = (
        recipe(tmp_path, gptq(**{"*": scheme}), name=str(scheme["bits"])) for scheme in (INT4, INT3)
    )
    out = tmp_path / "out"
    with pytest.raises(Killed):
        rarefy.compress(model, four, out, calibration=data, watcher=killer(2))
    with pytest.raises(RarefyError, match="half-done run of another recipe"):
        rarefy.compress(model, three, out, calibration=data)
    first = rarefy.compress(model, three, out, calibration=data, fresh=True)
    clean = rarefy.compress(model, three, tmp_path / "clean", calibration=data)
    assert digests(first.path) == digests(clean.path)
    with pytest.raises(RarefyError, match="holds something else"):
        rarefy.compress(model, four, out, calibration=data)
    assert digests(out) == digests(clean.path)
    again = rarefy.compress(model, four, out, calibration=data, fresh=True)
    assert not again.reused
    assert again.manifest["recipe_name"] == "4"


# The writer


PARTS = {
    "a": {"a.w": torch.arange(300.0), "a.n": torch.tensor([3], dtype=torch.int64)},
    "b": {"b.w": torch.arange(77, dtype=torch.int8), "b.h": torch.ones(5, 3).half()},
    "c": {"c.w": torch.full((40, 4), 2.5).bfloat16(), "c.e": torch.empty(0, 4)},
}


def filled(out: Path) -> Writer:
    writer = Writer(out, "key")
    for part, content in PARTS.items():
        writer.add(part, content, {"part": part})
    return writer


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (1000, 3), (1, 6)])
def test_shards_read_back(tmp_path: Path, shard_bytes: int, files: int) -> None:
    writer = filled(tmp_path / "out")
    (writer.folder / "config.json").write_text("{}")
    writer.finish(["c", "a", "b"], shard_bytes)
    everything = {name: t for part in PARTS.values() for name, t in part.items()}
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == files
    assert same(tensors(tmp_path / "out"), everything)
    by_library: dict[str, torch.Tensor] = {}
    for shard in shards:
        by_library |= load_file(shard)
    assert same(by_library, everything)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == everything.keys()
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in everything.values())


def test_nothing_has_the_final_name_before_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = filled(tmp_path / "out")
    real, calls = writer_module._write_shard, iter(range(10))

    def fail(path: Path, shard: Any) -> None:
        real(path, shard)
        if next(calls) == 1:
            raise Killed

    monkeypatch.setattr(writer_module, "_write_shard", fail)
    with pytest.raises(Killed):
        writer.finish(list(PARTS), shard_bytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial"]
    monkeypatch.undo()
    again = Writer(tmp_path / "out", "key")
    assert [again.has(part) for part in PARTS] == [True] * 3
    (again.folder / "config.json").write_text("{}")
    again.finish(list(PARTS), shard_bytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert same(
        tensors(tmp_path / "out"), {k: t for part in PARTS.values() for k, t in part.items()}
    )


def test_a_part_without_a_journal_entry_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "out", "key")
    writer.add("a", PARTS["a"], 1)

    def fail(path: Path, value: object) -> None:
        raise Killed

    monkeypatch.setattr(writer_module, "write_json", fail)
    with pytest.raises(Killed):
        writer.add("b", PARTS["b"], 2)
    monkeypatch.undo()
    again = Writer(tmp_path / "out", "key")
    assert again.has("a")
    assert again.notes("a") == 1
    assert same(again.read("a"), PARTS["a"])
    assert not again.has("b")
    again.add("b", PARTS["b"], 2)
    assert same(again.read("b"), PARTS["b"])


def test_writer_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    filled(tmp_path / "out")
    with pytest.raises(RarefyError, match="another recipe, model or data"):
        Writer(tmp_path / "out", "other key")
    assert Writer(tmp_path / "out", "key").has("a")
    assert not Writer(tmp_path / "out", "other key", fresh=True).has("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(RarefyError, match="holds something else"):
        Writer(tmp_path / "full", "key")
    (tmp_path / "file").write_text("")
    with pytest.raises(RarefyError, match="holds something else"):
        Writer(tmp_path / "file", "key")
    with pytest.raises(RarefyError, match="a part of this path is a file"):
        Writer(tmp_path / "file" / "below", "key")
