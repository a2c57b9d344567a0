"""The verb ``plan``: what a recipe would do to a model, in seconds and without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from rarefy.allocate.base import WidthAllocator
from rarefy.checkpoint.load import default_device
from rarefy.checkpoint.reader import Checkpoint
from rarefy.checkpoint.resolve import resolve
from rarefy.engine.capture import complete_map
from rarefy.engine.close import all_formats
from rarefy.engine.compress import Calibration
from rarefy.engine.operate import sizes_after
from rarefy.engine.resize import resized_config
from rarefy.engine.select import select
from rarefy.engine.skeleton import Skeleton
from rarefy.export.containers import obstacle
from rarefy.formats.base import BYTES, stored_bytes
from rarefy.recipe import load_recipe
from rarefy.tuners.base import ModelTuner

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.formats.base import Format
    from rarefy.stages import Recipe

_KEPT = 150_000_000  # bytes, seen on models of 0.1 to 1 GB
_CAPTURE_TOKENS = 1024  # tokens of one batch; see engine.capture.capture_all


@dataclass(frozen=True)
class Line:
    """One tensor of the result.

    Attributes:
        name: module path of a compressed matrix, parameter name of anything else.
        kind: last part of the module path, ``down_proj``.
        format: ``int4 g64``, or the stored dtype of what stays dense.
        weights: number of elements. bytes: exact stored bytes, scales and zero points included.
        compressed: whether the recipe names a format for it.
        linear: whether it is a matrix of a decoder block.
        why: why a matrix is left alone; empty otherwise.
    """

    name: str
    kind: str
    format: str
    weights: int
    bytes: int
    compressed: bool
    linear: bool
    why: str = ""

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / max(1, self.weights)


@dataclass(frozen=True)
class Memory:
    """Predicted peak resident memory, in bytes; the phases follow one another.

    Attributes:
        baseline: this process with its libraries and the empty model, measured.
        capture: embeddings as stored and in fp32, the calibration activations, one batch's masks;
            or four copies of the blocks in fp32 where gradients are read.
        blocks: one block in fp32 and its packed bytes, the activations of all suspended passes,
            one batch's temporary ones, and the buffers of the widest solve: ``n^2`` in fp32 for
            the Gram and for its factor, in fp64 for the factorization, and three copies of the
            widest group of matrices.
        outside: everything outside the blocks.
        training: where the whole model is trained, student and dense model in fp32, gradients and
            the optimizer's state of the numbers that move, and three copies of the logits.
        kept: freed pieces that the C library keeps, tokenizer and text; a rule of thumb.
    """

    baseline: int
    capture: int
    blocks: int
    outside: int
    training: int
    kept: int

    @property
    def peak(self) -> int:
        """Baseline, what stays behind, and the largest phase."""
        phases = (self.capture, self.blocks, self.outside, self.training)
        return self.baseline + self.kept + max(phases)


@dataclass(frozen=True)
class Plan:
    """What would be written.

    Attributes:
        model, recipe: as asked for.
        lines: every stored tensor, in the model's order.
        container: "compressed-tensors", "rarefy", or "plain" for a dense result.
        reason: why it is rarefy's; empty otherwise.
        notes: remarks, one sentence each.
        parameters: of the model, tied ones once.
        memory: predicted.
    """

    model: str
    recipe: str
    lines: tuple[Line, ...]
    container: str
    reason: str
    notes: tuple[str, ...]
    parameters: int
    memory: Memory

    @property
    def bytes(self) -> int:
        """Tensor bytes of the result; the files add only their headers."""
        return sum(line.bytes for line in self.lines)

    @property
    def bits(self) -> float:
        """Bits per weight of the whole model."""
        return 8 * self.bytes / self.parameters

    @property
    def bits_linear(self) -> float:
        """Bits per weight of the linears in the blocks, those left alone included."""
        linear = [line for line in self.lines if line.linear]
        return 8 * sum(e.bytes for e in linear) / max(1, sum(e.weights for e in linear))

    @property
    def ratio(self) -> float:
        """Two bytes a parameter, over the bytes of the result."""
        return 2 * self.parameters / self.bytes

    @property
    def coverage(self) -> float:
        """Share of the parameters that is compressed."""
        return sum(line.weights for line in self.lines if line.compressed) / self.parameters


def plan(
    model: str | Path,
    recipe: str | Path,
    *,
    calibration: Calibration = Calibration(),  # noqa: B008  (frozen)
) -> Plan:
    """Say what ``compress`` would write, and how much memory it would need.

    Weights are not read, except one block of a model whose architecture has no written map.

    Args:
        model: folder, ``.gguf`` file, hub id, or "demo".
        recipe: name of a preset, or a YAML file.
        calibration: the number of tokens decides the memory.

    Raises:
        RarefyError: what ``compress`` would refuse before it computes anything.
    """
    wanted = load_recipe(recipe)
    skeleton = Skeleton(Checkpoint(resolve(model)), default_device())
    complete_map(skeleton)
    kept: dict[str, str] = {}
    notes: dict[str, None] = {}
    before = set(skeleton.earlier)
    inputs = dict(skeleton.state.inputs)
    for stage in wanted.stages:
        if stage.role == "surgery":
            smaller = resized_config(skeleton, sizes_after(skeleton, stage))
            skeleton = Skeleton(skeleton.checkpoint, skeleton.device, config=smaller)
        if not stage.schemes or stage.role == "transform":
            continue
        chosen = select(skeleton, stage)
        notes |= dict.fromkeys(chosen.notes)
        if isinstance(stage.allocator, WidthAllocator):
            notes[
                "every matrix's bits are chosen when weights are read: the bytes here are the most "
                "that will be taken, formats and container may be others"
            ] = None
        kept |= chosen.kept
        # The next stage must find what this one would have left behind.
        skeleton.earlier = all_formats(skeleton, chosen)
        inputs |= chosen.inputs
        skeleton.open_factors()
    formats = {name: fmt for name, fmt in skeleton.earlier.items() if name not in before}
    lines = tuple(_lines(skeleton, formats, kept))
    # Which block loses how much is known only when the units have been scored.
    ranked = any(getattr(stage.method, "ranking", "block") == "model" for stage in wanted.stages)
    uneven = ranked or bool(skeleton.widths)
    reason = obstacle(skeleton.stored_matrices(skeleton.earlier, inputs), uneven) or ""
    return Plan(
        model=str(model),
        recipe=wanted.name,
        lines=lines,
        container="rarefy" if reason else "compressed-tensors" if skeleton.earlier else "plain",
        reason=reason,
        notes=tuple(notes),
        parameters=skeleton.parameters,
        memory=_memory(skeleton, wanted, calibration, lines),
    )


def _lines(skeleton: Skeleton, formats: dict[str, Format], kept: dict[str, str]) -> list[Line]:
    """Every tensor that would be stored."""
    inside = f"{skeleton.map.blocks}."
    lines = []
    for name, tensor in skeleton.model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        matrix = leaf == "weight"
        kind = module.rpartition(".")[2]
        linear = name.startswith(inside) and tensor.ndim > 1
        if matrix and module in formats:
            fmt, (rows, columns) = formats[module], skeleton.shape(module)
            size = stored_bytes(fmt, rows, columns)
            lines.append(Line(module, kind, fmt.label(), rows * columns, size, True, linear))
        elif not (skeleton.tied and module == skeleton.map.head):
            label, size = _stored(skeleton, name, tensor.numel())
            why = kept.get(module, "") if matrix else ""
            lines.append(Line(name, kind, label, tensor.numel(), size, False, linear, why))
    return lines


def _stored(skeleton: Skeleton, name: str, elements: int) -> tuple[str, int]:
    """Format label and bytes of a tensor that passes through as it is."""
    stored = skeleton.locate(name)
    if stored is not None:
        dtype = skeleton.checkpoint.entries[stored].dtype
        return dtype, elements * BYTES[dtype]
    module = name.removesuffix(".weight")
    packed = skeleton.earlier.get(module)
    if packed is not None:
        rows, columns = skeleton.shape(module)
        return packed.label(), stored_bytes(packed, rows, columns)
    dtype = skeleton.stored_dtype(module)
    return dtype, elements * BYTES[dtype]


def _memory(
    skeleton: Skeleton, recipe: Recipe, calibration: Calibration, lines: tuple[Line, ...]
) -> Memory:
    """Predict the peak; the formula is in :class:`Memory`."""
    prefix = f"{skeleton.map.blocks}."
    rest = [line for line in lines if not line.name.startswith(prefix)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    written = sum(e.bytes for e in lines if e.name.startswith(f"{prefix}{largest}."))
    blocks = 4 * sizes[largest] + written
    capture = 0
    if recipe.needs_data:
        names = [f"{prefix}{largest}.{node.path}" for node in skeleton.map.linears]
        shapes = {name: skeleton.shape(name) for name in names}
        tokens = calibration.sequences * calibration.length
        hidden = skeleton.model.config.get_text_config().hidden_size
        widest = max(columns for _, columns in shapes.values())
        grouped = max(
            sum(shapes[f"{prefix}{largest}.{node.path}"][0] for node in group)
            * shapes[f"{prefix}{largest}.{group[0].path}"][1]
            for group in skeleton.map.shared_inputs
        )
        # A pass that waits before the down projection holds the block's input, the residual
        # stream, the normed input of the MLP, and the inner activations.
        blocks += 4 * tokens * (3 * hidden + widest)
        # One batch's share of attention and MLP, which is freed and taken again.
        blocks += 4 * min(tokens, _CAPTURE_TOKENS) * (4 * hidden + 3 * widest)
        blocks += 16 * widest**2 + 3 * 4 * grouped
        capture = 6 * sum(e.weights for e in rest if e.weights > hidden)
        capture += 4 * hidden * (tokens + min(tokens, _CAPTURE_TOKENS))
    measured = [stage.allocator.needs for stage in recipe.stages if stage.allocator is not None]
    gradients = any("gradients" in stage.needs for stage in recipe.stages)
    if gradients or any("fisher" in needs for needs in measured):
        capture = max(capture, 4 * 4 * sum(sizes))
    outside = sum(e.bytes for e in rest)
    training = 0
    if any(isinstance(stage.method, ModelTuner) for stage in recipe.stages):
        vocabulary = skeleton.model.config.get_text_config().vocab_size
        moving = max(
            _moving(skeleton, stage.method)
            for stage in recipe.stages
            if isinstance(stage.method, ModelTuner)
        )
        training = 4 * (2 * skeleton.parameters + 3 * moving + 3 * _CAPTURE_TOKENS * vocabulary)
    kept = min(capture + blocks, _KEPT)
    now = psutil.Process().memory_info().rss
    return Memory(now, capture, blocks, outside, training, kept)


def _moving(skeleton: Skeleton, tuner: ModelTuner) -> int:
    """How many numbers of the model a tuner moves at most."""
    linears = {
        skeleton.node_name(block, node)
        for block in range(len(skeleton.blocks))
        for node in skeleton.linears(block)
    }
    norms = skeleton.norms
    found = sum(tuner.moving(skeleton.shape(n), skeleton.earlier.get(n)) for n in linears)
    for name, parameter in skeleton.model.named_parameters():
        if name.rpartition(".")[0] not in linears and tuner.moves(name, name in norms):
            found += parameter.numel()
    return found
