"""What runs in llama.cpp's environment: quantize a file, and compare its logits with others.

    python exports_child.py ORDER.json ANSWER.json

Orders: {"do": "version"}, {"do": "quantize", "source", "out", "type", "imatrix"}, or {"do": "read",
"model", "ids", "against": {name: .npy of float32 [N, L - 1, V]}}.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

THREADS = 2
TEXT = "It costs 1,234.50 dollars in 2026,\n and don't forget naïve café tests!"


def main() -> None:
    """Do what the order says."""
    order, answer = (Path(word) for word in sys.argv[1:])
    job = json.loads(order.read_text())
    found = {"version": version, "quantize": quantize, "read": read}[job.pop("do")](**job)
    answer.write_text(json.dumps(found))


def version() -> dict[str, Any]:
    """Of the package, and what it was built for."""
    info = llama_cpp.llama_print_system_info().decode()
    return {"llama-cpp-python": llama_cpp.__version__, "system": info}


def quantize(source: str, out: str, type: str, imatrix: str | None) -> dict[str, Any]:
    """llama.cpp's own quantization; says whether it took the importance matrix."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}")
    params.nthread = THREADS
    kept = attach(params, imatrix) if imatrix else None
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    size = Path(out).stat().st_size if not status else 0
    return {"status": int(status), "bytes": size, "imatrix": bool(kept)}


def attach(params: Any, file: str) -> list[Any] | None:
    """Give an importance matrix, an .npz of means by tensor; None where C++ objects are wanted."""
    if not hasattr(llama_cpp, "llama_model_imatrix_data"):
        return None
    arrays = {name: np.ascontiguousarray(mean, np.float32) for name, mean in np.load(file).items()}
    rows = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one ends the list
    for row, (name, array) in zip(rows, arrays.items(), strict=False):
        row.name, row.size = name.encode(), array.size
        row.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = rows
    return [rows, arrays]


def read(model: str, ids: list[list[int]], against: dict[str, str]) -> dict[str, Any]:
    """Perplexity, and KL and agreement against stored logits, over windows of token ids."""
    length = len(ids[0])
    llama = llama_cpp.Llama(
        model_path=model, n_ctx=length, n_batch=length, n_threads=THREADS, n_threads_batch=THREADS,
        logits_all=True, verbose=False,
    )  # fmt: skip
    stored = {name: np.load(file, mmap_mode="r") for name, file in against.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in stored}
    losses = []
    for number, window in enumerate(ids):
        llama.reset()
        llama.eval(window)
        mine = log_softmax(llama.scores[: length - 1])
        losses.append(-mine[np.arange(length - 1), window[1:]].mean())
        for name, logits in stored.items():
            found[name].append(distances(log_softmax(logits[number]), mine))
    return {
        "perplexity": float(np.exp(np.mean(losses))),
        "tokens": llama.tokenize(TEXT.encode(), add_bos=False),
        "text": TEXT,
        "against": {name: average(parts) for name, parts in found.items()},
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats, float32."""
    logits = logits.astype(np.float32)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) and top-1 agreement, means over positions."""
    kl = (np.exp(p) * (p - q)).sum(-1)
    return np.array([kl.mean(), (p.argmax(-1) == q.argmax(-1)).mean()])


def average(parts: list[np.ndarray]) -> dict[str, float]:
    """The means over windows, by name."""
    kl, same = np.mean(parts, axis=0)
    return {"kl": float(kl), "agreement": float(same)}


if __name__ == "__main__":
    main()
