"""What a stage says about its result: config, state and manifest."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.state import State
from rarefy.checkpoint.travel import travel
from rarefy.checkpoint.writer import write_json
from rarefy.engine.select import dense_linears
from rarefy.export.containers import quantization_config
from rarefy.resources import peak_memory

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.engine.select import Selection
    from rarefy.engine.skeleton import Skeleton
    from rarefy.engine.stage import StageRun
    from rarefy.formats.base import Format


def write_config(
    folder: Path, skeleton: Skeleton, chosen: Selection, stored: dict[str, Format]
) -> None:
    """Write ``config.json``, which announces the formats, and ``state.json``, the record.

    Args:
        folder: of the result. skeleton: the source. chosen: the resolved scheme table.
        stored: module-side name -> format of every matrix that the stage wrote, as recorded.
    """
    source = skeleton.checkpoint
    formats = {name: stored.get(name, fmt) for name, fmt in all_formats(skeleton, chosen).items()}
    inputs = skeleton.state.inputs | chosen.inputs
    State(skeleton.state.base or source.fingerprint(), formats, inputs).write(folder)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if skeleton.tied and skeleton.map.head in formats:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(
        skeleton.stored_matrices(formats, inputs), dense_linears(skeleton, formats), skeleton.widths
    )
    write_json(folder / "config.json", config)


def close_dense(
    run: StageRun,
    skeleton: Skeleton,
    manifest: dict[str, Any],
    what: dict[str, Any],
    start: float,
) -> None:
    """Write the records of a stage that leaves a dense model: config, state, manifest, timings.

    Args:
        run, skeleton, manifest: of the stage.
        what: what the stage did, for its entry in the manifest's history.
        start: when it began, by ``time.perf_counter``.
    """
    folder, source = run.writer.folder, run.source
    State(skeleton.state.base or source.fingerprint()).write(folder)
    write_json(folder / "config.json", source.config)
    facts = {"nodes": [], "kept": [], "fallbacks": [], "coverage": 0.0}
    close(run, manifest | facts | {"history": history(run, what)}, start, {})


def close(run: StageRun, manifest: dict[str, Any], start: float, timings: dict[str, float]) -> None:
    """Write manifest and timings, and let the tokenizer travel.

    Seconds count from the first stage of the same recipe.
    """
    folder = run.writer.folder
    before = read_manifest(run.source.path)
    same = before.get("key") == manifest["key"]
    seconds = time.perf_counter() - start + (before.get("seconds", 0.0) if same else 0.0)
    write_json(folder / "manifest.json", manifest)
    write_json(
        folder / "timings.json",
        {"seconds": seconds, "timings": timings, "peak_memory_bytes": peak_memory()},
    )
    travel(run.source.path, folder)


def history(run: StageRun, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that led here, this one last: role, name, options, and what it did."""
    options = dataclasses.asdict(run.stage.method)  # type: ignore[call-overload]
    entry = {"role": run.stage.role, "name": run.stage.name, "options": options} | what
    return [*read_manifest(run.source.path).get("history", []), entry]


def all_formats(skeleton: Skeleton, chosen: Selection) -> dict[str, Format]:
    """Module-side name -> format of everything that is compressed once the stage is done."""
    formats = dict(skeleton.earlier)
    for index, block in enumerate(chosen.blocks):
        formats |= {f"{skeleton.map.blocks}.{index}.{path}": fmt for path, fmt in block.items()}
    shared = skeleton.shares_packed_embedding(set(chosen.outside))
    return formats | {
        name: fmt
        for name, fmt in chosen.outside.items()
        if not (shared and name == skeleton.map.head)
    }


def account(skeleton: Skeleton, chosen: Selection, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """The stage's part of the manifest: what was compressed, what was kept, and every fallback.

    Args:
        skeleton: the source.
        chosen: the resolved scheme table.
        nodes: entries of the matrices that the stage compressed.
    """
    before_this = read_manifest(skeleton.checkpoint.path)
    earlier = {node["name"]: node for node in before_this.get("nodes", [])}
    for node in nodes:
        before = earlier.pop(node["name"], None)
        if before is not None:
            node["before"] = {key: before[key] for key in ("format", "solver")}
    # A factorized matrix is accounted for by its factors once they are compressed themselves.
    factors = {node["name"].rpartition(".")[0] for node in nodes}
    nodes = [*(node for name, node in earlier.items() if name not in factors), *nodes]
    return {
        "nodes": nodes,
        "kept": [
            _kept(skeleton, name, why)
            for name, why in chosen.kept.items()
            if name not in skeleton.earlier
        ],
        "fallbacks": [
            {"node": node["name"], "what": note} for node in nodes for note in node["notes"]
        ],
        "coverage": sum(node["weights"] for node in nodes) / skeleton.parameters,
    }


def _kept(skeleton: Skeleton, name: str, why: str) -> dict[str, Any]:
    """What the manifest says of a matrix that was left alone."""
    if name == skeleton.map.head and skeleton.tied:
        return {"name": name, "weights": 0, "bytes": 0, "why": "tied to the embedding"}
    rows, columns = skeleton.shape(name)
    stored = skeleton.locate(f"{name}.weight")
    size = skeleton.checkpoint.entries[stored].size if stored else 0
    return {"name": name, "weights": rows * columns, "bytes": size, "why": why}
