"""The walk: block by block, group by group, each linear run forward once per calibration token.

    inputs = what the first block is called with
    for each block:                               one block is resident
        for each group {q,k,v} -> o -> {gate,up} -> down:
            statistics of the group's true inputs: earlier groups are already compressed
            solve the group, put the result in place
        inputs = outputs of the compressed block
        the block's tensors go to disk, the journal says so

True-sequential calibration is usually done by running a block again for every group. Here every
batch's forward pass is suspended where it enters a group (one greenlet a batch, switched to the
walk by a pre-forward hook), the group is solved, and the passes go on from there with the solved
weights: the same numbers from a single pass.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent, greenlet

from rarefy.engine.skeleton import matrix_of, set_matrix
from rarefy.errors import RarefyError
from rarefy.resources import return_unused_pages
from rarefy.solvers.base import SOLVERS, Problem, output_error
from rarefy.solvers.nearest import Nearest
from rarefy.statistics import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from rarefy.engine.capture import Batch
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format, Grid, Packed
    from rarefy.maps.model_map import Node
    from rarefy.solvers.base import Solver
    from rarefy.statistics import Moments


@dataclass
class NodeResult:
    """What became of one matrix.

    Attributes:
        packed: stored tensors by suffix.
        format: what they are stored in.
        solver: name of the solver.
        error: relative squared output error on the calibration inputs, None without data.
        tokens: calibration tokens that it saw.
        seconds: its share of the solve.
        notes: fallbacks taken.
    """

    packed: Packed
    format: Format
    solver: str
    error: float | None
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class BlockTask:
    """One block to be compressed.

    Attributes:
        name: its path, for messages.
        index: its position.
        module: the loaded block.
        groups: linears that share an input, in order of execution.
        formats: node path -> format; nodes that are absent are left alone.
        solver: solves each group.
        needs: statistics to collect beside the solver's.
        inputs: node path -> how its input is rounded.
        supports: node path -> support that an earlier stage imposed, bool [m, n].
        thrifty: give unused memory back around every solve; it is taken again page by page, which
            small models feel more than they gain.

    Working state:
        results: node path -> what became of it.
        scales: node path -> stored scale of its input's rounding.
    """

    name: str
    index: int
    module: nn.Module
    groups: tuple[tuple[Node, ...], ...]
    formats: dict[str, Format]
    solver: Solver
    needs: frozenset[str] = frozenset()
    inputs: dict[str, Activation] = field(default_factory=dict)
    supports: dict[str, torch.Tensor] = field(default_factory=dict)
    thrifty: bool = False
    results: dict[str, NodeResult] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def chosen(self, group: tuple[Node, ...]) -> list[Node]:
        """The group's nodes that are to be compressed."""
        return [node for node in group if node.path in self.formats]

    @property
    def statistics(self) -> frozenset[str]:
        """What is collected of every group's input."""
        return self.solver.needs | self.needs

    def linear(self, node: Node) -> nn.Module:
        """The module of a node."""
        return self.module.get_submodule(node.path)


def compress_block(task: BlockTask, batches: list[Batch]) -> None:
    """Solve every group of a block in place and move the batches to its output.

    Args:
        task: receives ``results``.
        batches: calibration batches; empty when the solver needs no data.
    """
    groups = [group for group in task.groups if task.chosen(group)]
    if not batches:
        for group in groups:
            _solve_group(task, group, None)
        return
    passes = _Passes(task, batches, groups)
    with passes.hooked(), rounded_inputs(task.module, task.inputs, task.scales):
        passes.run()


def advance(module: nn.Module, index: int, batches: list[Batch]) -> None:
    """Move the batches to the output of a finished block."""
    for batch in batches:
        batch.hidden = batch.run(module, index)


