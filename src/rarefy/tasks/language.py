"""Texts that a model is to predict: the last word of a passage, or the solution of a problem.

A solution is not generated and no code is run: the bits that the right one costs tell small models
apart long before any of them could write it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.tasks.loaders import loader, row
from rarefy.tasks.sources import requests

if TYPE_CHECKING:
    from rarefy.tasks.frozen import Row


@loader("lambada", items=300)
def lambada() -> list[Row]:
    """LAMBADA: the last word of a passage of a novel, which only the whole passage gives away."""
    return [
        row({"prompt": doc["query"].rstrip(), "target": f" {doc['answers_text'][0]}"})
        for doc in requests("lambada/bpb_0shot")
    ]


@loader("gsm8k_gold", items=100)
def gsm8k_gold() -> list[Row]:
    """Word problems of primary school with their worked solutions."""
    return [
        row({"prompt": f"Question: {doc['question']}\nAnswer:", "target": f" {doc['choices'][0]}"})
        for doc in requests("gsm8k/gold_bpb_5shot")
    ]


@loader("humaneval_gold", items=100)
def humaneval_gold() -> list[Row]:
    """Python functions: signature and docstring, then the body."""
    return [
        row(_split(doc["prompt"], doc["canonical_solution"]))
        for doc in requests("codex_humaneval/gold_bpb_0shot")
    ]


@loader("mbpp_gold", items=100)
def mbpp_gold() -> list[Row]:
    """Short Python programs from one sentence and one test."""
    return [
        row(_split(f'"""\n{doc["text"]}\n{doc["test_list"][0]}\n"""\n', doc["code"]))
        for doc in requests("codex_mbpp/gold_bpb_0shot")
    ]


def _split(prompt: str, solution: str) -> dict[str, str]:
    """Prompt and target; the white space between them is predicted, so it belongs to the target."""
    start = prompt.rstrip()
    gap = prompt[len(start) :].replace("\r\n", "\n")
    return {"prompt": start, "target": gap + solution.replace("\r\n", "\n").rstrip()}
