"""Settings that an adapter was taught with: noted by its run, and used by evaluation and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from lorakeet.config import DataSettings, RunConfig, TaskSettings
from lorakeet.data.rows.kinds import Layout
from lorakeet.setting_types import settings_error

#: Entry of ``lorakeet.json`` with the settings.
NOTES = "taught"
#: Settings of the training that held-out figures depend on.
_TRAINING = {"seed", "batch_size", "token_budget", "padding_free"}
#: Settings of the data that choose rows, not what a row becomes: used only for the rows that the run held out.
_CHOICE_OF_ROWS = {"limit", "eval_fraction", "stream", "shuffle_buffer"}


def taught_notes(config: RunConfig, layout: Layout, chat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry :data:`NOTES` of an adapter's notes: its run's settings, without paths of this machine.

    Args:
        config: Of the run.
        layout: Of its rows; the columns that were found are noted too.
        chat: Of its conversations, see :func:`lorakeet.data.rows.conversations.system_turn_notes`; empty: it has none.
    """
    return {
        "data": config.data.model_dump(mode="json", exclude={"path", "weights"}),
        "task": config.task.model_dump(mode="json", exclude={"type", "problem", "labels"}),
        "train": config.train.model_dump(mode="json", include=_TRAINING),
        "columns": dict(layout.columns),
        "chat": dict(chat),
    }


@dataclass(frozen=True)
class Taught:
    """Settings that an adapter was taught with; empty for one whose notes do not tell.

    Attributes:
        data, task, train: Settings by name, as in the sections of a run.
        columns: Role -> column of the rows; empty: unknown.
        chat: System turn of the conversations (``system``), and the share of them that has any; empty: plain texts.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Taught:
        """Return the settings in the contents of ``lorakeet.json``."""
        noted = notes.get(NOTES)
        parts = noted if isinstance(noted, Mapping) else {}
        return cls(**{name: parts[name] for name in cls.__dataclass_fields__ if isinstance(parts.get(name), Mapping)})

    @property
    def pairs(self) -> bool | None:
        """Whether the rows were pairs of texts; None: unknown."""
        return "text_pair" in self.columns if self.columns else None

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest sample; None: unknown."""
        return self.data.get("max_length")

    def data_settings(self, given: DataSettings, *, held_out_only: bool) -> DataSettings:
        """Return ``given`` settings, and those of the training where they leave something open.

        Args:
            given: Settings of the data, of which those that were set win.
            held_out_only: Take the settings that choose rows too, so that the same rows are held out.
        """
        names = {name for name in self.data if name in DataSettings.model_fields} - given.model_fields_set
        noted = {name: self.data[name] for name in names if held_out_only or name not in _CHOICE_OF_ROWS}
        own = given.model_dump(include=given.model_fields_set)
        if "columns" in given.model_fields_set:
            noted["columns"] = {**self.data.get("columns", {}), **given.columns}
        try:
            return DataSettings.model_validate({**own, **noted})
        except ValidationError as error:
            raise settings_error(error, DataSettings) from None

    def task_settings(self, given: TaskSettings) -> TaskSettings:
        """Return the settings ``given`` for a task, and those of the training where they leave something open."""
        names = {name for name in self.task if name in TaskSettings.model_fields} - given.model_fields_set
        return given.model_copy(update={name: self.task[name] for name in names})
