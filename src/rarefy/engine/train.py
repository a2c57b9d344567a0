"""A model tuner's stage: open the whole model, lower an objective, write it back.

    student = the source, with the tuner's adapters in it        teacher = the dense model
    for each step:
        rows -> objective(student, teacher) -> gradients -> numbers -> constraints

Each step's data and random numbers follow from the seed and the step alone. From time to time the
numbers, the optimizer's state and the losses go to disk in one part of the journal, so that a
killed run goes on and ends with the same bytes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from rarefy.checkpoint.writer import write_atomic, write_json
from rarefy.engine.capture import complete_map
from rarefy.engine.close import account, close, close_dense, history, write_config
from rarefy.engine.fit import Hooks, Progress, fit
from rarefy.engine.priority import Ranking, mean_loss, rank_modules
from rarefy.engine.select import select
from rarefy.engine.skeleton import Skeleton
from rarefy.engine.student import open_student, write_student
from rarefy.engine.whole import whole
from rarefy.evaluate.hardware import peaks
from rarefy.objectives.base import OBJECTIVES, Step
from rarefy.objectives.distil import Distil
from rarefy.objectives.policy import ModelPolicy
from rarefy.objectives.rows import Rows
from rarefy.recipe import format_from
from rarefy.tuners.base import ModelTuner

if TYPE_CHECKING:
    from rarefy.engine.select import Selection
    from rarefy.engine.stage import StageRun
    from rarefy.engine.student import Student
    from rarefy.objectives.base import Objective

# Journalled parts that are no part of the result: the state of the loop, and the ranking.
_PART, _RANKING = "training", "ranking"
_TOKENS = 1024  # of a micro-batch
_SEED = 0  # of coins; what is drawn otherwise follows from the step
_SAVE_SECONDS = 60.0
_NEWS = 10  # times that the loss is told


def run_model_tuner(run: StageRun, manifest: dict[str, Any]) -> None:
    """Train, then close the new checkpoint.

    Args:
        run: what to do.
        manifest: facts known beforehand; the stage's own are added to what is written.

    Raises:
        RarefyError: nothing moves, or the loss is not finite.
    """
    start = time.perf_counter()
    skeleton = Skeleton(run.source, run.device)
    complete_map(skeleton)
    chosen = select(skeleton, run.stage)
    ranking = _ranking(run, skeleton)
    wanted = (lambda name: True) if ranking is None else ranking.modules.__contains__
    student = open_student(run, skeleton, chosen, wanted)
    training = _Training(run, student)
    progress = training.run()
    tokens = training.rows.ids.shape[1] * training.tuner.loop.rows * progress.step
    written = write_student(run, student, chosen, tokens)
    facts = training.facts(progress) | {"tokens": tokens}
    facts |= {} if ranking is None else {"damage": ranking.scores}
    parts = ["outside", *(f"{i:05d}" for i in range(len(skeleton.blocks)))]
    if written.adapters:
        _write_adapters(run, written.adapters)
    if written.nodes or skeleton.earlier:
        _close_packed(run, skeleton, chosen, (manifest, written.nodes, facts), start)
    else:
        close_dense(run, skeleton, manifest, facts, start)
    run.writer.finish(parts)


def _ranking(run: StageRun, skeleton: Skeleton) -> Ranking | None:
    """Which modules may move, if not all; measured once, so that a killed run goes on alike."""
    priority = run.stage.priority
    if priority is None:
        return None
    if not run.writer.has(_RANKING):
        found = rank_modules(run, skeleton, priority)
        run.writer.add(_RANKING, {}, {"modules": sorted(found.modules), "scores": found.scores})
    told = run.writer.notes(_RANKING)
    return Ranking(frozenset(told["modules"]), told["scores"])


def _close_packed(
    run: StageRun,
    skeleton: Skeleton,
    chosen: Selection,
    said: tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]],
    start: float,
) -> None:
    """Write the records of a model that is stored in formats."""
    manifest, nodes, facts = said
    for node in nodes:
        node.pop("seconds")
    formats = {node["name"]: format_from(node.pop("stored")) for node in nodes}
    write_config(run.writer.folder, skeleton, chosen, formats)
    more = account(skeleton, chosen, nodes) | {"history": history(run, facts)}
    close(run, manifest | more, start, {})


def _write_adapters(run: StageRun, adapters: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put adapters that are not merged into a folder of their own, as peft reads it."""
    from rarefy.tuners.adapters import peft_files

    folder = run.writer.folder / "adapter"
    folder.mkdir(exist_ok=True)
    method: Any = run.stage.method
    config, tensors = peft_files(adapters, method.rank, method.alpha, str(run.writer.out))
    write_json(folder / "adapter_config.json", config)
    write_atomic(folder / "adapter_model.safetensors", save(tensors))


