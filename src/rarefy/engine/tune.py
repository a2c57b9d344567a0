"""A block tuner's stage: block by block, numbers are moved until the block does what it did dense.

    dense  = what the dense blocks hand on
    prefix = what the compressed blocks hand on
    for each block:
        target = output of the dense block
        fit the block's numbers, so that block(prefix) comes close to target
        write the block; prefix = its output

The block's parameters are computed once a step from the numbers that move. They collect the
gradients of all micro-batches, which then go back to the numbers in one piece.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from rarefy.checkpoint.reader import DTYPES
from rarefy.engine.capture import Batch, capture_all
from rarefy.engine.fit import fit
from rarefy.engine.observe import observe
from rarefy.engine.skeleton import Skeleton, is_transposed, matrix_of, set_matrix
from rarefy.engine.stage import entry_of, inputs_of, run_stage, untouched
from rarefy.engine.walk import NodeResult, advance, rounded_inputs
from rarefy.errors import RarefyError
from rarefy.maps.check import columns_of, rows_of
from rarefy.maps.model_map import dims_of
from rarefy.recipe import format_from
from rarefy.resources import return_unused_pages
from rarefy.tuners.base import TUNERS, BlockTuner, BlockView, FoldableEdge, Start

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from rarefy.engine.select import Selection
    from rarefy.engine.stage import StageRun
    from rarefy.formats.activation import Activation
    from rarefy.statistics import Moments
    from rarefy.tuners.base import BlockTuning, Tuned

_TOKENS = 1024  # of a micro-batch; more of them leave the cache


def run_block_tuner(run: StageRun, manifest: dict[str, Any]) -> None:
    """Tune every block, then close the new checkpoint; see :func:`rarefy.engine.stage.run_stage`.

    Raises:
        RarefyError: too few rows, static scales of inputs, or a dense model of other depth.
    """
    run_stage(run, manifest, _walk)


@dataclass
class _Work:
    """What the blocks of a run have in common.

    Attributes:
        prefix: calibration rows where the compressed model has brought them.
        dense: the same where the dense model has.
        base: the dense model, or None if the source is dense.
    """

    run: StageRun
    skeleton: Skeleton
    chosen: Selection
    prefix: list[Batch]
    dense: list[Batch]
    base: Skeleton | None

    @property
    def tuner(self) -> BlockTuner:
        assert isinstance(self.run.stage.method, BlockTuner)
        return self.run.stage.method


def _walk(run: StageRun, skeleton: Skeleton, chosen: Selection) -> dict[str, float]:
    """Tune the blocks that the journal lacks; return seconds by phase."""
    start = time.perf_counter()
    count = len(skeleton.blocks)
    done = [run.writer.notes(f"{i:05d}") for i in range(count) if run.writer.has(f"{i:05d}")]
    with torch.no_grad():
        work = _prepare(run, skeleton, chosen)
    captured = time.perf_counter() - start
    for index in range(count):
        _block(work, index)
        run.watcher.step(index + 1, count)
        return_unused_pages()
    walked = time.perf_counter() - start - captured
    earlier = sum(float(note["seconds"]) for note in done)
    return {"earlier": earlier, "capture": captured, "blocks": walked}


def _prepare(run: StageRun, skeleton: Skeleton, chosen: Selection) -> _Work:
    """Bring the calibration rows to the first block, of the dense model too."""
    assert run.tokens is not None
    assert isinstance(run.stage.method, BlockTuner)
    rows, length = run.tokens.ids.shape
    wanted = run.stage.method.loop.rows
    if rows < wanted:
        raise RarefyError(
            f"{run.stage.name} reads {wanted} rows a step, and there are {rows}; "
            "calibrate on more, or lower its rows"
        )
    if any(activation.static for activation in chosen.inputs.values()):
        raise RarefyError(
            f"{run.stage.name} trains with inputs as they are rounded, and a static scale is known "
            "only afterwards; give the schemes' inputs dynamic: true"
        )
    most = max(1, _TOKENS // length)
    size = max(d for d in range(1, wanted + 1) if d <= most and wanted % d == 0) * length
    prefix = capture_all(skeleton, run.tokens.ids, size)
    if run.base is None:
        return _Work(
            run, skeleton, chosen, prefix, [Batch(b.hidden, b.calls) for b in prefix], None
        )
    base = Skeleton(run.base, run.device)
    if len(base.blocks) != len(skeleton.blocks):
        raise RarefyError(
            f"{run.source.path} has {len(skeleton.blocks)} blocks and the dense model "
            f"{len(base.blocks)}, so that there is none to match for some; "
            "use a model tuner after blocks are removed"
        )
    return _Work(run, skeleton, chosen, prefix, capture_all(base, run.tokens.ids, size), base)


def _block(work: _Work, index: int) -> None:
    """Tune one block, or restore it, and move both streams to its output."""
    run, tuner, skeleton = work.run, work.tuner, work.skeleton
    start = time.perf_counter()
    part = f"{index:05d}"
    with skeleton.block(index) as module:
        targets = _targets(work, index, module)
        rounding = inputs_of(skeleton, work.chosen, index)
        scales = _input_scales(skeleton, index, rounding, run.device)
        finished = run.writer.has(part)
        with rounded_inputs(module, rounding, scales, soft=True):
            if finished:
                _restore(run, skeleton, module, index)
            else:
                tuning = tuner.begin(_view(work, index, module))
                losses = _fit(work, (index, module), tuning, targets)
                tuned = tuning.finish()
                tensors, nodes = _settle(work, (index, module), tuned)
            with torch.no_grad():
                advance(module, index, work.prefix)
        if not finished:
            pairs = zip(work.prefix, targets, strict=True)
            left = sum(float(tuner.loss(batch.hidden, target)) for batch, target in pairs)
            facts = {"losses": losses, "left": left / len(targets)} | tuned.facts
            seconds = time.perf_counter() - start
            run.writer.add(part, tensors, {"nodes": nodes, "seconds": seconds, "facts": facts})
    if tuner.stream == "dense":
        for batch, target in zip(work.dense, targets, strict=True):
            batch.hidden = target


@torch.no_grad()
def _targets(work: _Work, index: int, module: nn.Module) -> list[torch.Tensor]:
    """Output of the dense block for every batch, of the dense stream or of the prefix."""
    dense = work.tuner.stream == "dense"
    fed = [
        Batch(source.hidden, own.calls)
        for source, own in zip(work.dense if dense else work.prefix, work.dense, strict=True)
    ]
    if work.base is None:
        return [batch.run(module, index) for batch in fed]
    with work.base.block(index) as block:
        return [batch.run(block, index) for batch in fed]


def _view(work: _Work, index: int, module: nn.Module) -> BlockView:
    """What the tuner is shown of a block."""
    skeleton, formats = work.skeleton, work.chosen.blocks[index]
    prefix = f"{skeleton.map.blocks}.{index}"
    moments = _moments(work, index, module, list(formats))
    matrices = {}
    for path, fmt in formats.items():
        weight = matrix_of(module.get_submodule(path))
        support = skeleton.support(f"{prefix}.{path}")
        support = None if support is None else support.to(weight.device)
        stored = None
        if f"{prefix}.{path}" in skeleton.earlier and not work.run.stage.schemes:
            stored = fmt.stored_grid(skeleton.packed(f"{prefix}.{path}"))
        grid = stored or fmt.fit(weight, support=support)
        matrices[path] = Start(weight, grid, support, moments.get(path))
    taken = {f"{path}.weight" for path in matrices}
    flipped = _flipped(module)
    others = {
        name: p.data.T if name in flipped else p.data
        for name, p in module.named_parameters()
        if name not in taken
    }
    norms = tuple(
        f"{node.path}.weight" for node in skeleton.nodes(index).nodes if node.kind == "norm"
    )
    packed = {n for n in others if f"{prefix}.{n}".removesuffix(".weight") in skeleton.earlier}
    edges = tuple(
        edge
        for edge in _edges(skeleton, module)
        if packed.isdisjoint(edge.writers) and packed.isdisjoint(edge.readers)
    )
    return BlockView(prefix, index, len(skeleton.blocks), matrices, others, norms, edges)


def _flipped(module: nn.Module) -> set[str]:
    """Paths of weights that the module stores as [in, out]."""
    return {f"{name}.weight" for name, owner in module.named_modules() if is_transposed(owner)}


def _moments(
    work: _Work, index: int, module: nn.Module, paths: list[str]
) -> dict[str, Moments | None]:
    """Moments of the linears' inputs, if the tuner wants them."""
    if "moments" not in work.tuner.needs or not paths:
        return {}
    copies = [Batch(batch.hidden, batch.calls) for batch in work.prefix]
    with torch.no_grad():
        seen = observe(module, index, copies, {p: p for p in paths}, frozenset({"moments"}))
    return {path: collector.result()[1] for path, collector in seen.items()}


