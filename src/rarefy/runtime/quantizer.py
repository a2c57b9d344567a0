"""The quantizer behind ``quant_method: "rarefy"``.

It replaces modules on the meta device by packed ones whose buffers carry the checkpoint's names,
and leaves loading to transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer

from rarefy.errors import RarefyError
from rarefy.maps.catalogue import map_for
from rarefy.maps.experts import split_experts
from rarefy.maps.model_map import dims_of
from rarefy.maps.units import narrow
from rarefy.recipe import activation_from, format_from
from rarefy.runtime.container import VERSION
from rarefy.runtime.placing import mend_ties, put_packed

if TYPE_CHECKING:
    from rarefy.maps.model_map import ModelMap


class RarefyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules in place of dense ones before the weights are read."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse containers of a later version.

        Raises:
            RarefyError: the folder was written by a newer rarefy.
        """
        if self.quantization_config.version > VERSION:
            raise RarefyError(
                f"this model is stored in version {self.quantization_config.version} of rarefy's "
                f"container and this rarefy reads up to {VERSION}; upgrade rarefy"
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
