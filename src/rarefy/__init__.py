"""rarefy makes dense language models less dense, and tells the truth about the damage.

    import rarefy

    rarefy.compress("demo", "gptq-int4-g64", "out/demo-4bit")
    rarefy.evaluate("out/demo-4bit", against="demo").quality.kl_mean

Importing the package teaches transformers to open folders that rarefy made. The verbs are imported
when they are first used, so that importing the package costs next to nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rarefy.errors import RarefyError
from rarefy.runtime import plugin

if TYPE_CHECKING:
    from rarefy.engine.compress import Calibration, compress
    from rarefy.evaluate.run import evaluate
    from rarefy.export.export import export
    from rarefy.kick.run import kick
    from rarefy.methods import methods
    from rarefy.plan import plan
    from rarefy.report.compare import comparison_rows as compare
    from rarefy.synthesis.engine import synthesize

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "RarefyError",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "export",
    "kick",
    "methods",
    "plan",
    "synthesize",
]

_VERBS = {
    "Calibration": ("rarefy.engine.compress", "Calibration"),
    "compare": ("rarefy.report.compare", "comparison_rows"),
    "compress": ("rarefy.engine.compress", "compress"),
    "evaluate": ("rarefy.evaluate.run", "evaluate"),
    "export": ("rarefy.export.export", "export"),
    "kick": ("rarefy.kick.run", "kick"),
    "methods": ("rarefy.methods", "methods"),
    "plan": ("rarefy.plan", "plan"),
    "synthesize": ("rarefy.synthesis.engine", "synthesize"),
}


class _Package(ModuleType):
    """Imports a verb when it is asked for, and keeps its name for it.

    Some verbs share their name with a subpackage or a module (``rarefy.evaluate``,
    ``rarefy.plan``), which importing the latter would otherwise put in their place.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _VERBS:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, attribute = _VERBS[name]
        found = getattr(import_module(module), attribute)
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_VERBS})


sys.modules[__name__].__class__ = _Package
plugin.register()
