"""What a task lost, item by item, against the dense model on the same items.

Two models with equal accuracy may know different things: what one lost is hidden by what it won.
So items are paired, and counted as

                      other right     other wrong
    dense right       both            lost
    dense wrong       won             wrong_same + wrong_other

Accuracy changes by (won - lost) / N, while (won + lost) / N of the answers flipped and
(won + lost + wrong_other) / N changed at all. Whether lost and won differ by more than chance is
McNemar's exact test. Intervals resample clusters (passages, articles), never items that share one.

Source: Dutta et al., Accuracy is Not All You Need, NeurIPS 2024 (arXiv 2407.09141).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rarefy.errors import RarefyError
from rarefy.evaluate.pairs import Lost, lost, pair_up
from rarefy.evaluate.significance import codes, has_headroom, holm, mcnemar, mean, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rarefy.evaluate.bootstrap import Estimate
    from rarefy.evaluate.pairs import Pair
    from rarefy.evaluate.records import Record
    from rarefy.tasks.base import TaskInfo

__all__ = ["Flips", "Lost", "TaskDamage", "compare", "holm", "lost"]

FEWEST = 10  # clusters: with fewer, a standard error is itself a guess
TOLERANCE = 0.05  # LLM-KICK: a model matches if it loses no more than this share of the score


@dataclass(frozen=True)
class Flips:
    """How the answers moved; the five counts add up to the number of items.

    Attributes:
        both: right in both models. lost: right only in the dense one. won: only in the other.
        wrong_same, wrong_other: wrong in both, with the same answer or with another.
        flips_percent: share of lost and won. all_flips_percent: share of changed answers.
    """

    both: int
    lost: int
    won: int
    wrong_same: int
    wrong_other: int
    flips_percent: float
    all_flips_percent: float


@dataclass(frozen=True)
class TaskDamage:
    """One task, one model, against the dense one; ``asdict`` gives plain JSON.

    Attributes:
        dense, score: mean of the main metric. difference: score - dense, paired.
        relative: score / dense, or dense / score where lower is better; None on division by 0.
        matches: loses no more than 5 % of the dense score.
        chance: what guessing scores, the mean of 1 / options; 0 without options.
        headroom: dense - chance. sensitive: that is at least three standard errors (bits always
            are), and there are ten clusters or more, so that damage can show at all.
        flips, p_value: None where scores are not right or wrong.
        p_holm: filled in by whoever knows how many comparisons there are.
        choice_kl: KL(dense || other) over the options, in nats; None without options.
        agreement: rouge_l (0 to 1), chrf (0 to 100) and share of identical outputs, against the
            dense model's outputs; for tasks marked as text.
        metrics: means of the other metrics, of the other model.
    """

    task: str
    items: int
    clusters: int
    dense: Estimate
    score: Estimate
    difference: Estimate
    relative: float | None
    matches: bool
    chance: float
    headroom: float
    sensitive: bool
    flips: Flips | None
    p_value: float | None
    p_holm: float | None
    choice_kl: Estimate | None
    agreement: dict[str, float] | None
    metrics: dict[str, Estimate]


def compare(dense: Sequence[Record], other: Sequence[Record], info: TaskInfo) -> TaskDamage:
    """Compare a model with the dense one on one task.

    Args:
        dense, other: records, in any order; those of other tasks are left out.
        info: the task.

    Raises:
        RarefyError: the two hold different items, or the same item with other options; a score
            or a log-probability is not finite.
    """
    mine = ([r for r in records if r.task == info.name] for records in (dense, other))
    pairs = pair_up(*mine)
    if not pairs:
        raise RarefyError(f"there is no record of {info.name}; score the models on it first")
    clusters = codes([a.cluster for a, _ in pairs])
    before = np.array([a.score for a, _ in pairs])
    after = np.array([b.score for _, b in pairs])
    if not np.isfinite([before, after]).all():
        raise RarefyError(
            f"a score of {info.name} is not a finite number; the model is damaged, "
            "compress it again with a milder recipe"
        )
    old, new = float(before.mean()), float(after.mean())
    part, whole = (new, old) if info.higher else (old, new)
    chance = float(np.mean([1 / len(a.logprobs) if a.logprobs else 0.0 for a, _ in pairs]))
    flips = _flips(pairs)
    return TaskDamage(
        task=info.name,
        items=len(pairs),
        clusters=len(set(clusters)),
        dense=score(before, clusters),
        score=score(after, clusters),
        difference=mean(after - before, clusters),
        relative=part / whole if whole else None,
        matches=part >= (1 - TOLERANCE) * whole - 1e-12,
        chance=chance,
        headroom=old - chance,
        sensitive=len(set(clusters)) >= FEWEST
        and (info.kind == "bits" or has_headroom(before, clusters, chance)),
        flips=flips,
        p_value=mcnemar(flips.lost, flips.won) if flips else None,
        p_holm=None,
        choice_kl=_choice_kl(pairs),
        agreement=_agreement(pairs) if info.text else None,
        metrics=_others([b for _, b in pairs], info.metric),
    )


def _flips(pairs: Sequence[Pair]) -> Flips | None:
    """Count how answers moved; None when a score is neither right nor wrong."""
    if any(record.score not in (0, 1) for pair in pairs for record in pair):
        return None
    rights = Counter((a.score == 1, b.score == 1) for a, b in pairs)
    both, gone, won = rights[True, True], rights[True, False], rights[False, True]
    wrong = [(a, b) for a, b in pairs if a.score == b.score == 0]
    same = sum(_answer(a) == _answer(b) for a, b in wrong)
    other = len(wrong) - same
    each = 100 / len(pairs)
    flipped, changed = each * (gone + won), each * (gone + won + other)
    return Flips(both, gone, won, same, other, flipped, changed)


def _answer(record: Record) -> int | str | None:
    return record.output if record.choice is None else record.choice


def _choice_kl(pairs: Sequence[Pair]) -> Estimate | None:
    """Mean KL over the options, each model's log-probabilities normalised to sum to one."""
    ranked = [(a, b) for a, b in pairs if a.logprobs]
    if not ranked:
        return None
    distances = []
    for pair in ranked:
        options = np.array([record.logprobs for record in pair])
        if not np.isfinite(options).all():
            raise RarefyError(
                f"an option of {pair[0].task} has no finite log-probability; the model is "
                "damaged, compress it again with a milder recipe"
            )
        P, Q = options - np.logaddexp.reduce(options, axis=1, keepdims=True)
        distances.append(max(0.0, float(np.exp(P) @ (P - Q))))
    return mean(np.array(distances), codes([a.cluster for a, _ in ranked]))


def _agreement(pairs: Sequence[Pair]) -> dict[str, float]:
    """How near the outputs are to the dense model's; equal ones, empty or not, agree fully."""
    from rarefy.tasks.scorers import chrf, rouge

    texts = [(b.output or "", a.output or "") for a, b in pairs]
    rouges = [1.0 if this == dense else rouge(this, dense)["rouge_l"] for this, dense in texts]
    chrfs = [100.0 if this == dense else chrf(this, dense) for this, dense in texts]
    same = [float(this == dense) for this, dense in texts]
    return {
        "rouge_l": float(np.mean(rouges)),
        "chrf": float(np.mean(chrfs)),
        "identical": float(np.mean(same)),
    }


def _others(records: Sequence[Record], main: str) -> dict[str, Estimate]:
    """Means of every metric but the main one, each over the items that have it."""
    found = {}
    for name in sorted({name for record in records for name in record.metrics} - {main}):
        having = [record for record in records if name in record.metrics]
        values = np.array([record.metrics[name] for record in having])
        found[name] = score(values, codes([record.cluster for record in having]))
    return found
