"""What a stage says about its result: config, state and manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.state import State
from rarefy.checkpoint.writer import write_json
from rarefy.engine.select import dense_linears
from rarefy.export.containers import quantization_config

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.engine.select import Selection
    from rarefy.engine.skeleton import Skeleton
    from rarefy.formats.base import Format


def write_config(folder: Path, skeleton: Skeleton, chosen: Selection) -> None:
    """Write ``config.json``, which announces the formats, and ``state.json``, the record."""
    source = skeleton.checkpoint
    formats = all_formats(skeleton, chosen)
    State(skeleton.state.base or source.fingerprint(), formats).write(folder)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if skeleton.tied and skeleton.map.head in formats:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(
        skeleton.stored_matrices(formats), dense_linears(skeleton, formats)
    )
    write_json(folder / "config.json", config)


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
    nodes = [*read_manifest(skeleton.checkpoint.path).get("nodes", []), *nodes]
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
