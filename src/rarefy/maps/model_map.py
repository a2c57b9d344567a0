"""Model maps: a decoder block as a small graph, written down as data.

**Nodes** are the modules that hold weights: linears (the ones that solvers compress) and norms.
**Edges** are the activation spaces that nodes read and write: the input of attention, the value
channels, the inner space of the MLP. One table of nodes and edges per architecture family answers
every question a method may ask: which linears share an input (one Gram for q, k and v), which
linears run after which (true-sequential order), and whose channels may be rescaled against whose
(SmoothQuant, AWQ, pruning). Every map is proved numerically, not believed: see ``maps/check.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from rarefy.errors import RarefyError

Kind = Literal["linear", "conv1d", "norm", "router"]
Width = Literal["hidden", "heads", "kv", "intermediate", "expert", "unknown"]


@dataclass(frozen=True)
class Node:
    """A module of the block that holds a weight.

    Attributes:
        path: module path below the block, ``self_attn.q_proj``; ``{e}`` stands for an expert.
        reads: the edge whose activations are its input.
        writes: the edges its output rows make up, in row order when ``layout`` is "concat".
        kind: "linear" has weight [out, in], "conv1d" (GPT-2) has [in, out], "norm" has [width].
            "router" has [experts, in]: no method compresses it, but a fold divides its columns.
        layout: how a fused writer's rows are divided among ``writes``: one after the other, or
            head by head (GPT-NeoX: q, k, v of head 0, then of head 1, ...).
        offset: a norm multiplies by ``offset + weight`` (Gemma: 1).
    """

    path: str
    reads: str
    writes: tuple[str, ...]
    kind: Kind = "linear"
    layout: Literal["concat", "per_head"] = "concat"
    offset: float = 0.0


@dataclass(frozen=True)
class Edge:
    """An activation space.

    Attributes:
        name: unique within the map; ``{e}`` stands for an expert.
        width: which of the model's dimensions it has; "unknown" on a discovered edge.
        foldable: scaling a writer's channel by s > 0 and its readers' columns by 1/s leaves the
            function unchanged (the path between is linear or positively homogeneous per channel).
        repeat: readers see every head of this edge several times (grouped-query attention).
        part_of: the edge whose channels this one has, for a subset of its tokens (what the router
            sends to an expert). Statistics are this edge's own; a fold belongs to the whole edge.
    """

    name: str
    width: Width
    foldable: bool = False
    repeat: bool = False
    part_of: str = ""


@dataclass(frozen=True)
class Experts:
    """A fused mixture-of-experts container (transformers 5: ``gate_up_proj`` [E, 2I, H]).

    Attributes:
        container: module path below the block of the fused experts.
        count: name of the config field that holds the number of experts.
        gate, up, down: path of each expert's linear once split, ``mlp.experts.{e}.gate_proj``.
    """

    container: str
    count: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Dims:
    """The widths of a model, read from its config, in channels.

    Attributes:
        hidden: residual stream. heads, kv: number of query and key/value heads.
        head_dim: channels per head. intermediate: inner space of the (dense or expert) MLP.
        experts: number of experts, 0 for a dense model.
    """

    hidden: int
    heads: int
    kv: int
    head_dim: int
    intermediate: int
    experts: int = 0

    def width(self, kind: Width) -> int:
        """Channels of an edge of this kind.

        Raises:
            RarefyError: the edge was discovered, so that nobody knows which dimension it has.
        """
        if kind == "unknown":
            raise RarefyError("a discovered edge has no known width; write a map for this family")
        return {
            "hidden": self.hidden,
            "heads": self.heads * self.head_dim,
            "kv": self.kv * self.head_dim,
            "intermediate": self.intermediate,
            "expert": self.intermediate,
        }[kind]


@dataclass(frozen=True)
class ModelMap:
    """One architecture family.

    Attributes:
        family: the config's ``model_type``.
        blocks: path of the ModuleList of decoder blocks.
        nodes: nodes of one block in order of execution.
        edges: edges of one block.
        embedding, final_norm, head: module paths; ``final_norm`` is empty when there is none.
        experts: the fused experts container, if any.
        renames: (regex, replacement) pairs from a parameter's name below the block, or its whole
            name outside the blocks, to its name in the checkpoint, for families whose files use
            other names (Mixtral, GPT-NeoX).
        when: (config field, value) pairs that must hold for the map to describe the model.
        proved: False for a map that was discovered; only solvers may use it.
    """

    family: str
    blocks: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    embedding: str
    final_norm: str
    head: str = "lm_head"
    experts: Experts | None = None
    renames: tuple[tuple[str, str], ...] = ()
    when: tuple[tuple[str, object], ...] = ()
    proved: bool = True

    def edge(self, name: str) -> Edge:
        """Return the edge called ``name``."""
        return next(e for e in self.edges if e.name == name)

    @property
    def linears(self) -> tuple[Node, ...]:
        """Nodes that solvers may compress, in order of execution."""
        return tuple(n for n in self.nodes if n.kind in ("linear", "conv1d"))

    @property
    def shared_inputs(self) -> tuple[tuple[Node, ...], ...]:
        """Linears grouped by the edge they read, in order of execution: {q, k, v}, o, ..."""
        groups: dict[str, list[Node]] = {}
        for node in self.linears:
            groups.setdefault(node.reads, []).append(node)
        return tuple(tuple(group) for group in groups.values())

    def writers(self, edge: str) -> tuple[Node, ...]:
        """Nodes whose output is (a part of) the edge."""
        return tuple(n for n in self.nodes if edge in n.writes)

    def readers(self, edge: str) -> tuple[Node, ...]:
        """Nodes whose input is the edge or, for an expert's share of its tokens, a part of it."""
        names = {edge, *(e.name for e in self.edges if e.part_of == edge)}
        return tuple(n for n in self.nodes if n.reads in names)

    def expanded(self, dims: Dims) -> ModelMap:
        """Return the map with every ``{e}`` node and edge written out once per expert."""

        def unroll(items: tuple[Any, ...], key: str) -> list[Any]:
            out: list[Any] = []
            run: list[Any] = []
            for item in items:
                if "{e}" in getattr(item, key):
                    run.append(item)
                    continue
                out += [_numbered(i, e) for e in range(dims.experts) for i in run]
                run = []
                out.append(item)
            return out + [_numbered(i, e) for e in range(dims.experts) for i in run]

        if self.experts is None:
            return self
        return replace(
            self,
            nodes=tuple(unroll(self.nodes, "path")),
            edges=tuple(unroll(self.edges, "name")),
        )

    def factored(self, paths: set[str]) -> ModelMap:
        """Return the map with each linear at ``paths`` in two: first [k, n], then second [m, k]."""
        nodes: list[Node] = []
        edges = list(self.edges)
        for node in self.nodes:
            if node.path not in paths:
                nodes.append(node)
                continue
            inner = Edge(f"{node.path}.inner", "unknown")
            edges.append(inner)
            nodes.append(Node(f"{node.path}.first", node.reads, (inner.name,)))
            nodes.append(replace(node, path=f"{node.path}.second", reads=inner.name, kind="linear"))
        return replace(self, nodes=tuple(nodes), edges=tuple(edges))

    def stored_name(self, name: str, *, split: bool = False) -> str:
        """Translate a module's or parameter's full name into its name in the checkpoint.

        Args:
            name: module-side name, ``model.layers.0.mlp.experts.3.gate_proj.weight``.
            split: the checkpoint stores experts under their split module names.
        """
        prefix = f"{self.blocks}."
        if not name.startswith(prefix):
            return self.checkpoint_name(f"{name}.").removesuffix(".")
        number, _, rest = name[len(prefix) :].partition(".")
        if split and self.experts is not None and rest.startswith(f"{self.experts.container}."):
            return name
        # The patterns end at a dot, so a module's path is matched like a parameter's.
        return f"{prefix}{number}.{self.checkpoint_name(f'{rest}.').removesuffix('.')}"

    def checkpoint_name(self, name: str) -> str:
        """Translate a parameter's name (see ``renames``) into its name in the checkpoint."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def _numbered(item: Any, expert: int) -> Any:
    """Put an expert's number in place of ``{e}`` in every text of a Node or an Edge."""
    number = str(expert)
    if isinstance(item, Edge):
        return replace(item, name=item.name.replace("{e}", number))
    return replace(
        item,
        path=item.path.replace("{e}", number),
        reads=item.reads.replace("{e}", number),
        writes=tuple(w.replace("{e}", number) for w in item.writes),
    )


_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head"),
    "kv": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate": ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"),
    "experts": ("num_local_experts", "num_experts"),
}


def dims_of(config: Any) -> Dims:
    """Read a model's widths from its (text) config.

    Raises:
        RarefyError: the config does not say how wide the model is.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def read(field: str) -> int | None:
        for alias in _ALIASES[field]:
            value = getattr(config, alias, None)
            if value is not None:
                return int(value)
        return None

    hidden, heads = read("hidden"), read("heads")
    if hidden is None or heads is None:
        raise RarefyError(
            f"the config of model type {getattr(config, 'model_type', '?')!r} gives no hidden size "
            "and head count; rarefy reads decoder language models only"
        )
    return Dims(
        hidden=hidden,
        heads=heads,
        kv=read("kv") or heads,
        head_dim=read("head_dim") or hidden // heads,
        intermediate=read("intermediate") or 4 * hidden,
        experts=read("experts") or 0,
    )
