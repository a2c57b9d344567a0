"""Perplexities in plain transformers and peft: python finetune_child.py ORDER.json ANSWER.json."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
windows = torch.tensor(job["windows"])
answer = {"perplexity": {}}
for name, (folder, adapter) in job["models"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        moved = [m for m in layers if m.lora_B["default"].weight.abs().sum() > 0]
        with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as stored:
            answer |= {"pairs": len(list(stored.keys())) // 2, "placed": len(moved)}
    model.eval()
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    answer["perplexity"][name] = math.exp(sum(losses) / len(losses))
Path(sys.argv[2]).write_text(json.dumps(answer))
assert "rarefy" not in sys.modules
