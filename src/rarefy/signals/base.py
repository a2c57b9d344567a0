"""The signal role: what a teacher tells a student about the counted tokens of a batch.

A signal is a frozen dataclass; it makes targets and knows no loss. How much of a teacher it needs
is a level, 0 to 5, as in ``teachers/base.py``. The conformance suite checks that one batch always
gives one target and that a stored target equals the fresh one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from rarefy.errors import RarefyError
from rarefy.registry import Registry
from rarefy.teachers.base import Level, TeacherCapabilityError

if TYPE_CHECKING:
    from rarefy.losses.base import Target
    from rarefy.objectives.policy import Policy
    from rarefy.objectives.rows import Rows


def require_teacher(teacher: Policy | None, level: int, who: str) -> Policy:
    """The teacher, if it offers what is needed.

    Args:
        teacher: the one at hand.
        level: needed capability, 0 to 5.
        who: what needs it, for the message.

    Raises:
        RarefyError: there is none.
        TeacherCapabilityError: its level is too low.
    """
    if teacher is None:
        raise RarefyError(
            f"{who} needs a teacher of level {Level(level).name}, and there is none; name a teacher"
        )
    if teacher.level < level:
        raise TeacherCapabilityError("this teacher", who, Level(level), Level(teacher.level))
    return teacher


class Signal(ABC):
    """Makes targets; subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        on_policy: whether it can speak about text that did not exist before.
        student_layers: layers of the student whose hidden states go with the target.
    """

    on_policy: ClassVar[bool] = True

    @property
    @abstractmethod
    def gives(self) -> frozenset[str]:
        """Kinds of target, in the words of ``Loss.accepts``."""

    @property
    @abstractmethod
    def level(self) -> int:
        """Capability that it asks of the teacher, 0 to 5; 0 asks for none."""

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student that belong to the target's states, in the same order."""
        return ()

    @abstractmethod
    def target(self, teacher: Policy | None, rows: Rows, temperature: float = 1.0) -> Target:
        """What the student should say about the counted tokens of ``rows``.

        Args:
            teacher: in evaluation mode; no gradient reaches it.
            rows: the batch.
            temperature: at which the loss compares; only shortened distributions depend on it.

        Raises:
            RarefyError: there is no teacher.
            TeacherCapabilityError: its level is too low.
        """


SIGNALS: Registry[Signal] = Registry("signal", Signal, "rarefy.signals")  # type: ignore[type-abstract]
