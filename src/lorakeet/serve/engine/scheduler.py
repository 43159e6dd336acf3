"""Order of the work: admission by pages, pieces of prompts between the steps of answers, cancels and deadlines.

Requests of different adapters (and of the base) are admitted in turn, so a crowd for one of them does not hold up the
others. A request is admitted when the pages for its whole answer are free; so none that runs is ever put back.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.cache.prefix_cache import PrefixCache, chain
from lorakeet.serve.engine.forward import Sequence
from lorakeet.serve.engine.pace import Load, Pace, load_of
from lorakeet.serve.engine.rows import Row

#: Steps. In every fourth the oldest prompt goes on, in the others the one with the fewest tokens left.
_OLDEST_EVERY = 4


@dataclass
class Step:
    """A step.

    Attributes:
        rows: Its rows, each with the number of its tokens.
        answers: Work for new tokens.
        prompts: Work for pieces of prompts.
    """

    rows: list[tuple[Row, int]] = field(default_factory=list)
    answers: Load = field(default_factory=Load)
    prompts: Load = field(default_factory=Load)

    def add(self, row: Row, tokens: int) -> None:
        """Add a row."""
        load = load_of(row.sequence.length if row.sequence else 0, tokens)
        self.rows.append((row, tokens))
        if row.decodes:
            self.answers += load
        else:
            self.prompts += load


class Scheduler:
    """The waiting and running rows.

    Attributes:
        running: Rows with pages, in the order of admission.
        pace: Expected times of steps, by which a prompt is cut.
    """

    def __init__(
        self,
        pages: Pages | None,
        prefixes: PrefixCache | None,
        *,
        max_rows: int,
        queue: int,
        prefill_tokens: int,
        idle_prefill_tokens: int,
    ) -> None:
        """Begin without rows.

        Args:
            pages: The pool; None: the forward pass keeps its own state, and prompts are never cut.
            prefixes: The prefix cache, with ``pages``.
            max_rows: Rows that run together.
            queue: Rows that may wait.
            prefill_tokens: Most tokens of prompts in a step while others get new tokens.
            idle_prefill_tokens: Tokens of prompts in a step while none waits for one.
        """
        self.pages, self.prefixes = pages, prefixes
        self.max_rows, self.queue = max_rows, queue
        self.prefill_tokens, self.idle_prefill_tokens = prefill_tokens, idle_prefill_tokens
        self.pace = Pace()
        self.running: list[Row] = []
        self._waiting: OrderedDict[str | None, deque[Row]] = OrderedDict()  # by adapter; the next turn is first
        self._steps = 0

    @property
    def waiting(self) -> int:
        """Number of waiting rows."""
        return sum(map(len, self._waiting.values()))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run and nothing waits."""
        return not self.running and not self._waiting

    def add(self, row: Row) -> bool:
        """Let a row wait; whether it may."""
        if self.waiting >= self.queue:
            return False
        self._waiting.setdefault(row.adapter_name, deque()).append(row)
        return True

    def rows(self) -> Iterator[Row]:
        """Yield all rows."""
        yield from list(self.running)
        for line in list(self._waiting.values()):
            yield from list(line)

    def drop(self) -> list[Row]:
        """End the rows whose caller has left or whose deadline is over, and return them and all others that have ended."""
        now = time.monotonic()
        for row in self.rows():
            if row.ticket.cancelled:
                row.end("cancelled")
            elif row.request.deadline is not None and now >= row.request.deadline:
                row.end("deadline")
        return self.collect()

    def collect(self) -> list[Row]:
        """Return the rows that have ended, with their pages given back."""
        ended = [row for row in self.rows() if row.finish is not None]
        if ended:
            self.running = [row for row in self.running if row.finish is None]
            for name, line in list(self._waiting.items()):
                self._set_line(name, (row for row in line if row.finish is None))
        for row in ended:
            self._give_back(row)
        return ended

    def _set_line(self, name: str | None, rows: Iterable[Row]) -> None:
        if line := deque(rows):
            self._waiting[name] = line
        else:
            self._waiting.pop(name, None)

    def admit(self) -> list[Row]:
        """Start waiting rows while there is room, one of each adapter in turn; returns them.

        The row whose turn it is waits for its pages, and nothing overtakes it: so a large request is not starved.
        """
        admitted = []
        while self._waiting and len(self.running) < self.max_rows:
            name, line = next(iter(self._waiting.items()))
            if not self._start(line[0]):
                break
            row = line.popleft()
            self.running.append(row)
            admitted.append(row)
            del self._waiting[name]
            self._set_line(name, line)  # at the end of the turns
        return admitted

    def _start(self, row: Row) -> bool:
        """Give a row its pages: those that the prefix cache has, and free ones for all that it may need."""
        if self.pages is None or self.prefixes is None:
            row.sequence = Sequence(row.adapter)
            return True
        found = self.prefixes.find(row.keys)
        needed = self.pages.needed(len(row.request.prompt) + row.limit) - len(found)
        if not self.prefixes.make_room(needed):
            for page in found:
                self.pages.release(page)
            return False
        row.cached = len(found) * self.pages.page_tokens
        row.sequence = Sequence(row.adapter, found + self.pages.take(needed, clear=False), row.cached)
        return True

    def step(self) -> Step:
        """Return the rows of the next step: new tokens first, then pieces of prompts."""
        self._steps += 1
        step = Step()
        for row in self.running:
            if row.decodes:
                step.add(row, 1)
        most = self.prefill_tokens if step.rows else self.idle_prefill_tokens
        computed: set[bytes] = set()  # keys of pages that this step fills
        for row in self._prompts():
            self._look_again(row)
            tokens = min(row.unread, self._room(step, row, most))
            if tokens <= 0:
                break
            keys = self._next_keys(row, tokens)
            if computed.isdisjoint(keys[:1]):  # otherwise the row finds the pages in the next step
                step.add(row, tokens)
                computed.update(keys)
        self._clear(step)
        return step

    def _prompts(self) -> list[Row]:
        """Return the rows whose prompt is not stored, in the order in which they go on."""
        prompts = [row for row in self.running if not row.decodes]
        if self._steps % _OLDEST_EVERY:
            prompts.sort(key=lambda row: row.unread)  # stable: of equal ones the oldest first
        return prompts

    def _room(self, step: Step, row: Row, most: int) -> int:
        """Return how many tokens of a further prompt a step can take, of ``most`` in all."""
        if self.pages is None or row.sequence is None:
            return row.unread
        left = max(most - step.prompts.tokens, 0)
        if not step.answers.tokens:
            return left
        return self.pace.fitting(step.answers, step.prompts, row.sequence.length, left)

    def _clear(self, step: Step) -> None:
        """Clear the pages that a step begins."""
        for row, tokens in step.rows if self.pages is not None else ():
            assert row.sequence is not None and self.pages is not None
            first, end = (self.pages.needed(row.sequence.length + more) for more in (0, tokens))
            self.pages.clear(row.sequence.pages[first:end])

    def _next_keys(self, row: Row, tokens: int) -> list[bytes]:
        """Return the keys of the pages of a prompt that its next tokens fill."""
        if self.pages is None or row.sequence is None:
            return []
        size, length = self.pages.page_tokens, row.sequence.length
        return row.keys[length // size : (length + tokens) // size]

    def _look_again(self, row: Row) -> None:
        """Take pages that the prefix cache has got since the row was admitted, from another one with the same beginning."""
        sequence = row.sequence
        if self.pages is None or self.prefixes is None or sequence is None:
            return
        place, rest = divmod(sequence.length, self.pages.page_tokens)
        if rest or place >= len(row.keys) or not self.prefixes.has(row.keys[place]):
            return
        found = self.prefixes.find(row.keys)
        for index, page in enumerate(found):
            self.pages.release(sequence.pages[index])
            sequence.pages[index] = page
        gained = (len(found) - place) * self.pages.page_tokens
        sequence.length += gained
        row.cached += gained

    def stored(self, row: Row, tokens: int) -> None:
        """Note that a step has stored tokens of a row, and keep the pages of its prompt that are full now."""
        assert row.sequence is not None
        row.sequence.length += tokens
        if self.pages is not None and self.prefixes is not None and not row.decodes:
            full = min(row.sequence.length // self.pages.page_tokens, len(row.keys))
            self.prefixes.keep(row.keys[:full], row.sequence.pages[:full])

    def _give_back(self, row: Row) -> None:
        """Release the row's pages; the full ones stay in the prefix cache, those of the answer too."""
        sequence, row.sequence = row.sequence, None
        if sequence is None or self.pages is None:
            return
        if self.prefixes is not None and row.finish != "error":
            keys, size = row.keys, self.pages.page_tokens
            root, done = (keys[-1] if keys else row.root), size * len(keys)
            keys = (keys + chain(root, row.tokens[done : sequence.length], size))[: sequence.length // size]
            self.prefixes.keep(keys, sequence.pages[: len(keys)])
        for page in sequence.pages:
            self.pages.release(page)
