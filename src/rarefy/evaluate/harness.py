"""Ask a model the tasks of the lm-evaluation-harness and keep a record per item.

The prompts, the metrics and the order of the items are the harness's own; see
:mod:`rarefy.evaluate.language_model` for how the model answers. No network is needed for the
tasks of the pack; a task of the user's may load what it likes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from rarefy.errors import RarefyError
from rarefy.evaluate.accounts import record_of
from rarefy.evaluate.journal import open_journal
from rarefy.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from rarefy.evaluate.records import Record
    from rarefy.tasks.base import TaskInfo

    Progress = Callable[[str, int, int], None]
    LocalTask = tuple[TaskInfo, dict[str, Any]]


def score(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int | None],
    journal: Path,
    *,
    progress: Progress | None = None,
    batch_tokens: int = 4096,
    extra: Sequence[LocalTask] = (),
    identity: str | None = None,
) -> list[Record]:
    """Let a model answer tasks.

    Args:
        model: a causal language model, as it is to be judged. Whatever changes it for a while
            (hooks, another head) works, but then needs an ``identity``.
        tokenizer: its tokenizer.
        tasks: names of the pack's tasks or of ``extra``, and how many items to ask, from the
            first on; None for all.
        journal: file of finished requests. Called again, only the unfinished ones are asked.
        progress: called with (what, done, total).
        batch_tokens: tokens that the model reads at once; less needs less memory.
        extra: further tasks: what is known of each, and the harness's config.
        identity: what distinguishes the model from others of the same journal; by default a hash
            of config, weights and vocabulary.

    Returns:
        One record an item, in the order of ``tasks`` and of the items.

    Raises:
        RarefyError: the harness is not installed, a task or its main metric is not there, an
            option is longer than the model's window, or the model's numbers are not finite.
    """
    if find_spec("lm_eval") is None:
        raise RarefyError(
            "asking tasks needs the lm-evaluation-harness; run: pip install 'rarefy[eval]'"
        )
    infos, configs = _wanted(tasks, extra)
    tell = progress or (lambda what, done, total: None)
    with _quiet(), open_journal(journal, identity or fingerprint(model, tokenizer)) as book:
        from rarefy.evaluate.language_model import HarnessModel

        built = _build(configs)
        asked = HarnessModel(model, tokenizer, book, tell, batch_tokens)
        samples: dict[str, list[dict[str, Any]]] = {}
        for chat in (False, True):
            some = {
                name: task
                for name, task in built.items()
                if chat == (infos[name].chat and bool(tokenizer.chat_template))
            }
            if some:
                samples |= _run(asked, some, tasks, chat)
    return [
        record_of(built[name], infos[name], row)
        for name in tasks
        for row in samples[name]
        if row["filter"] == samples[name][0]["filter"]
    ]


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Hash what a model's answers depend on: config, weights and vocabulary (64 hex digits)."""
    config = model.config.to_dict()
    config = {key: config[key] for key in config if key not in ("_name_or_path", "dtype")}
    about = [config, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _wanted(
    tasks: Mapping[str, int | None], extra: Sequence[LocalTask]
) -> tuple[dict[str, TaskInfo], list[str | dict[str, Any]]]:
    """Return every wanted task's facts, and its name or config for the harness."""
    from rarefy.tasks import catalogue

    given = {info.name: (info, {**config, "task": info.name}) for info, config in extra}
    known = {} if given.keys() >= tasks.keys() else catalogue.catalogue()
    for name, count in tasks.items():
        if name not in given and name not in known:
            near = suggest(name, [*known, *given])
            raise RarefyError(f"there is no task called {name!r}{near}")
        if count is not None and count < 1:
            raise RarefyError(f"{count} items of task {name} are asked for; ask for 1 or more")
    infos = {name: given[name][0] if name in given else known[name] for name in tasks}
    return infos, [given[name][1] if name in given else name for name in tasks]


def _build(configs: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """Return the harness's task objects by name."""
    from lm_eval.tasks import TaskManager

    from rarefy.tasks import catalogue

    pack = str(catalogue.pack_dir()) if any(isinstance(one, str) for one in configs) else None
    # The harness's own 14,000 tasks take long to index and load from the hub.
    manager = TaskManager(include_path=pack, include_defaults=False)
    tasks: dict[str, Any] = manager.load(list(configs))["tasks"]
    return tasks


def _run(
    model: Any, built: Mapping[str, Any], counts: Mapping[str, int | None], chat: bool
) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's account of every item by task, asked by chat template or plainly."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: Any = simple_evaluate(
        model=model,
        tasks=list(built.values()),
        task_manager=TaskManager(include_defaults=False),
        samples={
            name: range(min(count, len(built[name].eval_docs)))
            for name in built
            if (count := counts[name]) is not None
        },
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples: dict[str, list[dict[str, Any]]] = results["samples"]
    return samples


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's remarks and bars, and leave out its survey of the machine."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task
    from transformers.utils import logging as transformers_logging

    def put(holder: Any, name: str, value: Any) -> None:
        undo.callback(setattr, holder, name, getattr(holder, name))
        setattr(holder, name, value)

    with ExitStack() as undo:
        for name in ("lm_eval", "datasets"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        undo.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
        transformers_logging.set_verbosity_error()
        if datasets.are_progress_bars_disabled() is False:
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        if "TOKENIZERS_PARALLELISM" not in os.environ:
            undo.callback(os.environ.pop, "TOKENIZERS_PARALLELISM", None)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        put(task, "tqdm", partial(task.tqdm, disable=True))
        put(evaluator, "add_env_info", lambda results: None)
        yield
