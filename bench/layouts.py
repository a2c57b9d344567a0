"""GPTQ's and AWQ's layouts, read by their published rules and by nothing of rarefy's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.skeleton import Skeleton

if TYPE_CHECKING:
    from pathlib import Path

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def decoded_alike(packed: Path, folder: Path, form: str) -> tuple[int, int]:
    """How many matrices of an exported folder are ours in float16, bit for bit, and of how many."""
    skeleton = Skeleton(Checkpoint(packed), torch.device("cpu"), factored=False)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    equal = 0
    for name, fmt in skeleton.earlier.items():
        mine = fmt.decode(skeleton.packed(name))
        stored = skeleton.stored_name(name)
        parts = {key: tensors[f"{stored}.{key}"].numpy() for key in ("qweight", "qzeros", "scales")}
        read = gptq if form == "gptq" else awq
        theirs = read(parts, config["bits"], config["group_size"])
        equal += bool(np.array_equal(theirs, mine.half().numpy()))
    return equal, len(skeleton.earlier)


def gptq(parts: dict[str, np.ndarray], bits: int, group: int) -> np.ndarray:
    """W [out, in], float16, of the first layout, which stores every zero point less one."""
    codes = _stream(parts["qweight"].T, bits).T
    zeros = _stream(parts["qzeros"], bits) + 1
    return _product(codes, zeros, parts["scales"], group)


def awq(parts: dict[str, np.ndarray], bits: int, group: int) -> np.ndarray:
    """W [out, in], float16, of the "gemm" layout."""
    codes, zeros = (_interleaved(parts[key], bits) for key in ("qweight", "qzeros"))
    return _product(codes, zeros, parts["scales"], group)


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    octets = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little").reshape(*words.shape[:-1], -1, bits)
    return stream @ (1 << np.arange(bits))


def _interleaved(words: np.ndarray, bits: int) -> np.ndarray:
    found = np.zeros((*words.shape, len(_AWQ)), dtype=np.int64)
    for place, column in enumerate(_AWQ):
        found[..., column] = words.view(np.uint32) >> np.uint32(bits * place) & 15
    return found.reshape(words.shape[0], -1)


def _product(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    index = np.arange(len(codes)) // (len(codes) if group < 0 else group)
    weight = scales[index] * (codes - zeros[index]).astype(np.float16)
    return np.ascontiguousarray(weight.T)
