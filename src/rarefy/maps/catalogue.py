"""All written maps, found by scanning this package: adding a family is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

import rarefy.maps

if TYPE_CHECKING:
    from rarefy.maps.model_map import ModelMap


@cache
def _maps() -> tuple[ModelMap, ...]:
    names = [m.name for m in pkgutil.iter_modules(rarefy.maps.__path__, "rarefy.maps.")]
    modules = [importlib.import_module(name) for name in sorted(names)]
    return tuple(m for module in modules for m in getattr(module, "MAPS", ()))


def map_for(config: Any) -> ModelMap | None:
    """Return the map that describes a model, by its config.

    Args:
        config: a transformers config; ``model_type`` names the family.

    Returns:
        The first map of the family whose ``when`` holds, or None: then ``discover`` may serve.
    """
    return next((m for m in _maps() if m.family == config.model_type and _holds(m, config)), None)


def _holds(model_map: ModelMap, config: Any) -> bool:
    return all(getattr(config, field, None) == value for field, value in model_map.when)


def supported() -> tuple[str, ...]:
    """Return the families (config ``model_type``) that have a written map, sorted."""
    return tuple(sorted({m.family for m in _maps()}))
