"""GGUF: one file that llama.cpp and its relatives open.

Matrices that lie on a grid that a block type can express keep their codes (``regrid.py``); others
are encoded by importance-weighted search (``rules/blocks.py``, ``kquants.py``). The ``gguf``
package writes the container and knows the names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.engine.skeleton import Skeleton
from rarefy.errors import RarefyError
from rarefy.export import kquants
from rarefy.export.atomic import demand_new, write_gguf
from rarefy.export.blocks import small
from rarefy.export.gguf_model import gguf_model
from rarefy.export.gguf_words import read_words
from rarefy.export.imatrix import importance_from, write_imatrix
from rarefy.export.mixes import PLAIN, Mix, fitting, mix_named, type_for
from rarefy.export.regrid import exact_blocks, exact_type
from rarefy.formats.ggml import Ggml
from rarefy.formats.packing import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter

    from rarefy.export.blocks import Octets
    from rarefy.export.gguf_model import GgufModel
    from rarefy.export.gguf_words import Words
    from rarefy.export.imatrix import Importance
    from rarefy.export.order import Order

AS_STORED = "auto"
_CLOSEST = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Slot:
    """One tensor of the file.

    Attributes:
        parameter: module-side name. name: in GGUF. type: ggml's, in small letters.
        shape: of the parameter. keeps: its stored codes are copied.
    """

    parameter: str
    name: str
    type: str
    shape: tuple[int, ...]
    keeps: bool = False

    @property
    def kind(self) -> GGMLQuantizationType:
        """The gguf package's constant."""
        return GGMLQuantizationType[self.type.upper()]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the bytes: rows, and bytes of a row."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block * size)


def export_gguf(order: Order) -> None:
    """Write a dense or compressed model as a GGUF file.

    Raises:
        RarefyError: GGUF cannot express the model, or the order makes no sense.
    """
    if order.out.suffix != ".gguf":
        raise RarefyError(f"{order.out} is to be a file; give --out a name that ends in .gguf")
    demand_new(order.out)
    name, mix = mix_named(order.type) if order.type not in (None, AS_STORED) else (AS_STORED, None)
    head = mix_named(order.embedding)[1].base if order.embedding else None
    skeleton = Skeleton(Checkpoint(resolve(order.source)), torch.device("cpu"), factored=False)
    model = gguf_model(skeleton)
    words = read_words(skeleton.checkpoint.path, model.config.vocab_size)
    slots = _slots(skeleton, model, mix, head)
    importance: Importance = {}
    if order.imatrix:
        importance, tokens = importance_from(order.imatrix, skeleton, model.names, order.tell)
        _check_importance(slots, importance, order.imatrix)
        if tokens is not None:
            file = order.out.with_suffix(".imatrix.gguf")
            write_imatrix(file, importance, tokens)
            order.say(f"wrote the importance matrix of {tokens.corpus} to {file}")
    work = _Work(skeleton, model, words, slots, importance, order)
    write_gguf(order.out, model.architecture, lambda w: work.keys(w, name), work.tensors())
    work.report()


def _slots(skeleton: Skeleton, model: GgufModel, mix: Mix | None, head: str | None) -> list[Slot]:
    """What becomes of every parameter."""
    shapes = {name: tuple(t.shape) for name, t in skeleton.model.state_dict().items()}
    slots = []
    for parameter, name in model.names.items():
        shape = shapes[parameter]
        if len(shape) == 1:
            slots.append(Slot(parameter, name, "f32", shape))
            continue
        module = parameter.removesuffix(".weight")
        fmt = skeleton.earlier.get(module)
        same = None if fmt is None else exact_type(fmt, shape[-1], skeleton.packed(module))
        outside = not name.startswith("blk.")
        wanted = same or "f16"
        if head is not None and outside:
            wanted = head
        elif mix is not None:
            wanted = type_for(mix, name, model.blocks, head=name == model.head)
        fitted = fitting(wanted, shape[-1])
        slots.append(Slot(parameter, name, fitted, shape, keeps=fitted == same))
    return slots


def _check_importance(slots: list[Slot], importance: Importance, ref: str) -> None:
    """Every matrix of a block needs its columns' importance; head and embedding may lack it."""
    for slot in slots:
        found = importance.get(slot.name)
        if slot.type in PLAIN or slot.keeps:
            continue
        if found is None and slot.name.startswith("blk."):
            raise RarefyError(f"{ref} says nothing of {slot.name}; it is of another model")
        if found is not None and len(found) != slot.shape[-1]:
            raise RarefyError(
                f"{ref} has {len(found)} columns for {slot.name}, which has {slot.shape[-1]}; "
                "it is of another model"
            )


