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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from greenlet import getcurrent, greenlet

from rarefy.engine.gram import Gram
from rarefy.engine.skeleton import matrix_of, set_matrix
from rarefy.errors import RarefyError
from rarefy.resources import return_unused_pages
from rarefy.solvers.base import Problem, output_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from rarefy.engine.capture import Batch
    from rarefy.formats.base import Format, Packed
    from rarefy.maps.model_map import Node
    from rarefy.solvers.base import Solver


@dataclass
class NodeResult:
    """What became of one matrix.

    Attributes:
        packed: stored tensors by suffix.
        error: relative squared output error on the calibration inputs, None without data.
        tokens: calibration tokens that it saw.
        seconds: its share of the solve.
        notes: fallbacks taken.
    """

    packed: Packed
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
    """

    name: str
    index: int
    module: nn.Module
    groups: tuple[tuple[Node, ...], ...]
    formats: dict[str, Format]
    solver: Solver
    results: dict[str, NodeResult] = field(default_factory=dict)

    def chosen(self, group: tuple[Node, ...]) -> list[Node]:
        """The group's nodes that are to be compressed."""
        return [node for node in group if node.path in self.formats]

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
    _Passes(task, batches, groups).run()


def advance(module: nn.Module, index: int, batches: list[Batch]) -> None:
    """Move the batches to the output of a finished block."""
    for batch in batches:
        batch.hidden = batch.run(module, index)


class _Passes:
    """The suspended forward passes of all batches through one block."""

    def __init__(
        self, task: BlockTask, batches: list[Batch], groups: list[tuple[Node, ...]]
    ) -> None:
        self.task = task
        self.batches = batches
        self.groups = groups
        self.solved = 0  # groups before this one are done
        self.grams: dict[int, Gram] = {}
        self.walk = getcurrent()

    def run(self) -> None:
        handles = [
            self.task.linear(node).register_forward_pre_hook(self._hook(number))
            for number, group in enumerate(self.groups)
            for node in self.task.chosen(group)
        ]
        try:
            passes = [greenlet(self._forward) for _ in self.batches]
            waiting = [-1] * len(passes)  # the group at which each pass is suspended
            for number, group in enumerate(self.groups):
                for i, one in enumerate(passes):
                    # A pass that routes no token to this group's expert waits further on.
                    if waiting[i] < number:
                        waiting[i] = one.switch(self.batches[i]) if waiting[i] < 0 else one.switch()
                _solve_group(self.task, group, self.grams.pop(number, None))
                self.solved = number + 1
            for i, one in enumerate(passes):
                if waiting[i] < 0:
                    one.switch(self.batches[i])
                while not one.dead:
                    one.switch()
        finally:
            for handle in handles:
                handle.remove()

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
            if number not in self.grams:
                self.grams[number] = Gram(x.shape[-1], x.device)
            self.grams[number].add(x)
            self.walk.switch(number)

        return enter


def _solve_group(task: BlockTask, group: tuple[Node, ...], gram: Gram | None) -> None:
    """Solve the matrices that share an input; those of one format are stacked into one problem."""
    name = f"{task.name}.{group[0].path}"
    H = gram.mean() if gram is not None else None
    if H is not None and not bool(torch.isfinite(H.diagonal()).all()):
        raise RarefyError(
            f"the input of {name} is NaN or infinite on the calibration text; "
            "check the model with `rarefy evaluate`, or its config, before compressing it"
        )
    stacks: dict[Format, list[Node]] = defaultdict(list)
    for node in task.chosen(group):
        stacks[task.formats[node.path]].append(node)
    for fmt, nodes in stacks.items():
        _solve_stack(task, fmt, nodes, (H, gram.tokens if gram else 0))
    return_unused_pages()


def _solve_stack(
    task: BlockTask,
    fmt: Format,
    nodes: list[Node],
    inputs: tuple[torch.Tensor | None, int],
) -> None:
    H, tokens = inputs
    start = time.perf_counter()
    linears = [task.linear(node) for node in nodes]
    stacked = torch.cat([matrix_of(linear) for linear in linears])
    name = f"{task.name}.({', '.join(node.path for node in nodes)})"
    if H is None and task.solver.needs_gram:
        # Only an expert that no token was routed to can get here.
        grid = fmt.fit(stacked)
        weight = grid.round(stacked)
        notes: tuple[str, ...] = (f"{name} saw no calibration token; it was rounded to nearest",)
    else:
        solution = task.solver.solve(Problem(name, stacked, H), fmt)
        weight, grid, notes = solution.weight, solution.grid, solution.notes
    seconds = (time.perf_counter() - start) / len(nodes)
    first = 0
    for node, linear in zip(nodes, linears, strict=True):
        rows = slice(first, first + matrix_of(linear).shape[0])
        first = rows.stop
        error = output_error(stacked[rows], weight[rows], H) if H is not None else None
        packed = grid.rows(rows.start, rows.stop).encode(weight[rows])
        task.results[node.path] = NodeResult(packed, error, tokens, seconds, notes)
        set_matrix(linear, weight[rows])
