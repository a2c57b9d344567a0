"""Open a checkpoint folder as a transformers model, for evaluation and chat.

transformers' classes are imported when they are used: the native decoder does without them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

_GENERAL = "TokenizersBackend"


def default_device() -> torch.device:
    """The accelerator that torch reports, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def load_model(path: Path, device: torch.device | None = None) -> Any:
    """Load a dense or compressed folder in fp32, ready for inference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device or default_device()).eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer that travels with a checkpoint.

    ``AutoTokenizer`` also reads the model's config, whose class takes seconds to import; a folder
    that names transformers' general class needs no such look.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = path / "tokenizer_config.json"
    named = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    cls = PreTrainedTokenizerFast if named == _GENERAL else AutoTokenizer
    return cls.from_pretrained(path)