def _edges(skeleton: Skeleton, module: nn.Module) -> tuple[FoldableEdge, ...]:
    """The foldable edges of a block, by the parameters on both sides."""
    table, found = skeleton.map, []
    if not table.proved or skeleton.widths:
        return ()
    dims = dims_of(skeleton.model.config)
    for edge in table.edges:
        if not edge.foldable or edge.part_of:
            continue
        writers, offsets = {}, {}
        for node in table.writers(edge.name):
            rows = rows_of(node, edge, table, dims)
            owner = module.get_submodule(node.path)
            for leaf in ("weight", "bias"):
                if getattr(owner, leaf, None) is not None:
                    writers[f"{node.path}.{leaf}"] = rows
            if node.kind == "norm" and node.offset:
                offsets[f"{node.path}.weight"] = float(node.offset)
        columns = columns_of(edge, dims)
        readers = {f"{node.path}.weight": columns for node in table.readers(edge.name)}
        width = dims.width(edge.width)
        found.append(FoldableEdge(edge.name, writers, readers, width, offsets))
    return tuple(found)


def _fit(
    work: _Work, place: tuple[int, nn.Module], tuning: BlockTuning, targets: list[torch.Tensor]
) -> list[float]:
    """Move the numbers of one block; return the loss of every step."""
    index, module = place
    loop, tuner = work.tuner.loop, work.tuner
    groups = [group for group in tuning.groups if group["params"]]
    if not loop.steps or not groups:
        return []
    each = max(1, loop.rows // work.prefix[0].hidden.shape[0])
    order = _order(len(targets), each * loop.steps, seed=index)
    flipped = _flipped(module)

    def gradients(step: int) -> float:
        values = {name: v for name, v in tuning.parameters().items() if v.requires_grad}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        shown = {name: leaf.T if name in flipped else leaf for name, leaf in leaves.items()}
        total = 0.0
        for at in order[step * each : (step + 1) * each]:
            args, kwargs = work.prefix[at].calls[index]
            out = functional_call(module, shown, (work.prefix[at].hidden, *args), kwargs)
            output = out[0] if isinstance(out, tuple) else out
            loss = tuner.loss(output, targets[at]) / each
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.autograd.backward(list(values.values()), [leaf.grad for leaf in leaves.values()])
        return total

    return fit(loop, tuner.optimizer(groups), gradients).losses


def _order(count: int, length: int, seed: int) -> list[int]:
    """Batch numbers in a random order that visits each as often as any other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-length // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)]).tolist()


def _settle(
    work: _Work, place: tuple[int, nn.Module], tuned: Tuned
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Put the result into the block; return its stored tensors and the manifest's entries."""
    index, module = place
    skeleton = work.skeleton
    prefix = f"{skeleton.map.blocks}.{index}"
    tokens = sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in work.prefix)
    tensors = untouched(skeleton, f"{prefix}.", {f"{prefix}.{path}" for path in tuned.matrices})
    nodes = []
    for path, (weight, grid) in tuned.matrices.items():
        name = f"{prefix}.{path}"
        result = NodeResult(
            grid.encode(weight), grid.form, TUNERS.name_of(work.tuner), None, tokens, 0.0
        )
        stored = skeleton.stored_name(name)
        tensors |= {f"{stored}.{suffix}": t.cpu() for suffix, t in result.packed.items()}
        nodes.append(entry_of(skeleton, name, result))
        set_matrix(module.get_submodule(path), weight)
    flipped = _flipped(module)
    for name, value in tuned.others.items():
        owner, _, leaf = name.rpartition(".")
        kept = value.T if name in flipped else value
        kept = kept.to(DTYPES[skeleton.stored_dtype(f"{prefix}.{owner}")])
        module.get_submodule(owner).get_parameter(leaf).data.copy_(kept)
        tensors[skeleton.stored_name(f"{prefix}.{name}")] = kept.contiguous().cpu()
    return tensors, nodes


