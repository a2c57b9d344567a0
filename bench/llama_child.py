"""One measurement of llama.cpp through llama-cpp-python, in that library's own environment.

    python llama_child.py JOB.json ANSWER.json

The job names the .gguf file, the prompt's token ids, how many tokens to make, threads and runs.
Tokens are taken greedily from the logits of each step, as in the other engines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    """Load, warm up, time, write the answer."""
    job = json.loads(Path(sys.argv[1]).read_text())
    prompt, new = job["prompt"], job["new_tokens"]
    model = llama_cpp.Llama(
        model_path=job["file"], n_ctx=len(prompt) + new + 8, n_batch=512, verbose=False,
        n_threads=job["threads"], n_threads_batch=job["threads"],
    )  # fmt: skip
    vocabulary = model.n_vocab()

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def run() -> tuple[float, float, list[int]]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        tokens = [best()]
        first = time.perf_counter()
        for _ in range(new - 1):
            model.eval(tokens[-1:])
            tokens.append(best())
        return first - start, time.perf_counter() - first, tokens

    run()
    runs = [run() for _ in range(job["runs"])]
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    answer = {
        "version": llama_cpp.__version__,
        "ttft_runs": [first for first, _, _ in runs],
        "decode_runs": [(new - 1) / rest for _, rest, _ in runs],
        "tokens": runs[0][2],
        "peak_bytes": peak,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
