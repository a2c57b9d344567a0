"""A whole model in training: opened from a checkpoint with adapters in place of linears, and back.

Blocks are read one after the other and their linears handed to the tuner at once, so that a tuner
that keeps packed matrices never has the dense model in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.checkpoint.reader import DTYPES
from rarefy.engine.capture import outside
from rarefy.engine.skeleton import Skeleton, is_transposed, matrix_of
from rarefy.engine.stage import entry_of, inputs_of, untouched
from rarefy.engine.walk import NodeResult
from rarefy.errors import RarefyError
from rarefy.tuners.base import MatrixView, ModelTuner

if TYPE_CHECKING:
    from collections.abc import Callable

    from rarefy.engine.select import Selection
    from rarefy.engine.stage import StageRun
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format
    from rarefy.tuners.base import Adapter, Groups, Outcome


class Tuned(nn.Module):
    """A linear whose matrix is an adapter's.

    Args:
        adapter: gives ``x W^T``.
        bias: of the linear, or None.
        rounding: of the input, or None; gradients pass through it.
        scale: stored scale of a static rounding.
    """

    def __init__(
        self,
        adapter: Adapter,
        bias: nn.Parameter | None,
        rounding: Activation | None,
        scale: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.bias = bias
        self.rounding = rounding
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if self.rounding is not None:
            x = self.rounding.soft(x, self.scale)
        y: torch.Tensor = self.adapter(x)
        return self.adapter.output(y if self.bias is None else y + self.bias)


@dataclass
class Student:
    """The model in training.

    Attributes:
        skeleton: of the source, without weights: names and shapes.
        body: the same model with all of its weights, and adapters in it.
        adapters: module name -> what is in the place of its matrix.
        others: parameter name -> parameter that moves beside them.
    """

    skeleton: Skeleton
    body: Skeleton
    adapters: dict[str, Adapter] = field(default_factory=dict)
    others: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The module tree in training."""
        return self.body.model

    def groups(self, rate: float) -> Groups:
        """Everything that moves, for the optimizer.

        Raises:
            RarefyError: nothing does.
        """
        leaves = [p for a in self.adapters.values() for p in a.parameters() if p.requires_grad]
        leaves += self.others.values()
        if not leaves:
            raise RarefyError(
                "no number of the model moves in this stage: the tuner fits none of its matrices"
            )
        return [{"params": leaves, "lr": rate}]

    def constrain(self) -> None:
        """Put every adapter's numbers back where they have to be."""
        with torch.no_grad():
            for adapter in self.adapters.values():
                adapter.constrain()


def open_student(
    run: StageRun, skeleton: Skeleton, chosen: Selection, wanted: Callable[[str], bool]
) -> Student:
    """Read a checkpoint for training.

    Args:
        run: its stage's method is the tuner.
        skeleton: of the source, without weights.
        chosen: formats that the tuner is to bring matrices into.
        wanted: (module name) whether a linear may move.
    """
    tuner = run.stage.method
    assert isinstance(tuner, ModelTuner)
    body, table = Skeleton(run.source, run.device), skeleton.map
    student = Student(skeleton, body)
    for index, block in enumerate(body.blocks):
        prefix = f"{table.blocks}.{index}"
        body.fill(block, prefix)
        inputs = inputs_of(skeleton, chosen, index)
        for number, node in enumerate(skeleton.linears(index)):
            seed = 1000 * index + number
            name = f"{prefix}.{node.path}"
            if not wanted(name):
                continue
            module = block.get_submodule(node.path)
            view = _view(skeleton, chosen.blocks[index].get(node.path), (name, module), seed)
            adapter = tuner.adapt(view)
            if adapter is not None:
                rounding = tuner.activation(name, inputs.get(node.path))
                scale = (view.packed or {}).get("input_scale")
                student.adapters[name] = adapter.to(run.device)
                bias: Any = module.bias
                block.set_submodule(node.path, Tuned(adapter, bias, rounding, scale))
    _fill_outside(body)
    norms = skeleton.norms
    for name, parameter in body.model.named_parameters():
        if ".adapter." not in name and tuner.moves(name, name in norms):
            parameter.requires_grad_()
            student.others[name] = parameter
    return student


