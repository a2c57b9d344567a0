"""Importing this keeps transformers from taking bench/kernels.py for the package ``kernels``.

It asks for an optional package of that name, and a script's folder is searched first.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
