"""Logits of a folder in stock transformers: python stock_child.py ORDER.json ANSWER.npy.

Beside them, as ANSWER.npz, what every linear of the blocks gives for one random input.
"""

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
    probes = {
        name: model.get_submodule(name)(torch.tensor(x)).numpy()
        for name, x in np.load(job["probes"]).items()
    }
np.save(sys.argv[2], torch.stack(rows).numpy())
np.savez(Path(sys.argv[2]).with_suffix(".npz"), **probes)
assert "rarefy" not in sys.modules
