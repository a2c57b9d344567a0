"""Fallback for families without a written map: find the blocks, and see which linears share inputs.

Groups of linears that receive the very same tensor, in order of execution, are all that solvers
need. Which channels may be rescaled against which cannot be seen this way, so no discovered edge
is foldable and methods on edges refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rarefy.errors import RarefyError
from rarefy.maps.model_map import Edge, ModelMap, Node

if TYPE_CHECKING:
    from collections.abc import Callable

LINEARS = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Call:
    """One forward call of a linear.

    Attributes:
        path: module path below the block.
        input: the tensor it received; held, so that its memory is not reused while comparing.
    """

    path: str
    input: Tensor

    def same_input(self, other: Call) -> bool:
        """Whether both calls received the same memory, seen in the same shape."""
        a, b = self.input, other.input
        return a is b or (
            a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        )


def record_calls(block: nn.Module, run: Callable[[], object]) -> tuple[Call, ...]:
    """Return the first call of every linear of ``block`` during ``run()``, in order."""
    calls: dict[str, Call] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            calls.setdefault(path, Call(path, *args, *kwargs.values()))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path), with_kwargs=True)
        for path, module in block.named_modules()
        if isinstance(module, LINEARS)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(calls.values())


def discover_block(
    block: nn.Module, run: Callable[[], object]
) -> tuple[tuple[Node, ...], tuple[Edge, ...]]:
    """Derive a block's nodes by watching one forward.

    Args:
        block: a decoder block with materialized weights.
        run: makes the block run once, on real tensors.

    Returns:
        Nodes in order of execution, and one edge ("in0", "in1", ...) for each distinct input.

    Raises:
        RarefyError: no linear of the block ran.
    """
    firsts: list[Call] = []
    nodes: list[Node] = []
    for call in record_calls(block, run):
        at = next((i for i, first in enumerate(firsts) if call.same_input(first)), len(firsts))
        if at == len(firsts):
            firsts.append(call)
        transposed = isinstance(block.get_submodule(call.path), Conv1D)
        nodes.append(Node(call.path, f"in{at}", (), kind="conv1d" if transposed else "linear"))
    if not nodes:
        raise RarefyError(
            f"no linear layer of {type(block).__name__} ran; this architecture is not supported "
            "and needs a written map"
        )
    return tuple(nodes), tuple(Edge(f"in{i}", "unknown") for i in range(len(firsts)))


def longest_block_list(model: nn.Module) -> str:
    """Return the path of the longest outermost ModuleList whose every element holds linears.

    Lists inside another such list (the experts of a block) do not count.

    Raises:
        RarefyError: there is none.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _all_hold_linears(module):
            found[path] = len(module)
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", "?")
        raise RarefyError(
            f"the architecture {type(model).__name__} (model type {family!r}) has no list of "
            "decoder blocks with linear layers; it is not supported"
        )
    return max(found, key=lambda path: found[path])


def _all_hold_linears(modules: nn.ModuleList) -> bool:
    holds = [any(isinstance(m, LINEARS) for m in element.modules()) for element in modules]
    return bool(holds) and all(holds)


class _FirstBlockDone(Exception):  # noqa: N818 - a signal, not an error
    """Ends the forward once the first block has run: later blocks may not be materialized."""


def discover(model: nn.Module, input_ids: Tensor) -> ModelMap:
    """Derive a map for a model of unknown family from one forward of its first block.

    Args:
        model: a transformers model; only its embeddings and first block need real weights.
        input_ids: tokens [batch, length].

    Returns:
        A map with ``proved=False``. ``final_norm`` is empty when none was recognized.

    Raises:
        RarefyError: no list of blocks, or no linear that runs.
    """
    blocks = longest_block_list(model)
    block = model.get_submodule(f"{blocks}.0")

    def stop(*_: object) -> None:
        raise _FirstBlockDone

    def run() -> None:
        handle = block.register_forward_hook(stop)
        try:
            model(input_ids=input_ids, use_cache=False)
        except _FirstBlockDone:
            return
        finally:
            handle.remove()

    nodes, edges = discover_block(block, run)
    return ModelMap(
        family=str(getattr(getattr(model, "config", None), "model_type", "unknown")),
        blocks=blocks,
        nodes=nodes,
        edges=edges,
        embedding=_path_of(model, "get_input_embeddings"),
        final_norm=_final_norm(model, blocks),
        head=_path_of(model, "get_output_embeddings"),
        proved=False,
    )


def _path_of(model: nn.Module, getter: str) -> str:
    """Path of the module that a transformers getter returns, empty when there is none."""
    wanted = getattr(model, getter, lambda: None)()
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    return paths.get(id(wanted), "")


def _final_norm(model: nn.Module, blocks: str) -> str:
    """The last sibling of the block list whose weight is a vector."""
    parent, _, _ = blocks.rpartition(".")
    names = [
        name
        for name, child in model.get_submodule(parent).named_children()
        if getattr(getattr(child, "weight", None), "ndim", 0) == 1
    ]
    return f"{parent}.{names[-1]}".lstrip(".") if names else ""
