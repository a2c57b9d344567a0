"""The verb ``compress``: a checkpoint and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

import rarefy
from rarefy.checkpoint.load import default_device
from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.checkpoint.state import read_state
from rarefy.checkpoint.writer import Writer
from rarefy.data import corpora
from rarefy.data.tokens import calibration, check_vocabulary
from rarefy.engine.absorb import run_transform
from rarefy.engine.operate import run_surgery
from rarefy.engine.skeleton import causal_config
from rarefy.engine.stage import StageRun, Watcher, run_stage
from rarefy.engine.train import run_model_tuner
from rarefy.engine.tune import run_block_tuner
from rarefy.errors import RarefyError
from rarefy.objectives.rows import Rows
from rarefy.recipe import load_recipe
from rarefy.synthesis.rows import read_rows, token_rows
from rarefy.tuners.base import BlockTuner, ModelTuner

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.data.tokens import TokenSet
    from rarefy.stages import Recipe, Stage, Text


_RUN = {
    "solver": run_stage,
    "transform": run_transform,
    "surgery": run_surgery,
}


def _runner(stage: Stage) -> Callable[[StageRun, dict[str, Any]], None]:
    """What carries out a stage."""
    if stage.role != "tuner":
        return _RUN[stage.role]
    return run_block_tuner if isinstance(stage.method, BlockTuner) else run_model_tuner


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
    teacher: str | Path | None = None,
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
        teacher: the dense model that tuners are to match; by default the model itself, as it is
            before the recipe's first stage.
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
    dense = _dense(source, teacher, plan)
    tokens = _tokens(source, plan, calibration, watcher) if plan.needs_data else None
    texts = _texts(source, plan, calibration)
    key = _key(plan, (source, dense), tokens, texts)
    done = _finished(target, key)
    if done is not None and not fresh:
        return Result(target, done, time.perf_counter() - start, reused=True)
    manifest = _manifest(plan, (str(model), source), (calibration, tokens), key)
    folders = [target.with_name(f"{target.name}.stage{i}") for i in range(1, len(plan.stages))]
    for stage, folder in zip(plan.stages, [*folders, target], strict=True):
        if fresh or _finished(folder, key) is None:
            writer = Writer(folder, key, fresh=fresh)
            base = None if source is dense else dense
            rows = texts.get(stage.text) if isinstance(stage.method, ModelTuner) else None
            device = default_device()
            run = StageRun(source, stage, tokens, writer, watcher, device, base, rows)
            _runner(stage)(run, manifest)
        source = Checkpoint(folder)
    for folder in folders:
        Writer.discard(folder)
    return Result(target, read_manifest(target), time.perf_counter() - start)


def _dense(source: Checkpoint, teacher: str | Path | None, recipe: Recipe) -> Checkpoint:
    """What tuners are to match.

    Raises:
        RarefyError: the source is compressed, and nobody says from what.
    """
    if teacher is not None:
        return Checkpoint(resolve(teacher))
    if read_state(source.path).formats and any(s.role == "tuner" for s in recipe.stages):
        raise RarefyError(
            f"{source.path} is compressed already, and {recipe.name} is to bring it closer to its "
            "dense model; name that with --teacher"
        )
    return source


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


def _texts(source: Checkpoint, recipe: Recipe, wanted: Calibration) -> dict[Text | None, Rows]:
    """Training rows of every stage that trains the whole model, by the text it asks for."""
    found: dict[Text | None, Rows] = {}
    for stage in recipe.stages:
        if isinstance(stage.method, ModelTuner) and stage.text not in found:
            found[stage.text] = _rows(source, stage.text, wanted)
    return found


def _rows(source: Checkpoint, text: Text | None, wanted: Calibration) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    if text is not None and text.file is not None:
        read = token_rows(read_rows(Path(text.file)), tokenizer, text.length)
        valid = torch.arange(read.ids.shape[1]) < read.lengths[:, None]
        return Rows(read.ids, read.loss, valid)
    corpus = corpora.load(wanted.text, tokenizer)
    if text is None:
        chosen = calibration(corpus, tokenizer, wanted.sequences, wanted.length, wanted.seed)
    else:
        chosen = calibration(corpus, tokenizer, text.rows, text.length, wanted.seed + 1)
    return Rows.text(chosen.ids)


def _key(
    recipe: Recipe,
    models: tuple[Checkpoint, Checkpoint],
    tokens: TokenSet | None,
    texts: dict[Text | None, Rows],
) -> str:
    """Hash of everything that decides the result."""
    parts: list[Any] = [
        rarefy.__version__,
        recipe.source,
        models[0].fingerprint(),
        tokens.sha256 if tokens else None,
    ]
    if models[1] is not models[0]:
        parts.append(models[1].fingerprint())
    parts += [sha256(rows.ids.numpy().tobytes()).hexdigest() for rows in texts.values()]
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
