"""The transformers plug-in: ``quant_method: "rarefy"`` opens with ``from_pretrained``.

Importing this module registers it, which ``import rarefy`` does. The quantizer replaces modules on
the meta device by packed ones whose buffers carry the checkpoint's names, and leaves loading to
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from rarefy.errors import RarefyError
from rarefy.maps.catalogue import map_for
from rarefy.maps.experts import split_experts
from rarefy.maps.model_map import ModelMap, dims_of
from rarefy.maps.units import narrow
from rarefy.recipe import activation_from, format_from
from rarefy.runtime.factored import factorize
from rarefy.runtime.packed import PackedEmbedding, PackedLinear, TiedHead

if TYPE_CHECKING:
    from rarefy.formats.activation import Activation
    from rarefy.formats.base import Format

_VERSION = 1


class RarefyConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a folder in rarefy's own container.

    Attributes:
        version: of the container.
        groups: [{"scheme": format as plain data, "modules": stored module names}, ...], with
            "input", an activation format as plain data, where inputs are rounded.
        widths: kind of unit -> how many each block has, where blocks differ.
    """

    def __init__(
        self, version: int = _VERSION, groups: Any = (), widths: Any = None, **_: Any
    ) -> None:
        self.quant_method = "rarefy"
        self.version = version
        self.groups = list(groups)
        self.widths = dict(widths or {})


class RarefyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules in place of dense ones before the weights are read."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse containers of a later version.

        Raises:
            RarefyError: the folder was written by a newer rarefy.
        """
        if self.quantization_config.version > _VERSION:
            raise RarefyError(
                f"this model is stored in version {self.quantization_config.version} of rarefy's "
                f"container and this rarefy reads up to {_VERSION}; upgrade rarefy"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        groups = self.quantization_config.groups
        known = map_for(model.config)
        if self.quantization_config.widths and known is not None:
            narrow(model, known, self.quantization_config.widths)
        stored = {name: group for group in groups for name in group["modules"]}
        names = _module_names(model, set(stored))
        # Factors are modules of their own, which must be there before one of them is packed.
        for where in sorted(stored, key=lambda name: name.count(".")):
            group = stored[where]
            fmt = format_from(group["scheme"])
            rounding = activation_from(group["input"]) if "input" in group else None
            # A factor's name is known only once its parent has been opened.
            put_packed(model, names.get(where, where), fmt, rounding)
        mend_ties(model)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Experts are stored split when any is packed: nothing is to be merged then."""
        known = map_for(model.config)
        container = known.experts.container if known and known.experts else None
        if container is None or not any(container in m for m in self._modules()):
            return weight_conversions
        return [c for c in weight_conversions if not isinstance(c, WeightConverter)]

    def _modules(self) -> list[str]:
        return [name for group in self.quantization_config.groups for name in group["modules"]]

    def is_serializable(self) -> bool:
        """The packed buffers are the checkpoint: saving a loaded model writes them back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


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


def _module_names(model: Any, stored: set[str]) -> dict[str, str]:
    """Stored name -> module-side name, after splitting experts where one of them is stored."""
    known: ModelMap | None = map_for(model.config)
    if known is None:
        return {name: name for name in stored}
    experts = known.experts
    if experts is not None and any(f".{experts.container}." in name for name in stored):
        for block in model.get_submodule(known.blocks):
            split_experts(block, experts)
    full = known.expanded(dims_of(model.config))
    return {full.stored_name(name, split=True): name for name, _ in model.named_modules()}


def mend_ties(model: Any) -> None:
    """Let a tied head read a packed embedding, and forget ties of matrices that are gone."""
    embedding = model.get_input_embeddings()
    keys = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if isinstance(embedding, PackedEmbedding) and keys:
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        model.set_submodule(head, TiedHead(embedding))
        model.all_tied_weights_keys = {}
        model.config.tie_word_embeddings = False


if "rarefy" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("rarefy")(RarefyConfig)
    register_quantizer("rarefy")(RarefyQuantizer)
