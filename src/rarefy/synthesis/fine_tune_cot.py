"""Fine-tune-CoT: a student learns from many different rationales that led to the right answer.

Paper: Ho, Schmid, Yun, *Large Language Models Are Reasoning Teachers*, ACL 2023, arXiv 2212.10071.

    call (i)    Q: {q}\\nA: Let's think step by step.               -> rationale, D samples
    call (ii)   {call (i)}{rationale}\\nTherefore, the answer is    -> answer
    row         "{q} ###" -> " {rationale} --> {gold} END"

A sample is kept if the first candidate in the answer is right; the row then carries the gold
string, not the teacher's wording. D = 1 is greedy, more samples are drawn at temperature 0.7.

The control of the paper is plain fine-tuning on answers, ``rationale = false``: "{q} ###" ->
" {gold} END", with no call at all. Small students often gain less from rationales than from it, so
it belongs beside every result.

Where we differ, and why: a rationale that was cut is never kept (it would teach to stop in the
middle of a thought), nor one that holds a mark of the row format (the mark would no longer tell
where the answer begins), nor a cut answer that might go on ("18" of "1834").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rarefy.synthesis.answers import Extractor, Kind, Reason
from rarefy.synthesis.base import SYNTHESIZERS, Desk, Provenance, Row, Synthesizer, counts
from rarefy.teachers.base import Answer, Ask, Sampling, Teacher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rarefy.synthesis.questions import Question

THINK = "Q: {question}\nA: Let's think step by step."
CONCLUDE = "{prompt}{rationale}\nTherefore, the answer is"
BEGIN, MARKER, END = "###", "-->", "END"
_DIVERSE = 0.7


@SYNTHESIZERS.register(
    "fine-tune-cot",
    family="distillation",
    paper="Ho et al., Large Language Models Are Reasoning Teachers, ACL 2023",
    arxiv="2212.10071",
)
@dataclass(frozen=True)
class FineTuneCoT(Synthesizer):
    """Rationales with right answers.

    Attributes:
        samples: D, rationales asked for each question.
        temperature: of both calls; None for 0 if D = 1 and 0.7 otherwise, as published.
        max_tokens: of each answer of the teacher.
        kind: what answers are: number, letter, yes-no or text.
        tolerance: largest difference of two equal numbers.
        rationale: False for the control without rationales.

    Raises:
        ValueError: an option out of range.
    """

    samples: int = 1
    temperature: float | None = None
    max_tokens: int = 128
    kind: Kind = "number"
    tolerance: float = 1e-6
    rationale: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1:
            raise ValueError(
                f"samples and max_tokens must be at least 1, not {self.samples} and "
                f"{self.max_tokens}"
            )
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples at temperature 0 are all the same: use 1, or a temperature")
        Extractor(self.kind, self.tolerance)

    def check(self, questions: Sequence[Question], teacher: Teacher) -> None:
        """Refuse right answers that no answer could agree with."""
        for question in questions:
            Extractor(self.kind, self.tolerance).check_gold(question.id, question.answer)

    def rows(self, questions: Sequence[Question], desk: Desk) -> Iterator[Row]:
        """All rationales first, then all answers: both can be asked many at a time."""
        if not self.rationale:
            yield from (_control(question) for question in questions)
            return
        tries = [(question, sample) for question in questions for sample in range(self.samples)]
        how = self._sampling(desk.seed)
        asks = [Ask(THINK.format(question=q.text), how, sample) for q, sample in tries]
        thoughts = desk.ask(asks, "rationales")
        ends = [
            Ask(CONCLUDE.format(prompt=ask.prompt, rationale=said.text), how, ask.sample)
            for ask, said in zip(asks, thoughts, strict=True)
        ]
        answers = desk.ask(ends, "answers")
        for i, (question, sample) in enumerate(tries):
            source = Provenance(
                question.id,
                sample,
                desk.teacher.name,
                (desk.digest(asks[i].prompt), desk.digest(ends[i].prompt)),
                (thoughts[i].finish_reason, answers[i].finish_reason),
            )
            yield self._row(question, thoughts[i], answers[i], source)

    def _sampling(self, seed: int) -> Sampling:
        default = 0.0 if self.samples == 1 else _DIVERSE
        temperature = default if self.temperature is None else self.temperature
        return Sampling(temperature, max_tokens=self.max_tokens, stop=(END,), seed=seed)

    def _row(self, question: Question, thought: Answer, answer: Answer, source: Provenance) -> Row:
        found, reason = Extractor(self.kind, self.tolerance).judge(
            answer.text, question.answer, complete=answer.finish_reason == "stop"
        )
        reason = _flaw(thought) or reason
        rationale = thought.text.strip()
        if reason is not None:
            said = {"rationale": rationale, "answer": answer.text, "found": found}
            return Row({"question": question.text} | said, source, reason)
        completion = f" {rationale} {MARKER} {question.answer} {END}"
        return Row({"prompt": _prompt(question), "completion": completion}, source)

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Kept samples of every question, and how different their completions are."""
        kept = [row for row in rows if row.reason is None]
        per_question = dict.fromkeys(counts(rows), 0) | counts(kept)
        different = {(row.provenance.question, row.content["completion"]) for row in kept}
        return {
            "kept_per_question": per_question,
            "questions_without_a_row": sum(count == 0 for count in per_question.values()),
            "distinct_completions": len(different) / len(kept) if kept else 0.0,
        }


def _flaw(thought: Answer) -> Reason | None:
    """What makes a rationale useless, whatever it leads to."""
    if thought.finish_reason != "stop":
        return Reason.TRUNCATED_RATIONALE
    if not thought.text.strip():
        return Reason.EMPTY_RATIONALE
    if BEGIN in thought.text or MARKER in thought.text:
        return Reason.MARKED_RATIONALE
    return None


def _prompt(question: Question) -> str:
    return f"{question.text.strip()} {BEGIN}"


def _control(question: Question) -> Row:
    completion = f" {question.answer.strip()} {END}"
    source = Provenance(question.id, 0, "", (), ())
    return Row({"prompt": _prompt(question), "completion": completion}, source)
