"""Open a folder with every weight as it is stored: packed matrices packed, 16-bit ones in 16 bits.

transformers' own loading turns dense weights into one type and, for portable containers, decodes
the packed ones. Here nothing is decoded and nothing exists twice, so that running a model takes
little more memory than its files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rarefy.checkpoint.reader import Checkpoint
from rarefy.engine.skeleton import Skeleton
from rarefy.resources import return_unused_pages
from rarefy.runtime.outline import outline
from rarefy.runtime.placing import mend_ties, put_packed

if TYPE_CHECKING:
    from pathlib import Path

    from rarefy.runtime.outline import Outline


def stored_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A transformers model on the CPU whose packed modules hold the stored tensors.

    Args:
        folder: a dense model, or one that rarefy wrote, in whichever container.
        dtype: of the weights that are not packed; by default the type in which each is stored.
            Only with float32 can transformers run the model.

    Raises:
        RarefyError: the folder is no checkpoint, or incomplete.
    """
    from transformers import GenerationConfig

    model = _filled(Skeleton(Checkpoint(folder), torch.device("cpu")), dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def stored_outline(folder: Path) -> Outline:
    """The same without transformers: modules that hold tensors, and no way to call them.

    Raises:
        RarefyError: see :func:`stored_model` and :func:`rarefy.runtime.outline.outline`.
    """
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(checkpoint, torch.device("cpu"), model=outline(checkpoint))
    model: Outline = _filled(skeleton, None)
    return model


def _filled(skeleton: Skeleton, dtype: torch.dtype | None) -> Any:
    """The skeleton's model with every tensor as it is stored."""
    model = skeleton.model
    model.config.use_cache = True
    for name, fmt in skeleton.earlier.items():
        if fmt.inner_width(*skeleton.shape(name)) is None:
            tensors = skeleton.packed(name)
            put_packed(model, name, fmt, skeleton.state.inputs.get(name))
            for suffix, tensor in tensors.items():
                model.get_submodule(name).register_buffer(suffix, tensor)
    for path, module in model.named_modules():
        if not (skeleton.tied and path == skeleton.map.head):
            _fill(module, path, skeleton, dtype)
    if skeleton.tied and not skeleton.shares_packed_embedding(set(skeleton.earlier)):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    mend_ties(model)
    return_unused_pages()  # of reading; what comes next would be on top of them
    return model


def _fill(module: nn.Module, path: str, skeleton: Skeleton, dtype: torch.dtype | None) -> None:
    """Read a module's own parameters."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            tensor = skeleton.read_as(f"{path}.{name}", parameter.shape)
            value = tensor if dtype is None else tensor.to(dtype)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
