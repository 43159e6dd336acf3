"""Figures of a running engine: counts now, and events for those who keep histograms."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lorakeet.log import warn

#: Kinds of events. "token" is a token after the first.
EventKind = Literal["queued", "refused", "admitted", "first_token", "token", "finished"]


class Event(NamedTuple):
    """Something that happened to a request.

    Attributes:
        kind: What happened.
        adapter: Public name of its adapter; None: the base.
        seconds: Since its submission; for "token", since the token before.
        finish: Reason for which it ended, with "finished".
        prompt_tokens: Tokens of its prompt, with "finished" and "admitted".
        new_tokens: New tokens, with "finished".
        cached_tokens: Tokens of the prompt that the prefix cache had, with "finished" and "admitted".
    """

    kind: EventKind
    adapter: str | None
    seconds: float = 0.0
    finish: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment.

    Attributes:
        waiting: Requests that wait.
        rows: Requests that run.
        pages: Pages of the pool; 0 without one.
        pages_free: Pages that nothing refers to.
        pages_cached: Pages that the prefix cache has.
        steps: Steps so far.
        queue: Requests that may wait.
        max_rows: Requests that may run together.
        requests: Finished requests by adapter (None: the base) and reason.
        new_tokens: New tokens by adapter.
        prompt_tokens: Tokens of admitted prompts by adapter.
        cached_tokens: Those of them that the prefix cache had, by adapter.
    """

    waiting: int
    rows: int
    pages: int
    pages_free: int
    pages_cached: int
    steps: int
    queue: int
    max_rows: int
    requests: dict[tuple[str | None, str], int] = field(default_factory=dict)
    new_tokens: dict[str | None, int] = field(default_factory=dict)
    prompt_tokens: dict[str | None, int] = field(default_factory=dict)
    cached_tokens: dict[str | None, int] = field(default_factory=dict)


class Meter:
    """Counts by adapter, and listeners to events."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str | None, str]] = Counter()
        self.new_tokens: Counter[str | None] = Counter()
        self.prompt_tokens: Counter[str | None] = Counter()
        self.cached_tokens: Counter[str | None] = Counter()
        self._listeners: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def listen(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` with every event; it runs in the engine's thread or a submitter's, so it is brief."""
        self._listeners.append(callback)

    def note(self, event: Event) -> None:
        """Count an event, and tell the listeners."""
        with self._lock:
            if event.kind == "finished":
                self.requests[event.adapter, str(event.finish)] += 1
                self.cached_tokens[event.adapter] += event.cached_tokens
            elif event.kind == "admitted":
                self.prompt_tokens[event.adapter] += event.prompt_tokens
            elif event.kind in ("first_token", "token"):
                self.new_tokens[event.adapter] += 1
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:  # answers go on without figures
                warn(f"a listener to events failed and is left out: {type(error).__name__}: {error}")
                self._listeners.remove(listener)
