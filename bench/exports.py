"""Every export, opened by its real reader, beside what we compute; K-quants beside llama.cpp's own.

    python bench/exports.py [--peer-venv DIR] [--only gguf,folders] [--out FILE.json]

 * GGUF is read by llama-cpp-python, in an environment of its own: logits and perplexity on the same
   tokens as ours. llama.cpp rounds activations to 8 bits, we do not, so a small distance remains;
   "ours" are the same file's weights, dequantized, in float32.
 * llama.cpp quantizes the same float16 file itself, with the same importance matrix.
 * compressed-tensors and dense folders are read by stock transformers, without rarefy.
 * GPTQ and AWQ folders are decoded by the rules of the layout, written down here once more, because
   GPTQModel is a source package that compiles for GPUs; every weight must be equal.

The weights of the default model ("demo") come from a published Q4_1 file: in that type alone every
encoder meets the very grid that they lie on, so Q4_1's KL says nothing, and it is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OUT, ROOT, Criterion, close, machine, run_child, show
from gguf import GGUFReader
from layouts import decoded_alike
from transformers import AutoModelForCausalLM

import rarefy
from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora
from rarefy.data.tokens import held_out
from rarefy.export.imatrix import read_imatrix
from rarefy.formats.activation import IntActivation
from rarefy.runtime.packed import PackedLinear
from rarefy.runtime.stored import stored_model

LLAMA = "llama-cpp-python==0.3.36"
STOCK = Path(__file__).with_name("stock_child.py")
CHILD = Path(__file__).with_name("exports_child.py")
OURS = (
    "F16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_0",
    "IQ4_NL",
    "Q3_K_M",
    "Q2_K",
)
PEER = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
SOLVED = ("gptq-q4_0", "gptq-iq4_nl")
NEAR = 1e-5
HALF = 2**-11  # a weight rounded to float16, as the reader of W4A16 does
READER = 0.02  # KL between llama.cpp and the same weights in float32: its 8-bit activations


def main() -> None:
    """Export, read, compare, judge."""
    options = _options()
    work = options.work or Path(tempfile.mkdtemp(prefix="rarefy-exports-"))
    work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"bench": "exports", "machine": machine(0), "model": options.model}
    bench = Bench(options, work)
    report["windows"] = bench.windows.ids.shape
    criteria: list[Criterion] = []
    if "folders" in options.only:
        report["folders"] = bench.folders()
        criteria += [
            Criterion(f"{row['name']}: {row['what']}", row["value"], row["limit"], row["met"])
            for row in report["folders"]
        ]
    if "gguf" in options.only:
        report |= bench.gguf()
        criteria += judge(report["gguf"])
    close(options.out, report, criteria)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--peer-venv", type=Path, default=ROOT / ".llama-venv")
    parser.add_argument("--calibration", default="web")
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 512), metavar=("N", "L"))
    parser.add_argument("--only", type=lambda text: text.split(","), default=["folders", "gguf"])
    parser.add_argument("--types", type=lambda text: text.split(","), default=list(OURS))
    parser.add_argument("--solved", type=lambda text: text.split(","), default=list(SOLVED))
    parser.add_argument("--work", type=Path, help="folder for the results (default: temporary)")
    parser.add_argument("--out", type=Path, default=OUT / "exports.json")
    return parser.parse_args()


class Bench:
    """The exports and what they are read with."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.source = resolve(options.model)
        self.tokenizer = load_tokenizer(self.source)
        corpus = corpora.load("wiki", self.tokenizer)
        self.windows = held_out(corpus, self.tokenizer, *options.windows)
        self.dense = work / "dense.npy"
        self.store(load_model(self.source), self.dense)

    @torch.inference_mode()
    def store(self, model: Any, file: Path) -> Path:
        """A model's logits over all windows, float32 [N, L - 1, V]."""
        rows = [model(input_ids=ids[None]).logits[0, :-1].float() for ids in self.windows.ids]
        np.save(file, torch.stack(rows).numpy())
        return file

    def compress(self, recipe: str) -> Path:
        """The model compressed by a recipe."""
        data = rarefy.Calibration(self.options.calibration)
        return rarefy.compress(
            self.options.model, recipe, self.work / recipe, calibration=data
        ).path

    # GGUF

    def gguf(self) -> dict[str, Any]:
        """Every type of ours and of llama.cpp's, each read by llama.cpp."""
        rows, base, measured = [], None, self.work / "imatrix.gguf"
        for name in dict.fromkeys(("F16", *self.options.types)):  # F16 is what llama.cpp quantizes
            file = self.work / f"ours-{name}.gguf"
            weighs = measured if measured.is_file() else self.options.calibration
            rarefy.export(
                self.options.model, file, format="gguf", type=name,
                imatrix=None if name == "F16" else weighs,
            )  # fmt: skip
            if (made := file.with_suffix(".imatrix.gguf")).is_file():
                made.replace(measured)
            base = base or file
            rows.append(self.row("rarefy", name, file, beside=True))
        for recipe in self.options.solved:
            file = self.work / f"{recipe}.gguf"
            rarefy.export(self.compress(recipe), file, format="gguf", embedding="Q8_0")
            rows.append(self.row("rarefy", recipe, file, beside=True))
        assert base is not None
        means = self.work / "imatrix.npz"
        np.savez(means, **{name: mean.numpy() for name, mean in read_imatrix(measured).items()})
        for name in (name for name in PEER if name in self.options.types):
            for imatrix in (str(means), None):
                file = self.work / f"llama-{name}-{'i' if imatrix else 'plain'}.gguf"
                job = {"source": str(base), "out": str(file), "type": name, "imatrix": imatrix}
                made = self.ask("quantize", job)
                if made["status"] or bool(imatrix) != made["imatrix"]:
                    continue  # a type that it refuses without importance, or an older interface
                rows.append(self.row("llama.cpp" + (" imatrix" if imatrix else ""), name, file))
        version = self.ask("version", {})
        show(
            "GGUF, read by llama.cpp",
            ("who", "type", "MB", "KL to dense", "agreement", "perplexity", "KL reader to ours"),
            [(r["who"], r["type"], r["bytes"] / 1e6, r["dense"]["kl"], r["dense"]["agreement"],
              r["perplexity"], r.get("ours", {}).get("kl", "")) for r in rows],
        )  # fmt: skip
        return {"gguf": rows, "llama": version}

    def row(self, who: str, name: str, file: Path, *, beside: bool = False) -> dict[str, Any]:
        """Read a file by llama.cpp and, if asked, by ourselves."""
        against = {"dense": str(self.dense)}
        if beside:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            against["ours"] = str(self.store(model.eval(), self.work / "ours.npy"))
        read = self.ask("read", {"model": str(file), "ids": self.ids, "against": against})
        expected = self.tokenizer(read["text"], add_special_tokens=False)["input_ids"]
        kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors if len(t.shape) > 1}
        counts = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
        return {
            "who": who, "type": name, "bytes": file.stat().st_size, "tensors": counts,
            "perplexity": read["perplexity"], "same_tokens": read["tokens"] == expected,
        } | read["against"]  # fmt: skip

    @property
    def ids(self) -> list[list[int]]:
        """The windows as plain lists."""
        found: list[list[int]] = self.windows.ids.tolist()
        return found

    def ask(self, do: str, job: dict[str, Any]) -> dict[str, Any]:
        """Let llama.cpp's environment do something."""
        order, answer = self.work / "order.json", self.work / "answer.json"
        order.write_text(json.dumps({"do": do} | job))
        run_child([self.python(), CHILD, order, answer], self.work / f"llama-{do}.log")
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def python(self) -> Path:
        """The interpreter of llama.cpp's environment, which is made if it is missing."""
        venv = self.options.peer_venv
        python: Path = venv / "bin" / "python"
        if not python.exists():
            print(f"making {venv}: llama.cpp is compiled, which takes a quarter of an hour")
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", LLAMA], check=True)
        return python

    # Folders

    def folders(self) -> list[dict[str, Any]]:
        """GPTQ and AWQ weight by weight, the others by stock transformers' logits."""
        packed = self.compress("gptq-int4-g64")
        rows = []
        for form in ("gptq", "awq"):
            folder = rarefy.export(packed, self.work / form, format=form)
            equal, count = decoded_alike(packed, folder, form)
            rows.append(_found(form, f"equal matrices of {count}", equal, "all", equal == count))
        rounded = self.compress("rtn-w8a8")
        for name, ours, folder in (
            ("dense", packed, rarefy.export(packed, self.work / "plain", dtype="float32")),
            ("W4A16 pack-quantized", packed, packed),
            ("W8A8 int-quantized", rounded, self._other(rounded, None)),
            ("FP8 float-quantized", self.source, self._other(self.source, "FP8")),
        ):
            short = name.split()[0]
            kl, own, apart = self._stock(ours, folder)
            if short == "FP8":
                rows.append(
                    _found(name, "KL of stock transformers to dense", kl, "<= 0.1", kl <= 0.1)
                )
                continue
            what = "largest difference of a linear's output in stock transformers from ours"
            near = HALF if short == "W4A16" else NEAR
            rows.append(_found(name, what, apart, f"<= {near:.1e}", apart <= near))
            what, limit = "KL of stock transformers to ours", NEAR
            if short == "W8A8":  # see ReadersRule
                what, limit = f"{what}, of which independent errors make", 2 * own
            rows.append(_found(name, what, kl, f"<= {limit:.2g}", kl <= limit))
        return rows

    def _other(self, source: Path, kind: str | None) -> Path:
        out = self.work / f"ct-{kind or 'W8A8'}"
        return rarefy.export(source, out, format="compressed-tensors", type=kind)

    def _stock(self, ours: Path, folder: Path) -> tuple[float, float, float]:
        """Stock transformers beside ours.

        Returns:
            KL of its logits to ours, of ours to the dense model's, and the largest relative
            difference of what one of the blocks' linears gives for the same input.
        """
        model = stored_model(ours, torch.float32).eval()
        for module in model.modules():
            if isinstance(module, PackedLinear) and module.rounding is not None:
                module.round_by(ReadersRule())
        probes = {
            name: torch.randn(1, 4, module.weight.shape[1])
            for name, module in model.named_modules()
            if name.startswith("model.layers.") and hasattr(module, "weight")
            if len(module.weight.shape) == 2
        }
        np.savez(self.work / "probes.npz", **{name: x.numpy() for name, x in probes.items()})
        mine = np.load(self.store(model, self.work / "mine.npy"), mmap_mode="r")
        order, answer = self.work / "stock.json", self.work / "stock.npy"
        order.write_text(
            json.dumps(
                {"model": str(folder), "ids": self.ids, "probes": str(self.work / "probes.npz")}
            )
        )
        run_child([sys.executable, STOCK, order, answer], self.work / "stock.log")
        dense, theirs = (np.load(file, mmap_mode="r") for file in (self.dense, answer))
        given = np.load(answer.with_suffix(".npz"))
        with torch.inference_mode():
            apart = max(
                float((model.get_submodule(name)(x) - (y := torch.from_numpy(given[name]))).norm())
                / float(y.norm())
                for name, x in probes.items()
            )
        return _kl(mine, theirs), _kl(dense, mine), apart


