"""Steps of an engine: each ends and admits rows, runs one forward pass, and gives rows their next tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from lorakeet.log import warn
from lorakeet.serve.engine.forward import Forward
from lorakeet.serve.engine.residents import Residents
from lorakeet.serve.engine.rows import Row, choose_all
from lorakeet.serve.engine.scheduler import Scheduler
from lorakeet.serve.engine.stats import Event, EventKind, Meter


class Steps:
    """The steps over the rows of a scheduler. A step that fails ends its rows with an error, and others go on.

    Attributes:
        count: Number of forward passes so far.
    """

    def __init__(
        self,
        forward: Forward,
        scheduler: Scheduler,
        residents: Residents,
        meter: Meter,
        ends: frozenset[int],
        lock: threading.Condition,
    ) -> None:
        """Prepare to run.

        Args:
            forward: The forward pass.
            scheduler: The rows.
            residents: The adapters, which know how many requests each version answers.
            meter: Where events go.
            ends: End tokens of the model.
            lock: Guard of the scheduler; it is free while the forward pass runs.
        """
        self.count = 0
        self._forward, self._scheduler, self._residents = forward, scheduler, residents
        self._meter, self._ends, self._lock = meter, ends, lock

    @torch.inference_mode()
    def run(self) -> None:
        """Run one step: end rows, admit others, compute, add tokens."""
        with self._lock:
            self._finish(self._scheduler.drop())
            for row in self._scheduler.admit():
                self._tell("admitted", row)
            step = self._scheduler.step()
        chosen = step.rows
        if not chosen:
            return
        self.count += 1
        began = time.monotonic()
        try:
            logits = self._forward.run([row.piece(tokens) for row, tokens in chosen])
        except Exception as error:  # of any architecture; the engine goes on with other requests
            warn(f"a step failed: {type(error).__name__}: {error}")
            self.fail([row for row, _ in chosen], str(error))
            return
        with self._lock:
            self._scheduler.pace.note(step.answers, step.prompts, time.monotonic() - began)
            for row, tokens in chosen:
                self._scheduler.stored(row, tokens)
        ready = [index for index, (row, _) in enumerate(chosen) if not row.unread]
        if ready:
            self._add_tokens(
                [chosen[index][0] for index in ready], logits if len(ready) == len(chosen) else logits[ready]
            )
        with self._lock:
            self._finish(self._scheduler.collect())

    def _add_tokens(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        for row, choice in zip(rows, choose_all(rows, logits), strict=True):
            if isinstance(choice, str):
                row.end("error", error=choice)
                continue
            now = time.monotonic()
            self._meter.note(Event("token" if row.decodes else "first_token", row.adapter_name, now - row.last_token))
            row.last_token = now
            try:
                row.add(*choice, self._ends)
            except Exception as error:  # a grammar or a listener of the caller
                row.end("error", error=f"{type(error).__name__}: {error}")

    def fail(self, rows: Sequence[Row], message: str) -> None:
        """End rows with an error."""
        with self._lock:
            for row in rows:
                row.end("error", error=message)
            self._finish(self._scheduler.collect())

    def _finish(self, ended: Sequence[Row]) -> None:
        for row in ended:
            self._tell("finished", row)
            self._release(row)

    def _release(self, row: Row) -> None:
        if row.adapter is not None:
            self._residents.release(row.adapter)

    def _tell(self, kind: EventKind, row: Row) -> None:
        seconds = time.monotonic() - row.submitted
        self._meter.note(
            Event(kind, row.adapter_name, seconds, row.finish, len(row.request.prompt), row.new, row.cached)
        )
