"""Open a checkpoint folder as a transformers model, for evaluation and chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rarefy.runtime.plugin  # noqa: F401  (registers our quantizer with transformers)

if TYPE_CHECKING:
    from pathlib import Path


def default_device() -> torch.device:
    """The accelerator that torch reports, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def load_model(path: Path, device: torch.device | None = None) -> Any:
    """Load a dense or compressed folder in fp32, ready for inference."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device or default_device()).eval()


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer that travels with a checkpoint."""
    return AutoTokenizer.from_pretrained(path)
