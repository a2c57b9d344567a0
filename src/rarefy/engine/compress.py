"""The verb ``compress``: a checkpoint and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

import rarefy
from rarefy.checkpoint.load import default_device
from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.writer import Writer
from rarefy.data import corpora
from rarefy.data.tokens import calibration, check_vocabulary
from rarefy.engine.absorb import run_transform
from rarefy.engine.operate import run_surgery
from rarefy.engine.skeleton import causal_config
from rarefy.engine.stage import StageRun, Watcher, run_stage
from rarefy.errors import RarefyError
from rarefy.recipe import load_recipe

if TYPE_CHECKING:
    from rarefy.data.tokens import TokenSet
    from rarefy.recipe import Recipe


_RUN = {"solver": run_stage, "transform": run_transform, "surgery": run_surgery}


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    Attributes:
        text: name of a corpus, or a .txt or .jsonl file.
        sequences, length: rows of tokens, and tokens of each row.
        seed: of the choice of documents.
    """

    text: str = "web"
    sequences: int = 64
    length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """A finished compression.

    Attributes:
        path: the new checkpoint folder.
        manifest: what was done, from what, and what was left alone.
        seconds: wall time of this call.
        reused: the folder was there already, made by the same configuration.
    """

    path: Path
    manifest: dict[str, Any]
    seconds: float
    reused: bool = False


def compress(
    model: str | Path,
    recipe: str | Path,
    out: str | Path,
    *,
    calibration: Calibration = Calibration(),
    fresh: bool = False,
    watcher: Watcher = Watcher(),  # noqa: B008  (frozen)
) -> Result:
    """Compress a model by a recipe.

    An interrupted run goes on where it stopped when the same call is made again.

    Args:
        model: folder, ``.gguf`` file, hub id, or "demo".
        recipe: name of a preset, or a YAML file.
        out: folder to be made; it appears only when it is complete.
        calibration: text for recipes that need data.
        fresh: discard a finished or half-done result at ``out`` first.
        watcher: receives remarks and progress.

    Raises:
        RarefyError: anything that a user can mend; see the message.
    """
    start = time.perf_counter()
    plan = load_recipe(recipe)
    target = Path(out)
    source = Checkpoint(resolve(model))
    causal_config(source)  # an architecture that cannot be built is refused before anything else
    tokens = _tokens(source, plan, calibration, watcher) if plan.needs_data else None
    key = _key(plan, source, tokens)
    done = _finished(target, key)
    if done is not None and not fresh:
        return Result(target, done, time.perf_counter() - start, reused=True)
    manifest = _manifest(plan, (str(model), source), (calibration, tokens), key)
    folders = [target.with_name(f"{target.name}.stage{i}") for i in range(1, len(plan.stages))]
    for stage, folder in zip(plan.stages, [*folders, target], strict=True):
        if fresh or _finished(folder, key) is None:
            writer = Writer(folder, key, fresh=fresh)
            run = StageRun(source, stage, tokens, writer, watcher, default_device())
            _RUN[stage.role](run, manifest)
        source = Checkpoint(folder)
    for folder in folders:
        Writer.discard(folder)
    return Result(target, read_manifest(target), time.perf_counter() - start)


def _tokens(source: Checkpoint, recipe: Recipe, wanted: Calibration, watcher: Watcher) -> TokenSet:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise RarefyError(
            f"{source.path} holds no tokenizer that transformers can open; "
            f"recipe {recipe.name} needs one to read calibration text"
        ) from error
    corpus = corpora.load(wanted.text, tokenizer)
    tokens = calibration(corpus, tokenizer, wanted.sequences, wanted.length, wanted.seed)
    check_vocabulary(tokens, causal_config(source).get_text_config().vocab_size)
    watcher.say(
        f"calibration: {tokens.tokens} tokens of {tokens.corpus} "
        f"({wanted.sequences} x {wanted.length}), sha256 {tokens.sha256[:12]}, "
        f"beginning: {tokens.sample!r}"
    )
    return tokens


def _key(recipe: Recipe, source: Checkpoint, tokens: TokenSet | None) -> str:
    """Hash of everything that decides the result."""
    parts = [
        rarefy.__version__,
        recipe.source,
        source.fingerprint(),
        tokens.sha256 if tokens else None,
    ]
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _finished(target: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a finished result of the same configuration."""
    manifest = read_manifest(target) if target.is_dir() else {}
    return manifest if manifest.get("key") == key else None


def _manifest(
    recipe: Recipe,
    model: tuple[str, Checkpoint],
    data: tuple[Calibration, TokenSet | None],
    key: str,
) -> dict[str, Any]:
    import transformers

    ref, source = model
    wanted, tokens = data
    stored = {entry.dtype for entry in source.entries.values()}
    return {
        "key": key,
        "recipe_name": recipe.name,
        "recipe": recipe.source,
        "source": {
            "ref": ref,
            "fingerprint": source.fingerprint(),
            "weights_bytes": sum(entry.size for entry in source.entries.values()),
            "dtype": "/".join(sorted(stored)),
        },
        "calibration": None
        if tokens is None
        else {
            "corpus": tokens.corpus,
            "sequences": wanted.sequences,
            "length": wanted.length,
            "tokens": tokens.tokens,
            "sha256": tokens.sha256,
            "sample": tokens.sample,
        },
        "seed": wanted.seed,
        "versions": {
            "rarefy": rarefy.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
