"""One compression in a fresh process: time of the call, peak memory, and where the peak was.

    python bench/compress_child.py JOB.json ANSWER.json

The job holds model, recipe, out, text, sequences, length, seed, and optionally sample (seconds
between two looks at the memory; absent: none, which leaves the timing undisturbed).
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes.

    Not getrusage: its peak also counts the parent's memory at the moment of the start.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


class Sampler(threading.Thread):
    """Looks at the resident memory and keeps the call stack of the largest value."""

    def __init__(self, interval: float) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.main = threading.get_ident()
        self.by_place: dict[str, int] = {}

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            now = memory("VmRSS")
            frame = sys._current_frames().get(self.main)
            stack = traceback.extract_stack(frame) if frame else []
            places = [
                f"{Path(f.filename).name}:{f.lineno} {f.name}"
                for f in stack
                if "rarefy" in Path(f.filename).parts
            ]
            place = " > ".join(places[-3:]) or "imports and start"
            self.by_place[place] = max(now, self.by_place.get(place, 0))
            time.sleep(self.interval)


def main() -> None:
    """Do the job and write the answer."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    import rarefy
    from rarefy.engine.stage import Watcher

    answer: dict[str, Any] = {"after_import_bytes": memory("VmHWM"), "peak_by_block": []}
    sampler = Sampler(job.get("sample", 1.0))
    if "sample" in job:
        sampler.start()

    def note(done: int, total: int) -> None:
        answer["peak_by_block"].append(memory("VmHWM"))

    data = rarefy.Calibration(job["text"], job["sequences"], job["length"], job["seed"])
    start = time.perf_counter()
    result = rarefy.compress(
        job["model"], job["recipe"], job["out"], calibration=data, watcher=Watcher(print, note)
    )
    answer["seconds"] = time.perf_counter() - start
    answer["peak_bytes"] = memory("VmHWM")
    calibration = result.manifest["calibration"]
    answer["tokens_sha256"] = calibration and calibration["sha256"]
    answer["phases"] = result.manifest["timings"]
    ranked = sorted(sampler.by_place.items(), key=lambda item: -item[1])[:12]
    answer["largest_at"] = [{"bytes": size, "at": place} for place, size in ranked]
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
