"""Importance of columns: the mean squared input of every matrix, as llama.cpp's files hold it.

    <tensor>.in_sum2   sum of x^2 over tokens, one number a column
    <tensor>.counts    number of tokens

Names are those of GGUF. The statistic is the diagonal of the Gram matrix that solvers use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from rarefy.checkpoint.load import load_tokenizer
from rarefy.data import corpora
from rarefy.data.tokens import calibration, check_vocabulary
from rarefy.engine.capture import capture_all
from rarefy.engine.observe import observe
from rarefy.errors import RarefyError
from rarefy.export.atomic import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rarefy.data.tokens import TokenSet
    from rarefy.engine.skeleton import Skeleton

Importance = dict[str, torch.Tensor]
"""Name of a matrix in GGUF -> mean squared input of each column, float32 [n]."""

ROWS, LENGTH = 64, 512


def importance_from(
    ref: str, skeleton: Skeleton, names: Mapping[str, str], tell: Callable[[str, int, int], None]
) -> tuple[Importance, TokenSet | None]:
    """Importance from a file, or measured on a corpus.

    Args:
        ref: a file that llama.cpp or rarefy wrote, or what ``corpora.load`` takes.
        skeleton: the model. names: module-side parameter name -> name in GGUF.
        tell: told of progress.

    Returns:
        The importance, and the tokens that it was measured on, if it was.
    """
    file = Path(ref)
    if file.suffix in (".gguf", ".dat", ".imatrix"):
        return read_imatrix(file), None
    tokenizer = load_tokenizer(skeleton.checkpoint.path)
    tokens = calibration(corpora.load(ref, tokenizer), tokenizer, ROWS, LENGTH, 0)
    check_vocabulary(tokens, skeleton.model.config.vocab_size)
    return measure(skeleton, names, tokens.ids, tell), tokens


@torch.no_grad()
def measure(
    skeleton: Skeleton,
    names: Mapping[str, str],
    ids: torch.Tensor,
    tell: Callable[[str, int, int], None],
) -> Importance:
    """Mean squared inputs of every linear, and of the head, over token rows [N, L]."""
    found: Importance = {}
    batches = capture_all(skeleton, ids)
    for index in range(len(skeleton.blocks)):
        tell("importance", index, len(skeleton.blocks))
        nodes = skeleton.linears(index)
        # Linears of one edge have one input: the first of them is watched for all.
        watched: dict[str, str] = {}
        for node in nodes:
            watched.setdefault(node.reads, node.path)
        with skeleton.block(index) as module:
            seen = observe(
                module, index, batches, {p: p for p in watched.values()}, frozenset({"moments"})
            )
        for node in nodes:
            moments = seen[watched[node.reads]].result()[1]
            assert moments is not None
            found[names[f"{skeleton.node_name(index, node)}.weight"]] = moments.square.cpu()
    head = skeleton.map.embedding if skeleton.tied else skeleton.map.head
    norm = skeleton.model.get_submodule(skeleton.map.final_norm)
    skeleton.fill(norm, skeleton.map.final_norm)
    squares = [norm(batch.hidden).float().square().flatten(0, -2).mean(0) for batch in batches]
    skeleton.drop(norm)
    found[names[f"{head}.weight"]] = torch.stack(squares).mean(0).cpu()
    return found


def read_imatrix(file: Path) -> Importance:
    """Read an importance matrix in GGUF.

    Raises:
        RarefyError: no such file, or another kind of file.
    """
    if not file.is_file():
        raise RarefyError(f"there is no importance matrix at {file}")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise RarefyError(
            f"{file} is not a GGUF file; write importance matrices with a llama.cpp of 2025 or "
            "later, or give the name of a corpus"
        ) from error
    kind = reader.get_field("general.type")
    if kind is None or kind.contents() != "imatrix":
        raise RarefyError(f"{file} is a GGUF file but not an importance matrix")
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    found = {}
    for name, sums in tensors.items():
        base = name.removesuffix(".in_sum2")
        if base != name:
            count = float(tensors[f"{base}.counts"].reshape(-1)[0])
            found[base] = torch.from_numpy(sums.reshape(-1)) / max(count, 1.0)
    return found


def write_imatrix(file: Path, importance: Importance, tokens: TokenSet) -> None:
    """Write an importance matrix that llama.cpp reads.

    Args:
        file: to be made. importance: by name in GGUF. tokens: what it was measured on.
    """
    rows, length = tokens.ids.shape
    arrays = {}
    for name, mean in importance.items():
        arrays[f"{name}.in_sum2"] = (mean * tokens.tokens).numpy().reshape(1, -1)
        arrays[f"{name}.counts"] = np.full((1, 1), tokens.tokens, np.float32)

    def keys(writer: GGUFWriter) -> None:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [tokens.corpus])
        writer.add_uint32("imatrix.chunk_count", rows)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, array in arrays.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)

    write_gguf(file, "", keys, arrays.values())