def _view(
    skeleton: Skeleton, scheme: Format | None, place: tuple[str, nn.Module], seed: int
) -> MatrixView:
    name, module = place
    fmt = skeleton.earlier.get(name)
    packed = None if fmt is None else skeleton.packed(name)
    return MatrixView(
        name=name,
        weight=matrix_of(module),
        grid=None if fmt is None or packed is None else fmt.stored_grid(packed),
        support=skeleton.support(name),
        scheme=scheme,
        packed=packed,
        seed=seed,
    )


def _fill_outside(body: Skeleton) -> None:
    """Embeddings, final norm and head; a tied head shares the embedding's matrix."""
    model, table = body.model, body.map
    for name, module in outside(body):
        body.fill(module, name)
    if table.final_norm:
        body.fill(model.get_submodule(table.final_norm), table.final_norm)
    head = model.get_submodule(table.head)
    if body.tied:
        head.weight = model.get_submodule(table.embedding).weight
    else:
        body.fill(head, table.head)


@dataclass(frozen=True)
class Written:
    """What became of the matrices.

    Attributes:
        nodes: the manifest's entries of those that are stored in a format.
        adapters: module name -> tensors that are saved apart.
    """

    nodes: list[dict[str, Any]]
    adapters: dict[str, dict[str, torch.Tensor]]


def write_student(run: StageRun, student: Student, chosen: Selection, tokens: int) -> Written:
    """Write every block and what is outside of them, as parts of the new checkpoint.

    Args:
        run: whose writer is used.
        student: after its training.
        chosen: formats that the tuner was to bring matrices into.
        tokens: that it was trained on, for the manifest.
    """
    skeleton = student.skeleton
    nodes: list[dict[str, Any]] = []
    apart: dict[str, dict[str, torch.Tensor]] = {}
    for index in range(len(skeleton.blocks)):
        prefix = f"{skeleton.map.blocks}.{index}."
        found = {n: a.finish() for n, a in student.adapters.items() if n.startswith(prefix)}
        apart |= {n: o.adapter for n, o in found.items() if o.adapter}
        changed = {n: o for n, o in found.items() if o.weight is not None}
        tensors = untouched(skeleton, prefix, set(changed))
        for name, outcome in changed.items():
            entry = _store(run, skeleton, name, outcome, tensors, tokens)
            nodes += [] if entry is None else [entry]
        _put_others(student, prefix, tensors)
        run.writer.add(f"{index:05d}", tensors, {"seconds": 0.0})
    tensors = untouched(skeleton, "", set())
    _put_others(student, "", tensors)
    run.writer.add("outside", tensors, {"seconds": 0.0})
    return Written(nodes, apart)


def _store(
    run: StageRun,
    skeleton: Skeleton,
    name: str,
    outcome: Outcome,
    tensors: dict[str, torch.Tensor],
    tokens: int,
) -> dict[str, Any] | None:
    """Add one matrix to the tensors of its block; return its entry if it lies on a grid."""
    assert outcome.weight is not None
    stored = skeleton.stored_name(name)
    if outcome.grid is None:
        weight = outcome.weight
        if is_transposed(skeleton.model.get_submodule(name)):
            weight = weight.T
        tensors[f"{stored}.weight"] = _small(skeleton, name, weight)
        return None
    packed = outcome.grid.encode(outcome.weight)
    if name in skeleton.earlier:
        before = skeleton.packed(name)
        packed |= {"input_scale": before["input_scale"]} if "input_scale" in before else {}
    result = NodeResult(packed, outcome.grid.form, run.stage.name, None, tokens, 0.0)
    tensors |= {f"{stored}.{suffix}": t.cpu() for suffix, t in packed.items()}
    return entry_of(skeleton, name, result)


def _put_others(student: Student, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    skeleton = student.skeleton
    inside = f"{skeleton.map.blocks}."
    for name, parameter in student.others.items():
        if name.startswith(prefix) and (prefix or not name.startswith(inside)):
            owner = name.rpartition(".")[0]
            tensors[skeleton.stored_name(name)] = _small(skeleton, owner, parameter.detach())


def _small(skeleton: Skeleton, owner: str, value: torch.Tensor) -> torch.Tensor:
    """A value in the type that its module is stored in.

    Raises:
        RarefyError: it has left the range of that type.
    """
    kept = value.detach().to(DTYPES[skeleton.stored_dtype(owner)]).contiguous().cpu()
    if not bool(kept.isfinite().all()):
        raise RarefyError(
            f"training moved {owner} out of the range of {kept.dtype}; lower the learning rate, "
            "or convert the checkpoint to bfloat16 or float32 first"
        )
    return kept
