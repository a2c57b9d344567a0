"""Do the signals of AlphaPruning and OWL know which blocks can give up weights?

    python bench/allocation.py [--model demo] [--sparsity 0.7] [--out FILE.json]

Each block is pruned by itself (Wanda, uniform) and the KL to the dense model is read on held-out
text: that is what the block really loses. Beside it stand the densities that the allocators give
the blocks. A signal that serves this model ranks fragile blocks first, so the rank correlation of
density with loss should be positive; its interval is over random orders of the blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import OUT, Criterion, close, machine, show
from scipy.stats import permutation_test, spearmanr

from rarefy.allocate.alphapruning import AlphaPruning
from rarefy.allocate.base import Matrix, Share
from rarefy.allocate.owl import OWL
from rarefy.checkpoint.load import load_model, load_tokenizer
from rarefy.checkpoint.resolve import resolve
from rarefy.data import corpora, tokens
from rarefy.evaluate.distances import compare_logits
from rarefy.formats.sparse import Sparse
from rarefy.maps.catalogue import map_for
from rarefy.solvers.base import Problem
from rarefy.solvers.wanda import Wanda
from rarefy.statistics import Collector

ALLOCATORS = {"alphapruning": AlphaPruning(), "owl": OWL()}


def main() -> None:
    """Measure every block, correlate, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--windows", type=int, nargs=2, default=(8, 512), metavar=("N", "L"))
    parser.add_argument("--out", type=Path, default=OUT / "allocation.json")
    options = parser.parse_args()
    losses, densities = measure(options)
    rows, criteria = [], []
    for name, density in densities.items():
        test = permutation_test(
            (losses,), lambda x, d=density: spearmanr(x, d).statistic,
            permutation_type="pairings", n_resamples=9999, rng=0,
        )  # fmt: skip
        rows.append((name, f"{test.statistic:.2f}", f"{test.pvalue:.3f}"))
        value = float(test.statistic)
        criteria.append(Criterion(f"{name}: fragile blocks keep more", value, "> 0", value > 0))
    show("Density against what the block loses", ["allocator", "rank correlation", "p"], rows)
    report: dict[str, Any] = {
        "bench": "allocation", "machine": machine(0), "sparsity": options.sparsity,
        "kl_of_one_block": losses, "density": densities,
    }  # fmt: skip
    close(options.out, report, criteria)


@torch.no_grad()
def measure(options: argparse.Namespace) -> tuple[list[float], dict[str, list[float]]]:
    """KL of pruning each block alone, and each allocator's density of each block."""
    source = resolve(options.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    known = map_for(model.config)
    assert known is not None
    blocks = model.get_submodule(known.blocks)
    paths = [node.path for node in known.linears]
    held = tokens.held_out(corpora.load("wiki"), tokenizer, *options.windows).ids
    seen = [{path: collector(block.get_submodule(path)) for path in paths} for block in blocks]
    for row in tokens.calibration(corpora.load("web"), tokenizer, 16, 512, 0).ids:
        model(input_ids=row[None])
    problems = [
        {
            path: Problem(
                path, block.get_submodule(path).weight.clone(), moments=found[path].result()[1]
            )
            for path in paths
        }
        for block, found in zip(blocks, seen, strict=True)
    ]
    for block in blocks:
        for path in paths:
            block.get_submodule(path)._forward_pre_hooks.clear()
    dense = [model(input_ids=row[None]).logits[0, :-1] for row in held]
    losses = []
    for block, matrices in zip(blocks, problems, strict=True):
        for path, problem in matrices.items():
            pruned = Wanda().solve(problem, Sparse(options.sparsity)).weight
            block.get_submodule(path).weight.copy_(pruned)
        parts = [
            compare_logits(p, model(input_ids=row[None]).logits[0, :-1], row[1:]).kl
            for p, row in zip(dense, held, strict=True)
        ]
        losses.append(float(torch.cat(parts).mean()))
        for path, problem in matrices.items():
            block.get_submodule(path).weight.copy_(problem.weight)
    return losses, {name: densities(problems, one, options) for name, one in ALLOCATORS.items()}


def collector(linear: torch.nn.Module) -> Collector:
    """Moments of a linear's input, collected whenever the model runs."""
    found = Collector(frozenset({"moments"}), linear.weight.shape[1], linear.weight.device)
    linear.register_forward_pre_hook(lambda _, args: found.add(args[0]))
    return found


def densities(
    problems: list[dict[str, Problem]], allocator: Any, options: argparse.Namespace
) -> list[float]:
    """The density that an allocator gives each block at the sparsity asked for."""
    measures = [
        allocator.measure({path: Matrix(p.weight, p.moments) for path, p in block.items()})
        for block in problems
    ]
    shares = [
        {path: Share(*p.weight.shape, 1 - options.sparsity) for path, p in block.items()}
        for block in problems
    ]
    return [next(iter(row.values())) for row in allocator.spread(measures, shares)]


if __name__ == "__main__":
    main()
