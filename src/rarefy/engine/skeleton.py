"""A model without weights, whose modules are filled from a checkpoint one block at a time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rarefy.checkpoint.state import read_state
from rarefy.errors import RarefyError
from rarefy.export.containers import Stored
from rarefy.maps.catalogue import map_for
from rarefy.maps.discover import longest_block_list
from rarefy.maps.experts import split_experts
from rarefy.maps.model_map import ModelMap, Node, dims_of
from rarefy.maps.units import narrow, widths_in
from rarefy.runtime.factored import Factored, factorize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rarefy.checkpoint.reader import Checkpoint
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format, Packed


def causal_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        RarefyError: transformers has no causal language model of this type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = checkpoint.config.get("model_type", "?")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RarefyError(
            f"transformers cannot build a causal language model of type {kind!r}; "
            "give a decoder language model, or install a newer transformers"
        )
    return AutoConfig.from_pretrained(checkpoint.path)


def empty_model(checkpoint: Checkpoint, config: dict[str, Any] | None = None) -> Any:
    """The transformers model of a checkpoint without weights; see :class:`Skeleton`."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    # Unwritten pages of parameters on their way to the meta device take no memory.
    known = causal_config(checkpoint)
    built = known if config is None else type(known).from_dict(config)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32)


class Skeleton:
    """The module tree of a checkpoint with every parameter on the meta device.

    Args:
        checkpoint: the source of weights.
        device: where modules live while they are loaded.
        factored: open factorized matrices into two linears; otherwise they are read as one.
        config: in place of the checkpoint's own, to look at a model of other sizes.
        model: a module tree without weights, in place of transformers'.

    Attributes:
        model: the module tree.
        map: the model map, expanded over experts.
        blocks: the decoder blocks.
        earlier: module-side name -> format of matrices that earlier stages compressed.
        widths: kind of unit -> how many each block has, where blocks differ.
        split: experts are written one by one under their module names; set once a stage
            compresses one of them.

    Raises:
        RarefyError: transformers cannot build the architecture.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        factored: bool = True,
        config: dict[str, Any] | None = None,
        model: Any = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.state = read_state(checkpoint.path)
        self.earlier = self.state.formats
        self.model: Any = empty_model(checkpoint, config) if model is None else model
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
        self.model.config.use_cache = False
        family = map_for(self.model.config)
        path = family.blocks if family else longest_block_list(self.model)
        self.map = family.expanded(dims_of(self.model.config)) if family else self._unknown(path)
        self.widths = widths_in(checkpoint.config if config is None else config)
        if self.widths:
            narrow(self.model, self.map, self.widths)
        self.blocks: nn.ModuleList = self.model.get_submodule(path)
        if self.map.experts is not None:
            for block in self.blocks:
                split_experts(block, self.map.experts)
        self.split = any(self.in_experts(name) for name in self.earlier)
        self._factored: set[str] = set()
        if factored:
            self.open_factors()

    def open_factors(self) -> None:
        """Give every factorized matrix two linears in the module tree, and two nodes in its block.

        Later stages then see the factors as ordinary linears, the second one reading the narrow
        space between them.
        """
        for name, fmt in self.earlier.items():
            if name in self._factored:
                continue
            rank = fmt.inner_width(*self.shape(name))
            if rank is not None:
                factorize(self.model, name, rank)
                self._factored.add(name)

    def demand_dense(self, method: str, role: str, does: str) -> None:
        """Refuse a model whose weights a transform or a surgery may not change.

        Args:
            method: its name. role: "transforms" or "surgery". does: "changes weights", for one.

        Raises:
            RarefyError: nobody knows which weights belong together, or some are compressed.
        """
        if not self.map.proved:
            raise RarefyError(
                f"model type {self.map.family!r} has no proved map, so {method} does not know "
                f"which weights belong together; use a recipe without {role}"
            )
        if self.widths:
            raise RarefyError(
                f"the blocks of {self.checkpoint.path} differ in width, and {method} handles "
                "blocks of one width only; let it come before the surgery, or rank block by block"
            )
        if self.earlier:
            name, fmt = next(iter(self.earlier.items()))
            raise RarefyError(
                f"{name} is stored as {fmt.label()} already, and {method} {does}; "
                "start from the dense model"
            )

    def nodes(self, block: int) -> ModelMap:
        """The map of one block, in which each factorized linear is two."""
        prefix = f"{self.map.blocks}.{block}."
        paths = {name[len(prefix) :] for name in self._factored if name.startswith(prefix)}
        return self.map.factored(paths) if paths else self.map

    def linears(self, block: int) -> tuple[Node, ...]:
        """The nodes of one block that a solver may compress, in order of execution."""
        return self.nodes(block).linears

    def _unknown(self, blocks: str) -> ModelMap:
        """A map without nodes, to be completed by ``engine.capture.complete_map``."""
        names = {id(module): name for name, module in self.model.named_modules()}
        embedding = names[id(self.model.get_input_embeddings())]
        head = names.get(id(self.model.get_output_embeddings()), "lm_head")
        family = self.model.config.model_type
        return ModelMap(family, blocks, (), (), embedding, "", head, proved=False)

    @property
    def norms(self) -> set[str]:
        """Parameter names of the norms' weights."""
        inside = {
            f"{self.node_name(block, node)}.weight"
            for block in range(len(self.blocks))
            for node in self.nodes(block).nodes
            if node.kind == "norm"
        }
        return inside | {f"{self.map.final_norm}.weight"}

    def node_name(self, block: int, node: Node) -> str:
        """Full module path of a node."""
        return f"{self.map.blocks}.{block}.{node.path}"

    def stored_name(self, name: str) -> str:
        """The name under which a module or parameter is written, given its module-side name."""
        return self.map.stored_name(name, split=self.split)

    def locate(self, name: str) -> str | None:
        """The checkpoint's name of a module-side parameter, if it is stored under one.

        Base-model checkpoints (the published GPT-2) lack the prefix that the language model
        class adds; both spellings are tried.
        """
        stored = self.map.stored_name(name)
        base = f"{self.model.base_model_prefix}."
        for candidate in (stored, name, stored.removeprefix(base), base + stored):
            if candidate in self.checkpoint:
                return candidate
        return None

    def shape(self, name: str) -> tuple[int, int]:
        """[out, in] of a linear or embedding, by module-side name."""
        parent, _, part = name.rpartition(".")
        if parent in self.earlier and parent not in self._factored:  # one factor of a closed pair
            rows, columns = self.shape(parent)
            rank = self.earlier[parent].inner_width(rows, columns) or 0
            return (rank, columns) if part == "first" else (rows, rank)
        module = self.model.get_submodule(name)
        if isinstance(module, Factored):
            return module.second.weight.shape[0], module.first.weight.shape[1]
        rows, columns = module.weight.shape
        return (columns, rows) if is_transposed(module) else (rows, columns)

    def stored_dtype(self, name: str) -> str:
        """Safetensors dtype name of a module's weight; of the whole checkpoint if it is fused."""
        stored = self.locate(f"{name}.weight")
        entries = self.checkpoint.entries
        return entries[stored].dtype if stored else next(iter(entries.values())).dtype

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's matrix."""
        config = self.model.config
        return bool(getattr(config, "tie_word_embeddings", False))

    def shares_packed_embedding(self, compressed: set[str]) -> bool:
        """Whether the head reads the packed embedding instead of a matrix of its own."""
        return self.tied and self.map.embedding in compressed

    @property
    def parameter_names(self) -> list[str]:
        """Module-side names of everything that is stored, in the model's order."""
        return list(self.model.state_dict())

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        head = f"{self.map.head}."
        return sum(
            tensor.numel()
            for name, tensor in self.model.state_dict().items()
            if not (self.tied and name.startswith(head))
        )

    @property
    def widest(self) -> int:
        """Bytes in fp32 of the largest parameter of a block."""
        return max((4 * p.numel() for p in self.blocks[0].parameters()), default=0)

    def stored_matrices(
        self, formats: Mapping[str, Format], inputs: Mapping[str, Activation]
    ) -> dict[str, Stored]:
        """Compressed matrices as containers see them, from module-side name -> format."""
        found = {}
        for name, fmt in formats.items():
            plain = type(self.model.get_submodule(name)) is nn.Linear and not self.in_experts(name)
            found[self.stored_name(name)] = Stored(fmt, self.shape(name), plain, inputs.get(name))
        return found

    def in_experts(self, name: str) -> bool:
        """Whether a module lies in a split mixture of experts."""
        return self.map.experts is not None and f".{self.map.experts.container}." in f"{name}."

    def read(self, name: str) -> torch.Tensor:
        """A parameter in its stored type, by module-side name.

        Raises:
            RarefyError: it is not in the checkpoint, or holds a NaN or an infinity.
        """
        stored = self.locate(name)
        if stored is not None:
            tensor = self.checkpoint.read(stored)
        elif name.removesuffix(".weight") in self.earlier:
            tensor = self._from_packed(name)
        else:
            tensor = self._from_fused(name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RarefyError(
                f"{name} of {self.checkpoint.path} holds a NaN or an infinite value; "
                "the checkpoint is damaged, fetch it again"
            )
        return tensor

    def read_as(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The same, of the shape that the module has.

        Raises:
            RarefyError: its shape is another one.
        """
        tensor = self.read(name)
        if tensor.shape != shape:
            raise RarefyError(
                f"{name} has shape {tuple(tensor.shape)} where the config asks for "
                f"{tuple(shape)}; config.json and weights do not belong together"
            )
        return tensor

    def packed(self, module: str) -> Packed:
        """The stored tensors of a matrix that an earlier stage compressed, by suffix."""
        suffixes = [*self.earlier[module].layout(*self.shape(module))]
        found = {}
        for suffix in (*suffixes, "input_scale"):
            names = (module, self.map.stored_name(module))
            stored = next((n for n in names if f"{n}.{suffix}" in self.checkpoint), None)
            factor = f"{module}.{suffix.removesuffix('.weight')}"
            if stored is not None:
                found[suffix] = self.checkpoint.read(f"{stored}.{suffix}")
            elif factor in self.earlier:  # a later stage compressed it on its own
                found[suffix] = self.earlier[factor].decode(self.packed(factor))
            elif suffix != "input_scale":
                raise RarefyError(
                    f"{self.checkpoint.path} lacks {module}.{suffix}; the checkpoint is incomplete"
                )
        return found

    def support(self, module: str) -> torch.Tensor | None:
        """Where a matrix may differ from zero, as an earlier stage imposed it: bool [m, n]."""
        earlier = self.earlier.get(module)
        return None if earlier is None else earlier.stored_support(self.packed(module))

    def _from_packed(self, name: str) -> torch.Tensor:
        """A matrix that an earlier stage compressed."""
        module = name.removesuffix(".weight")
        matrix = self.earlier[module].decode(self.packed(module))
        owner = self.model.get_submodule(module)
        return matrix.T if is_transposed(owner) else matrix

    def _from_fused(self, name: str) -> torch.Tensor:
        """One expert's matrix out of a checkpoint that stores experts as 3-D tensors."""
        experts = self.map.experts
        if experts is not None:
            prefix, _, rest = name.partition(f".{experts.container}.")
            number, _, leaf = rest.partition(".")
            fused = "down_proj" if leaf == "down_proj.weight" else "gate_up_proj"
            where = self.locate(f"{prefix}.{experts.container}.{fused}") if number else None
            if where is not None:
                matrix = self.checkpoint.read(where)[int(number)]
                half = matrix.shape[0] // 2
                return {
                    "gate_proj.weight": matrix[:half],
                    "up_proj.weight": matrix[half:],
                    "down_proj.weight": matrix,
                }[leaf].clone()
        return self.checkpoint.read(self.stored_name(name))

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read a module's parameters in fp32."""
        for path, owner in module.named_modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is None:
                    continue
                full = ".".join(part for part in (prefix, path, name) if part)
                value = self.read_as(full, parameter.shape).to(self.device, torch.float32)
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)

    @staticmethod
    def drop(module: nn.Module) -> None:
        """Put a module's parameters back on the meta device, freeing their memory."""
        for owner in module.modules():
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    owner._parameters[name] = nn.Parameter(empty, requires_grad=False)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The decoder block ``index`` with its weights, for the duration of the context."""
        module = self.blocks[index]
        self.fill(module, f"{self.map.blocks}.{index}")
        try:
            yield module
        finally:
            self.drop(module)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, without temporary copies of its size."""
    flat = tensor.reshape(-1)
    pieces = torch.split(flat, 1 << 18)
    return all(bool(piece.float().abs().max().isfinite()) for piece in pieces if len(piece))


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out] (GPT-2's Conv1D)."""
    return isinstance(module, Conv1D)


def matrix_of(module: nn.Module) -> torch.Tensor:
    """A linear's weight as [out, in], in fp32."""
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    return weight.T if is_transposed(module) else weight


def set_matrix(module: nn.Module, matrix: torch.Tensor) -> None:
    """Replace a linear's weight by an [out, in] matrix."""
    value = matrix.T.contiguous() if is_transposed(module) else matrix.contiguous()
    module.weight = nn.Parameter(value, requires_grad=False)
