"""Evaluate a model folder against the dense model: same text, same windows, same evaluator.

Both models are resident and read one window at a time. Speed is measured afterwards, each model
in a fresh process, in the order A B A B.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.manifest import read_manifest
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora, tokens
from rarefy.errors import RarefyError
from rarefy.evaluate.distances import Quality, TokenDistances, compare_logits, summarise
from rarefy.evaluate.footprint import Footprint, footprint
from rarefy.evaluate.speed import Speed, measure, merge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.data.tokens import TokenSet

    Progress = Callable[[str, int, int], None]

SEQUENCES, LENGTH, _ROUNDS = 16, 512, 2
_PACKAGES = ("rarefy", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal for two evaluations to be comparable.

    Attributes:
        against: the reference, as it was asked for.
        text, sha256, sample: the corpus, the hash of the windows' tokens, and how they begin.
        windows, length: fixed windows of ``length`` tokens, read independently of one another.
        predictions: length - 1 per window; no position is skipped.
        bos: whether the first token of every window is the tokenizer's BOS.
        arithmetic: number format and device. vocabulary: tokens that the tokenizer knows.
    """

    against: str
    text: str
    sha256: str
    sample: str
    windows: int
    length: int
    predictions: int
    bos: bool
    arithmetic: str
    vocabulary: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured; ``asdict`` gives plain JSON.

    Attributes:
        name: the folder's name.
        quant_method: from config.json; empty for a dense model.
        speed, speed_dense: None when speed was not asked for.
        manifest: what the compression wrote about itself; empty for a folder without one.
        versions: of the packages that measured.
    """

    name: str
    quant_method: str
    protocol: Protocol
    quality: Quality
    footprint: Footprint
    footprint_dense: Footprint
    speed: Speed | None
    speed_dense: Speed | None
    manifest: dict[str, Any]
    versions: dict[str, str]

    def report(self) -> dict[str, Any]:
        """Return the content of report.json: plain dicts, lists, numbers and strings."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain


def evaluate(
    directory: str | Path,
    against: str | Path,
    *,
    text: str = "wiki",
    sequences: int | None = None,
    length: int | None = None,
    speed: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure quality, size and speed of a model beside the dense one.

    Args:
        directory: the model under test: a folder or anything that resolves to one.
        against: the dense reference, likewise.
        text: corpus, by name or file.
        sequences: number of windows, 16 by default.
        length: tokens per window, 512 by default.
        speed: also measure speed and peak memory (a minute or so).
        progress: called with (what, done, total).

    Raises:
        RarefyError: the vocabularies differ, the logits are not finite, or the text is too short.
    """
    folder, source = resolve(str(directory)), resolve(str(against))
    tell = progress or (lambda what, done, total: None)
    tokenizer = _same_tokenizer(folder, source)
    windows = tokens.held_out(
        corpora.load(text, tokenizer),
        tokenizer,
        SEQUENCES if sequences is None else sequences,
        LENGTH if length is None else length,
    )
    arithmetic, distances = _compare(folder, source, windows, tell)
    dense_size = footprint(source)
    speeds = _speeds([source, folder], tell) if speed else [None, None]
    quantization = _read(folder, "config.json").get("quantization_config", {})
    return Evaluation(
        name=folder.name,
        quant_method=quantization.get("quant_method", ""),
        protocol=_protocol(str(against), windows, tokenizer, arithmetic),
        quality=summarise(distances, windows.document.tolist()),
        footprint=footprint(folder, dense_size),
        footprint_dense=dense_size,
        speed=speeds[1],
        speed_dense=speeds[0],
        manifest=read_manifest(folder),
        versions={package: _version(package) for package in _PACKAGES},
    )


def _protocol(
    against: str, windows: TokenSet, tokenizer: PreTrainedTokenizerBase, arithmetic: str
) -> Protocol:
    bos = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    count, length = windows.ids.shape
    return Protocol(
        against=against,
        text=windows.corpus,
        sha256=windows.sha256,
        sample=windows.sample,
        windows=count,
        length=length,
        predictions=count * (length - 1),
        bos=bool((windows.ids[:, 0] == bos).all()),
        arithmetic=arithmetic,
        vocabulary=len(tokenizer),
    )


def _same_tokenizer(folder: Path, source: Path) -> PreTrainedTokenizerBase:
    """Return the reference's tokenizer after checking that the other numbers words alike."""
    dense, other = load_tokenizer(source), load_tokenizer(folder)
    if dense.get_vocab() != other.get_vocab():
        raise RarefyError(
            f"{folder} and {source} have different vocabularies, so their predictions cannot be "
            "compared; evaluate against the model that was compressed"
        )
    return dense


@torch.inference_mode()
def _compare(
    folder: Path,
    source: Path,
    windows: TokenSet,
    tell: Progress,
) -> tuple[str, list[TokenDistances]]:
    """Read every window with both models; also say in which arithmetic."""
    tell("load", 0, 2)
    dense = load_model(source)
    tell("load", 1, 2)
    other = load_model(folder)
    tokens.check_vocabulary(windows, dense.get_input_embeddings().num_embeddings)
    distances = []
    for at, ids in enumerate(windows.ids):
        tell("windows", at, len(windows.ids))
        p, q = _logits(dense, ids, source), _logits(other, ids, folder)
        if p.shape != q.shape:
            raise RarefyError(
                f"{folder} predicts {q.shape[-1]} tokens and {source} {p.shape[-1]}; "
                "evaluate against the model that was compressed"
            )
        distances.append(compare_logits(p, q, ids[1:]))
    tell("windows", len(windows.ids), len(windows.ids))
    return f"{str(dense.dtype).removeprefix('torch.')} on {dense.device}", distances


def _logits(model: PreTrainedModel, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    """Return [L - 1, V] logits of one window [L]."""
    logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1]
    if not torch.isfinite(logits).all():
        raise RarefyError(
            f"{folder} gives logits that are not finite numbers; its weights are damaged, "
            "compress it again with a milder recipe"
        )
    found: torch.Tensor = logits
    return found


def _speeds(folders: list[Path], tell: Progress) -> list[Speed | None]:
    """Measure the folders alternately, as ``rarefy chat`` runs them; join each one's rounds."""
    total = _ROUNDS * len(folders)
    rounds: list[list[Speed]] = [[] for _ in folders]
    for at in range(total):
        tell("speed", at, total)
        which = at % len(folders)
        rounds[which].append(measure(folders[which], engine="native"))
    tell("speed", total, total)
    return [merge(one) for one in rounds]


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