def _restore(run: StageRun, skeleton: Skeleton, module: nn.Module, index: int) -> None:
    """Fill a block with what an earlier run made of it."""
    part, prefix = f"{index:05d}", f"{skeleton.map.blocks}.{index}"
    stored = run.writer.read(part)
    for name, parameter in module.named_parameters():
        value = stored.get(skeleton.stored_name(f"{prefix}.{name}"))
        if value is not None:
            parameter.data.copy_(value)
    for node in run.writer.notes(part)["nodes"]:
        fmt, name = format_from(node["stored"]), node["name"]
        own = skeleton.stored_name(name)
        packed = {s: stored[f"{own}.{s}"] for s in fmt.layout(*skeleton.shape(name))}
        path = name.removeprefix(f"{prefix}.")
        set_matrix(module.get_submodule(path), fmt.decode(packed).to(run.device))


def _input_scales(
    skeleton: Skeleton, index: int, rounding: Mapping[str, Activation], device: torch.device
) -> dict[str, torch.Tensor]:
    """Stored scales of inputs that an earlier stage rounds statically."""
    prefix = f"{skeleton.map.blocks}.{index}"
    return {
        path: skeleton.packed(f"{prefix}.{path}")["input_scale"].to(device)
        for path, activation in rounding.items()
        if activation.static
    }