@contextmanager
def rounded_inputs(
    module: nn.Module,
    inputs: Mapping[str, Activation],
    scales: Mapping[str, torch.Tensor],
    *,
    soft: bool = False,
) -> Iterator[None]:
    """Round the inputs of some linears of a block, as the stored model will do.

    Args:
        module: the block.
        inputs: node path -> format.
        scales: node path -> stored scale, of static formats; may be filled on the way.
        soft: round in the way that lets gradients pass.
    """

    def hook(
        path: str,
    ) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        def enter(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rounding = inputs[path].soft if soft else inputs[path].round
            return (rounding(args[0], scales.get(path)), *args[1:])

        return enter

    handles = [module.get_submodule(path).register_forward_pre_hook(hook(path)) for path in inputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Passes:
    """The suspended forward passes of all batches through one block."""

    def __init__(
        self, task: BlockTask, batches: list[Batch], groups: list[tuple[Node, ...]]
    ) -> None:
        self.task = task
        self.batches = batches
        self.groups = groups
        self.solved = 0  # groups before this one are done
        self.statistics: dict[int, Collector] = {}
        self.walk = getcurrent()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [
            self.task.linear(node).register_forward_pre_hook(self._hook(number))
            for number, group in enumerate(self.groups)
            for node in self.task.chosen(group)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> None:
        passes = [greenlet(self._forward) for _ in self.batches]
        waiting = [-1] * len(passes)  # the group at which each pass is suspended
        for number, group in enumerate(self.groups):
            for i, one in enumerate(passes):
                # A pass that routes no token to this group's expert waits further on.
                if waiting[i] < number:
                    waiting[i] = one.switch(self.batches[i]) if waiting[i] < 0 else one.switch()
            _solve_group(self.task, group, self.statistics.pop(number, None))
            self.solved = number + 1
        for i, one in enumerate(passes):
            if waiting[i] < 0:
                one.switch(self.batches[i])
            while not one.dead:
                one.switch()

    def _forward(self, batch: Batch) -> int:
        batch.hidden = batch.run(self.task.module, self.task.index)
        return len(self.groups)

    def _hook(self, number: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # The first member of an unsolved group stops the pass; when it goes on, the group is
            # solved and the other members let it through.
            if number < self.solved:
                return
            x = args[0]
            if number not in self.statistics:
                self.statistics[number] = Collector(self.task.statistics, x.shape[-1], x.device)
            self.statistics[number].add(x)
            self.walk.switch(number)

        return enter


def _solve_group(task: BlockTask, group: tuple[Node, ...], seen: Collector | None) -> None:
    """Solve the matrices that share an input; those of one format are stacked into one problem."""
    name = f"{task.name}.{group[0].path}"
    inputs = _Inputs() if seen is None else _Inputs(*seen.result(), seen.tokens)
    if seen is not None and not seen.finite():
        raise RarefyError(
            f"the input of {name} is NaN or infinite on the calibration text; "
            "check the model with `rarefy evaluate`, or its config, before compressing it"
        )
    if task.thrifty:
        return_unused_pages()
    stacks: dict[tuple[Format, int], list[Node]] = defaultdict(list)
    for number, node in enumerate(task.chosen(group)):
        fmt = task.formats[node.path]
        stacks[fmt, 0 if fmt.rows_independent else number].append(node)
    for (fmt, _), nodes in stacks.items():
        _solve_stack(task, fmt, nodes, inputs)
    if task.thrifty:
        return_unused_pages()


@dataclass(frozen=True)
class _Inputs:
    """What was seen of a group's input."""

    gram: torch.Tensor | None = None
    moments: Moments | None = None
    tokens: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)


def _solve_stack(task: BlockTask, fmt: Format, nodes: list[Node], inputs: _Inputs) -> None:
    start = time.perf_counter()
    problem = _problem(task, nodes, inputs)
    solver: Solver = task.solver
    fallback: tuple[str, ...] = ()
    if task.statistics and not inputs.tokens:
        # Only an expert that no token was routed to can get here.
        solver = Nearest()
        fallback = (f"{problem.name} saw no calibration token; it was rounded to nearest",)
    solution = solver.solve(problem, fmt)
    seconds = (time.perf_counter() - start) / len(nodes)
    first = 0
    for node in nodes:
        linear = task.linear(node)
        rows = slice(first, first + matrix_of(linear).shape[0])
        first = rows.stop
        W, Q, H = problem.weight[rows], solution.weight[rows], inputs.gram
        grid: Grid = solution.grid
        if len(nodes) > 1:
            grid = grid.rows(rows.start, rows.stop)
        task.results[node.path] = NodeResult(
            packed=grid.encode(Q) | _input_scale(task, node, inputs),
            format=grid.form,
            solver=SOLVERS.name_of(solver),
            error=output_error(W, Q, H) if H is not None else None,
            tokens=inputs.tokens,
            seconds=seconds,
            notes=(*fallback, *solution.notes),
        )
        set_matrix(linear, Q)


def _problem(task: BlockTask, nodes: list[Node], inputs: _Inputs) -> Problem:
    """The matrices of some nodes, stacked by rows, with what was seen of their input."""
    supports = [task.supports.get(node.path) for node in nodes]
    given = [support for support in supports if support is not None]
    return Problem(
        name=f"{task.name}.({', '.join(node.path for node in nodes)})",
        weight=torch.cat([matrix_of(task.linear(node)) for node in nodes]),
        gram=inputs.gram,
        moments=inputs.moments,
        support=torch.cat(given) if given else None,
        shared=inputs.shared,
    )


def _input_scale(task: BlockTask, node: Node, inputs: _Inputs) -> Packed:
    """The stored scale of a statically rounded input; from now on the passes use it."""
    activation = task.inputs.get(node.path)
    if activation is None or not activation.static:
        return {}
    assert inputs.moments is not None
    task.scales[node.path] = activation.scale(inputs.moments.peak)
    return {"input_scale": task.scales[node.path].cpu()}
