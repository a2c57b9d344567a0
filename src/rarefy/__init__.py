"""rarefy makes dense language models less dense, and tells the truth about the damage.

    import rarefy

    rarefy.compress("demo", "gptq-int4-g64", "out/demo-4bit")
    rarefy.evaluate("out/demo-4bit", against="demo").quality.kl_mean

Importing the package teaches transformers to open folders that rarefy made.
"""

__version__ = "0.1.0"

# The verbs are bound here, at once: some share their name with a subpackage (``rarefy.evaluate``,
# ``rarefy.export``), which a later import of the subpackage would otherwise put in their place.
import rarefy.runtime.plugin  # noqa: F401  (registers the quantizer)
from rarefy.engine.compress import Calibration, compress
from rarefy.errors import RarefyError
from rarefy.evaluate.run import evaluate
from rarefy.export.export import export
from rarefy.kick.run import kick
from rarefy.methods import methods
from rarefy.plan import plan
from rarefy.report.compare import comparison_rows as compare
from rarefy.synthesis.engine import synthesize

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
