"""The teacher's shortened distributions, written to disk once and read ever after.

One safetensors file holds one row, and its name is a hash of everything that decides the content:
teacher, tokens, which of them count, k, temperature, tail. Batches may therefore be shuffled, cut
and accumulated in any way. A token costs 8 k + 4 bytes: 516 at k = 64.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors.torch import load_file, save

from rarefy.checkpoint.writer import write_atomic, write_json
from rarefy.errors import RarefyError
from rarefy.losses.base import Target, TopK
from rarefy.losses.divergence import top_k
from rarefy.signals.base import SIGNALS, Signal, require_teacher

if TYPE_CHECKING:
    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows

Entry = dict[str, torch.Tensor]


@SIGNALS.register("cached", family="distillation")
@dataclass(frozen=True)
class Cached(Signal):
    """Top-k log-probabilities and the mass of the rest, kept in a folder.

    Attributes:
        folder: where they are; made when needed. It belongs to one teacher.
        k: entries of a distribution.
        tail: keep the mass of the others; only forward KL can do without.
        read_only: never ask a teacher; a row that is not there is an error.
    """

    on_policy: ClassVar[bool] = False

    folder: str
    k: int = 64
    tail: bool = True
    read_only: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")

    @property
    def gives(self) -> frozenset[str]:
        """Shortened distributions."""
        return frozenset({"top-k" if self.tail else "top-k without tail"})

    @property
    def level(self) -> int:
        """Logits to shorten, unless nothing is to be written."""
        return 0 if self.read_only else 3

    def target(self, teacher: Policy | None, rows: Rows, temperature: float = 1.0) -> Target:
        """Read every row's distributions; ask the teacher for those that are not there.

        Raises:
            RarefyError: the folder was written by another teacher, or a row is missing and
                nobody may be asked.
        """
        print_ = self._fingerprint(teacher)
        files = [self._file(print_, *row, temperature) for row in _rows(rows)]
        if not all(file.is_file() for file in files):
            self._write(files, teacher, rows, temperature)
        parts = [load_file(file) for file in files]
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        merged = {name: tensor.to(rows.ids.device) for name, tensor in merged.items()}
        indices = merged["indices"].long()
        return Target(top=TopK(merged["log_probs"], indices, merged.get("tail"), temperature))

    def _fingerprint(self, teacher: Policy | None) -> str:
        """The teacher's, or that of the folder where there is no teacher."""
        about = Path(self.folder) / "teacher.json"
        known = str(json.loads(about.read_text())["fingerprint"]) if about.is_file() else None
        if teacher is None or self.read_only:
            if known is None:
                raise RarefyError(
                    f"the folder {self.folder} holds no teacher's distributions; name a teacher "
                    "and leave read_only off, or give the folder that was written before"
                )
            return known
        if known is None:
            about.parent.mkdir(parents=True, exist_ok=True)
            write_json(about, {"fingerprint": teacher.fingerprint})
        elif known != teacher.fingerprint:
            raise RarefyError(
                f"the folder {self.folder} holds another teacher's distributions; "
                "give this teacher a folder of its own"
            )
        return teacher.fingerprint

    def _file(
        self, fingerprint: str, ids: torch.Tensor, counted: torch.Tensor, temperature: float
    ) -> Path:
        about = f"{fingerprint} {self.k} {self.tail} {temperature:.17g} {ids.tolist()} "
        name = hashlib.sha256(f"{about}{counted.int().tolist()}".encode()).hexdigest()[:32]
        return Path(self.folder) / name[:2] / f"{name}.safetensors"

    @torch.no_grad()
    def _write(
        self, files: list[Path], teacher: Policy | None, rows: Rows, temperature: float
    ) -> None:
        if self.read_only:
            raise RarefyError(
                f"a row of the text is not in {self.folder}, and read_only is set; leave it off "
                "and name the teacher, or use the text that the folder was written with"
            )
        model = require_teacher(teacher, self.level, "the signal 'cached'")
        top = top_k(model.read(rows).logits, self.k, temperature, tail=self.tail)
        table: Entry = {"log_probs": top.log_probs, "indices": top.indices.int()}
        if top.tail is not None:
            table["tail"] = top.tail
        sizes = rows.counted.sum(1).tolist()
        split = {name: torch.split(tensor.cpu(), sizes) for name, tensor in table.items()}
        for i, file in enumerate(files):
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, save({name: part[i].clone() for name, part in split.items()}))


def _rows(rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of each row, without padding, and which of them count."""
    return [
        (ids[valid], counted[valid])
        for ids, counted, valid in zip(
            rows.ids.cpu(), rows.counted.cpu(), rows.valid.cpu(), strict=True
        )
    ]
