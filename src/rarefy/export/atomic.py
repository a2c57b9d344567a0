"""A GGUF file that appears only when it is complete."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gguf import GGUFWriter

from rarefy.errors import RarefyError, disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray


def demand_new(file: Path) -> None:
    """Refuse to replace anything.

    Raises:
        RarefyError: something is there.
    """
    if file.exists():
        raise RarefyError(f"{file} exists already; choose another --out or remove it")


def write_gguf(
    file: Path,
    architecture: str,
    keys: Callable[[GGUFWriter], None],
    tensors: Iterable[NDArray[Any]],
) -> None:
    """Write a file under a temporary name, then give it its own.

    Args:
        file: to be made.
        architecture: GGUF's name of it.
        keys: adds every key, and the info of every tensor in order.
        tensors: their content in the same order, one in memory at a time.
    """
    temporary = file.with_name(f"{file.name}.partial")
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(temporary, architecture)
        try:
            keys(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor)
            writer.flush()
            writer.close()
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)