@dataclass
class _Training:
    """One run of the loop.

    Attributes:
        job: what to do.
        student: the model in training.
    """

    job: StageRun
    student: Student

    def __post_init__(self) -> None:
        method = self.job.stage.method
        assert isinstance(method, ModelTuner)
        assert self.job.rows is not None
        self.tuner = method
        self.rows: Rows = self.job.rows
        self.objective: Objective = self.job.stage.objective or Distil()
        self.optimizer = method.optimizer(self.student.groups(method.learning_rate))
        self.saved = time.monotonic()
        self.known: dict[int, float] = {}  # loss of the dense model on a row
        self.chosen: list[tuple[float, float]] = []  # mean excess loss of chosen rows, and of all

    def run(self) -> Progress:
        """Train, or go on; the student holds the result."""
        progress = self._restore()
        if progress.step == self.tuner.loop.steps:
            return progress
        self._announce()
        pooled = self.job.stage.text is not None and self.job.stage.text.pool > 1
        if not (self.objective.needs_teacher or pooled):
            return self._fit(None, progress)
        teacher = Skeleton(self.job.base or self.job.source, self.job.device, factored=False)
        with whole(teacher):
            fingerprint = teacher.checkpoint.fingerprint()
            return self._fit(ModelPolicy(teacher.model, fingerprint), progress)

    def _fit(self, teacher: ModelPolicy | None, progress: Progress) -> Progress:
        learner = ModelPolicy(self.student.model, "student")
        loop = self.tuner.loop

        def gradients(step: int) -> float:
            total, tokens = 0.0, 0
            for number, rows in enumerate(self._batches(step, learner, teacher)):
                generator = torch.Generator(self.job.device).manual_seed(1_000_003 * step + number)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(1_000_003 * step + number)
                    tally = self.objective.loss(
                        Step(learner, teacher, rows, generator, step, _SEED)
                    )
                tally.total.backward()  # type: ignore[no-untyped-call]
                total, tokens = total + float(tally.total.detach()), tokens + tally.tokens
            for group in self.optimizer.param_groups:
                for leaf in group["params"]:
                    if leaf.grad is not None:
                        leaf.grad.div_(max(1, tokens))
            return total / max(1, tokens)

        return fit(loop, self.optimizer, gradients, Hooks(self._after), progress)

    def _batches(self, step: int, learner: ModelPolicy, teacher: ModelPolicy | None) -> list[Rows]:
        """The rows of a step, in micro-batches."""
        each, count = self.tuner.loop.rows, self.rows.ids.shape[0]
        text = self.job.stage.text
        pool = text.pool if text else 1
        at = [_row(step * each * pool + i, count) for i in range(each * pool)]
        if text is not None and pool > 1:
            at = self._foremost(at, round(each * (1 - text.uniform)), learner, teacher)[:each]
        size = max(1, _TOKENS // self.rows.ids.shape[1])
        return [self._take(at[i : i + size]) for i in range(0, each, size)]

    def _foremost(
        self, at: list[int], count: int, learner: ModelPolicy, teacher: ModelPolicy | None
    ) -> list[int]:
        """Rows with the ``count`` largest excess losses first, then the others as they came."""
        for row in at:
            if row not in self.known and teacher is not None:
                self.known[row] = mean_loss(teacher, self._take([row]))
        excess = {row: mean_loss(learner, self._take([row])) - self.known.get(row, 0) for row in at}
        first = sorted(excess, key=lambda row: -excess[row])[:count]
        self.chosen.append(
            (
                sum(excess[row] for row in first) / max(1, len(first)),
                sum(excess.values()) / len(excess),
            )
        )
        return [*first, *(row for row in at if row not in first)]

    def _take(self, at: list[int]) -> Rows:
        device = self.job.device
        ids, counted, valid = (
            t[at].to(device) for t in (self.rows.ids, self.rows.counted, self.rows.valid)
        )
        width = int(valid.any(0).nonzero().max()) + 1
        return Rows(ids[:, :width], counted[:, :width], valid[:, :width])

    def _after(self, progress: Progress) -> None:
        self.student.constrain()
        steps, say = self.tuner.loop.steps, self.job.watcher
        (say.train or say.step)(progress.step, steps)
        if progress.step % max(1, steps // _NEWS) == 0:
            say.say(f"step {progress.step} of {steps}: loss {progress.losses[-1]:.4f}")
        last = progress.step == steps
        if last or time.monotonic() - self.saved > _SAVE_SECONDS:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        tensors = {f"leaf.{i}": leaf.detach() for i, leaf in enumerate(self._leaves())}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"state.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
        tensors["chosen"] = torch.tensor(self.chosen, dtype=torch.float64)
        self.job.writer.add(_PART, tensors, {"seconds": 0.0})
        self.saved = time.monotonic()

    def _restore(self) -> Progress:
        """Where an earlier run stopped; the numbers and the optimizer's state are put back."""
        if not self.job.writer.has(_PART):
            return Progress()
        stored = self.job.writer.read(_PART)
        with torch.no_grad():
            for i, leaf in enumerate(self._leaves()):
                leaf.copy_(stored[f"leaf.{i}"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in stored.items():
            kind, _, rest = name.partition(".")
            if kind == "state":
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        losses = stored["losses"].tolist()
        self.chosen = [(a, b) for a, b in stored["chosen"].tolist()]
        return Progress(len(losses), losses)

    def _leaves(self) -> list[torch.Tensor]:
        return [leaf for group in self.optimizer.param_groups for leaf in group["params"]]

    def _announce(self) -> None:
        """Say what the run will take."""
        loop, length = self.tuner.loop, self.rows.ids.shape[1]
        moving = sum(leaf.numel() for leaf in self._leaves())
        total = self.student.skeleton.parameters
        teacher = self.objective.needs_teacher
        # Two operations a weight and token forward, twice that backward; the teacher only forward.
        work = loop.steps * loop.rows * length * total * (8 if teacher else 6)
        logits = 4 * min(_TOKENS, loop.rows * length) * self.student.model.config.vocab_size
        memory = 4 * (total * (2 if teacher else 1) + 3 * moving) + 3 * logits
        minutes = work / peaks(self.job.device).flops / 60
        self.job.watcher.say(
            f"training: {loop.steps} steps of {loop.rows} x {length} tokens, {moving:,} of "
            f"{total:,} numbers move; about {memory / 1e9:.1f} GB, and at least {minutes:.0f} min"
        )

    def facts(self, progress: Progress) -> dict[str, Any]:
        """What the history says of the training."""
        return {
            "objective": OBJECTIVES.name_of(self.objective),
            "objective_options": asdict(self.objective),  # type: ignore[call-overload]
            "losses": [round(loss, 6) for loss in progress.losses],
            "moving": sum(leaf.numel() for leaf in self._leaves()),
            "modules": sorted(self.student.adapters),
            "excess": [[round(a, 6), round(b, 6)] for a, b in self.chosen],
        }


def _row(position: int, count: int) -> int:
    """The row at a position of the stream that visits all rows in a new order every time round."""
    generator = torch.Generator().manual_seed(position // count)
    return int(torch.randperm(count, generator=generator)[position % count])
