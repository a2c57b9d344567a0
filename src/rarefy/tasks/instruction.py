"""Instructions: real ones with a reference answer, and composed ones that a program can check."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from rarefy.tasks.constraints import CONSTRAINTS
from rarefy.tasks.loaders import loader, row
from rarefy.tasks.matching import share, shuffled
from rarefy.tasks.sources import content

if TYPE_CHECKING:
    from rarefy.tasks.frozen import Row

_SAMPLES = "evals/registry/data/steganography/samples.jsonl"
_SETS = ("alespalla/chatbot_instruction_prompts", "akoksal/LongForm")
# Half of the source is scraps of conversations, some of them rude; an instruction of one sentence
# that begins with one of these words is none of those.
_INSTRUCTS = re.compile(
    r"(?:What|How|Why|Who|When|Where|Which|Explain|Describe|Write|List|Give|Name|Create|Suggest|"
    r"Tell|Provide|Summarize|Compare|Generate|Identify|Outline|Discuss|Please|Can you|Could you)"
    r"\b[^.?!]*[.?!]?"
)
_PROMPT_WORDS = range(4, 41)
_ANSWER_WORDS = range(8, 201)

_SUBJECTS = (
    "the sea", "a small village", "the winter", "a good breakfast", "learning to swim", "bees",
    "a long train journey", "the moon", "planting a tree", "a rainy day", "the human heart",
    "baking bread", "a public library", "mountains", "how a bicycle works", "friendship",
    "a busy market", "the colour blue", "keeping a dog", "old letters",
)  # fmt: skip
_USED = ("water", "light", "morning", "people", "green", "together", "small", "time")
_AVOIDED = ("very", "is", "and", "it")
_OPENINGS = ("Today", "Sometimes", "Imagine", "Every")
_ENDINGS = ("that is all", "and so it goes", "thank you for reading", "see you soon")
# Each asks for something that must be there; the second may forbid something as well.
_PAIRS = (
    ("include", "at_most"), ("begin", "avoid"), ("bullets", "include"), ("end", "lower_case"),
    ("include", "upper_case"), ("begin", "at_most"), ("bullets", "no_commas"), ("end", "at_least"),
)  # fmt: skip
_VALUES = {
    "at_most": ("15", "20", "30"),
    "at_least": ("15", "20", "25"),
    "include": _USED,
    "avoid": _AVOIDED,
    "bullets": ("2", "3", "4"),
    "begin": _OPENINGS,
    "end": _ENDINGS,
}


@loader("instructions", items=60)
def instructions() -> list[Row]:
    """Single-turn instructions of the chatbot and LongForm sets: ``instruction, reference``."""
    lines = content("evals", _SAMPLES).decode().split("\n")
    samples = {s["task_prompt"]: s for s in map(json.loads, filter(None, lines))}
    return [
        row({"instruction": prompt.strip(), "reference": sample["task_output"].strip()})
        for prompt, sample in samples.items()
        if sample["task_type"] in _SETS
        and _INSTRUCTS.fullmatch(prompt.strip())
        and len(prompt.split()) in _PROMPT_WORDS
        and len(sample["task_output"].split()) in _ANSWER_WORDS
        and not share(prompt, sample["task_output"])
    ]


@loader("instruction_checks", items=40)
def instruction_checks() -> list[Row]:
    """Composed instructions: ``instruction, subject, constraints`` (each ``kind`` and ``value``).

    Every subject comes up twice, with different pairs of constraints.
    """
    rows = []
    for i in range(2 * len(_SUBJECTS)):
        subject, pair = _SUBJECTS[i % len(_SUBJECTS)], _PAIRS[(i + i // len(_SUBJECTS)) % 8]
        constraints = [{"kind": kind, "value": _value(kind, subject)} for kind in pair]
        sentences = [CONSTRAINTS[c["kind"]].wording.format(value=c["value"]) for c in constraints]
        instruction = " ".join([f"Write a short text about {subject}.", *sentences])
        item = {"instruction": instruction, "constraints": constraints}
        rows.append(row(item, subject, subject=subject))
    return rows


def _value(kind: str, subject: str) -> str:
    return shuffled(subject, _VALUES[kind])[0] if kind in _VALUES else ""
