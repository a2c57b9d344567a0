"""Logits of a folder in stock transformers: python stock_child.py ORDER.json ANSWER.npy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
with torch.inference_mode():
    rows = [model(input_ids=torch.tensor([ids])).logits[0, :-1].float() for ids in job["ids"]]
np.save(sys.argv[2], torch.stack(rows).numpy())
assert "rarefy" not in sys.modules