class ReadersRule(IntActivation):
    """int8 as compressed-tensors rounds: the scale is the largest value over 127.5, not over 127.

    With the same rule and the same input a linear gives the same on both sides. Over a whole model
    the last bit of a sum decides some codes, those decide more in the next block, and in the end
    both sides have an error of the same size but not the same one.
    """

    def _dynamic(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(-1, keepdim=True) / 127.5


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p || q) over all positions."""
    parts = []
    for a, b in zip(p, q, strict=True):
        P, Q = (torch.from_numpy(np.array(x)).log_softmax(-1) for x in (a, b))
        parts.append(float((P.exp() * (P - Q)).sum(-1).mean()))
    return float(np.mean(parts))


def _found(name: str, what: str, value: float, limit: str, met: bool) -> dict[str, Any]:
    return {"name": name, "what": what, "value": value, "limit": limit, "met": met}


def judge(rows: list[dict[str, Any]]) -> list[Criterion]:
    """Readers agree; not above llama.cpp's KL at its sizes."""
    criteria = [
        Criterion("tokens as ours in every file", all(r["same_tokens"] for r in rows), "true",
                  all(r["same_tokens"] for r in rows))
    ]  # fmt: skip
    for row in rows:
        if "ours" in row:
            kl = row["ours"]["kl"]
            name = f"{row['type']}: KL of llama.cpp to our arithmetic"
            criteria.append(Criterion(name, kl, f"<= {READER}", kl <= READER))
    mine = [r for r in rows if r["who"] == "rarefy"]
    for row in rows:
        if row["who"] == "rarefy":
            continue
        same = next(r["dense"]["kl"] for r in mine if r["type"] == row["type"])
        limit = row["dense"]["kl"]
        where = f"{row['who']} {row['type']}"
        criteria.append(
            Criterion(f"{row['type']}: KL, against {where}", same, f"<= {limit:.4f}", same <= limit)
        )
        fits = [r["dense"]["kl"] for r in mine if r["bytes"] <= row["bytes"] * 1.001]
        best = min(fits, default=float("inf"))
        name = f"best file not larger than {where} ({row['bytes'] / 1e6:.0f} MB)"
        criteria.append(Criterion(name, best, f"<= {limit:.4f}", best <= limit, goal=True))
    return criteria


if __name__ == "__main__":
    main()
