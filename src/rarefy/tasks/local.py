"""Tasks of the user's own, from a JSONL file whose rows say by their keys what is asked.

    {"question": "...", "choices": ["...", "..."], "answer": 0}    rank the options
    {"question": "...", "answers": ["...", "..."]}                 generate, any of these is right
    {"text": "..."}                                                bits per byte

A row may name its "cluster": rows with the same one (a passage, a subject) are not independent.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rarefy.errors import RarefyError
from rarefy.tasks.base import TaskInfo
from rarefy.tasks.loaders import row
from rarefy.tasks.scorers import contains, exact_match, first_line, token_f1

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rarefy.tasks.frozen import Row

_SMOKE = 20
Text = Annotated[str, Field(min_length=1)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    cluster: str | None = None


class _Choice(_Row):
    question: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _in_range(self) -> _Choice:
        if self.answer >= len(self.choices):
            raise ValueError(f"there is no choice {self.answer}; the first one is 0")
        return self


class _Answers(_Row):
    question: Text
    answers: Annotated[list[Text], Field(min_length=1)]


class _Text(_Row):
    text: Text


_SHAPES: dict[str, type[_Row]] = {"choices": _Choice, "answers": _Answers, "text": _Text}


def local_task(path: Path) -> tuple[TaskInfo, dict[str, Any]]:
    """Make a task of a JSONL file.

    Args:
        path: one JSON object a line, all of one of the three kinds above; a row that occurs twice
            is asked once.

    Returns:
        Its facts, named ``local_`` and the file's name, and its configuration for the harness.

    Raises:
        RarefyError: the file cannot be read, is empty, or a row is malformed.
    """
    try:
        data = path.read_bytes()
        lines = data.decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RarefyError(f"the task file {path} cannot be read as UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    shape = _shape(path, numbered)
    parsed = [_parse(path, number, line, shape) for number, line in numbered]
    found = [row(one.model_dump(exclude={"cluster"}), one.cluster) for one in parsed]
    name = "local_" + re.sub(r"\W+", "_", path.stem)
    source = f"{path.name}, sha256 {hashlib.sha256(data).hexdigest()[:16]}"
    unique = list({one["id"]: one for one in found}.values())
    facts, config = _KINDS[shape]
    info = TaskInfo(name=name, title=path.stem, version=1, source=source, smoke=_SMOKE, **facts)
    common = {"task": name, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}
    return info, {**common, "custom_dataset": _dataset(unique), **config}


def _shape(path: Path, lines: list[tuple[int, str]]) -> type[_Row]:
    """Tell the kind of the rows from the keys of the first one."""
    if not lines:
        raise RarefyError(f"the task file {path} has no rows")
    for key, shape in _SHAPES.items():
        if f'"{key}"' in lines[0][1]:
            return shape
    raise RarefyError(
        f"the first row of {path} has none of the keys {', '.join(_SHAPES)}: give questions with "
        f"choices and the index of the answer, questions with answers, or texts"
    )


def _parse(path: Path, number: int, line: str, shape: type[_Row]) -> _Row:
    try:
        return shape.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the row"
        raise RarefyError(f"line {number} of {path}: {where}: {first['msg']}") from error


def _dataset(found: list[Row]) -> Callable[..., Any]:
    def load(**_: object) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(found)}

    return load


def _answered(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    output = first_line(results[0])
    return {
        "contains": contains(output, doc["answers"]),
        "exact_match": exact_match(output, doc["answers"]),
        "f1": token_f1(output, doc["answers"]),
    }


def _means(*names: str) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names]


_QUESTION = "Question: {{question}}\nAnswer:"
_KINDS: dict[type[_Row], tuple[dict[str, Any], dict[str, Any]]] = {
    _Choice: (
        {"family": "choice", "kind": "choice", "metric": "acc_norm"},
        {
            "output_type": "multiple_choice",
            "doc_to_text": _QUESTION,
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": _means("acc", "acc_norm"),
        },
    ),
    _Answers: (
        {"family": "factoid", "kind": "generate", "metric": "contains"},
        {
            "output_type": "generate_until",
            "doc_to_text": _QUESTION,
            "doc_to_target": "{{answers[0]}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 32},
            "process_results": _answered,
            "metric_list": _means("contains", "exact_match", "f1"),
        },
    ),
    _Text: (
        {"family": "language", "kind": "bits", "metric": "bits_per_byte", "higher": False},
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {
                    "metric": "bits_per_byte",
                    "aggregation": "bits_per_byte",
                    "higher_is_better": False,
                }
            ],
        },
    ),
}
