"""Packed modules in the place of dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from rarefy.runtime.factored import factorize
from rarefy.runtime.packed import PackedEmbedding, PackedLinear, TiedHead

if TYPE_CHECKING:
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format


def put_packed(model: Any, name: str, fmt: Format, rounding: Activation | None) -> None:
    """Put a module that executes the stored matrix in the place of a dense one."""
    module = model.get_submodule(name)
    rows, columns = module.weight.shape
    if isinstance(module, nn.Embedding):
        # Gemma's ``embed_scale`` is a buffer, which has no value on the meta device.
        factor = getattr(module, "scalar_embed_scale", None)
        model.set_submodule(name, PackedEmbedding(fmt, (rows, columns), factor))
        return
    shape = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    rank = fmt.inner_width(*shape)
    if rank is not None:
        factorize(model, name, rank)
    else:
        model.set_submodule(name, PackedLinear(fmt, shape, module.bias, rounding))


def mend_ties(model: Any) -> None:
    """Let a tied head read a packed embedding, and forget ties of matrices that are gone."""
    embedding = model.get_input_embeddings()
    keys = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if isinstance(embedding, PackedEmbedding) and keys:
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        model.set_submodule(head, TiedHead(embedding))
        model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = False