class _Work:
    """The content of the file, made tensor by tensor."""

    def __init__(
        self,
        skeleton: Skeleton,
        model: GgufModel,
        words: Words,
        slots: list[Slot],
        importance: Importance,
        order: Order,
    ) -> None:
        self.skeleton, self.model, self.words = skeleton, model, words
        self.slots, self.importance, self.order = slots, importance, order
        self.moved = 0.0

    def keys(self, writer: GGUFWriter, mix: str) -> None:
        """Add keys and tensor infos."""
        path = self.skeleton.checkpoint.path
        writer.add_type("model")
        writer.add_name(self.skeleton.checkpoint.config.get("_model_name_or_path") or path.name)
        weights = Counter[str]()
        for slot in self.slots:
            weights[slot.type] += int(np.prod(slot.shape))
        writer.add_file_type(_file_type(mix, weights.most_common(1)[0][0]))
        writer.add_quantization_version(2)
        self.model.write(writer)
        self.words.write(writer)
        rope = self.model.rope_factors()
        if rope is not None:
            writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
        for slot in self.slots:
            shape = slot.stored_shape
            size = int(np.prod(shape))
            writer.add_tensor_info(slot.name, shape, np.dtype(np.uint8), size, slot.kind)

    def tensors(self) -> Iterator[np.ndarray]:
        """Every tensor's bytes, in the order of the infos."""
        rope = self.model.rope_factors()
        if rope is not None:
            yield rope
        blocks, before = self.model.blocks, -1
        for slot in self.slots:
            index = int(slot.name.split(".")[1]) if slot.name.startswith("blk.") else before
            if index != before:
                self.order.tell("block", index, blocks)
                before = index
            octets = self._octets(slot)
            rows = self.model.row_order(slot.name)
            yield octets if rows is None else np.ascontiguousarray(octets[rows])
        self.order.tell("block", blocks, blocks)

    def _octets(self, slot: Slot) -> Octets:
        if not slot.keeps:
            weight = self.skeleton.read(slot.parameter).float()
            return encode(slot.type, weight, self.importance.get(slot.name))
        module = slot.parameter.removesuffix(".weight")
        octets, moved = exact_blocks(self.skeleton.earlier[module], self.skeleton.packed(module))
        self.moved = max(self.moved, moved)
        return octets

    def report(self) -> None:
        """Say what was kept and what was rounded."""
        kept = sum(slot.keeps for slot in self.slots)
        if kept:
            exact = f"; float16 moved values by up to {self.moved:.1e} of a step"
            self.order.say(
                f"{kept} matrices keep their codes" + (exact if self.moved else ", exactly")
            )
        made = Counter(slot.type for slot in self.slots if not slot.keeps and len(slot.shape) > 1)
        if made:
            what = ", ".join(f"{count} {kind.upper()}" for kind, count in sorted(made.items()))
            self.order.say(f"encoded: {what}")


def _file_type(mix: str, most: str) -> int:
    """``general.file_type``: of the mix, or of most of the weights."""
    for name in (mix, most):
        for full in (f"ALL_{name}".upper(), f"MOSTLY_{name}".upper()):
            if full in LlamaFileType.__members__:
                return int(LlamaFileType[full])
    return int(LlamaFileType.GUESSED)


def encode(kind: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Octets:
    """A tensor as ggml stores it.

    Args:
        kind: ggml's type, in small letters.
        weight: float32 [m, n], or [n] for a plain type.
        importance: weight of each column's squared error, [n], or None.

    Returns:
        uint8, the last axis in bytes.

    Raises:
        RarefyError: a weight is beyond the type's range.
    """
    if kind in _CLOSEST:
        numbers = weight.to(_CLOSEST[kind]).contiguous()
        if not bool(torch.isfinite(numbers).all()):
            raise RarefyError(
                f"weights up to {float(weight.abs().max()):.3g} are beyond {kind}; give --type BF16"
            )
        return numbers.view(torch.uint8).numpy()
    if kind in kquants.TYPES:
        return kquants.encode(kind, weight, importance)
    grid = Ggml(kind).fit(weight, importance)
    packed = grid.encode(weight)
    bits = grid.form.block.bits
    codes = unpack(packed["weight_packed"], bits, weight.shape[1])
    return small(codes, packed["weight_scale"], packed.get("weight_minimum"), bits)
