"""The engine: one thread that runs all requests on one base, step by step."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from lorakeet.base.load import Base
from lorakeet.errors import EngineStopped, QueueFull, RequestError
from lorakeet.facts.vocabulary import embedding_rows
from lorakeet.facts.window import window
from lorakeet.inference.generate import end_tokens
from lorakeet.inference.predict import predict
from lorakeet.inference.questions import Question
from lorakeet.loaded_model import LoadedModel
from lorakeet.log import warn
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.cache.prefix_cache import PrefixCache, chain
from lorakeet.serve.engine.choose_forward import choose_forward
from lorakeet.serve.engine.forward import Forward, acting
from lorakeet.serve.engine.request_checks import check_request, fitting_tokens
from lorakeet.serve.engine.requests import Request, Ticket
from lorakeet.serve.engine.residents import Resident, Residents
from lorakeet.serve.engine.rows import Row
from lorakeet.serve.engine.scheduler import Scheduler
from lorakeet.serve.engine.stats import EngineStats, Event, Meter
from lorakeet.serve.engine.steps import Steps
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import Taught

T = TypeVar("T")

#: Bytes of the pool of key-value pages. SmolLM2 needs 46 kB a token, so this is room for 23,000 tokens.
CACHE_BYTES = 1 << 30


class Engine:
    """Answers of one base and its adapters, for any number of threads that ask.

    Attributes:
        model: The base, with adapters.
        tokenizer: Its tokenizer.
        residents: The served adapters.
        task: The model's task.
        forward: The forward pass; None for a model that writes no text.
        ends: End tokens.
    """

    def __init__(
        self,
        opened: LoadedModel | Base,
        residents: Residents,
        *,
        max_rows: int = 16,
        page_tokens: int = 32,
        cache_bytes: int = CACHE_BYTES,
        prefill_tokens: int = 128,
        idle_prefill_tokens: int = 512,
        queue: int = 64,
        make_forward: Callable[[Any, Pages], Forward] | None = None,
    ) -> None:
        """Prepare to answer; :meth:`start` begins.

        Args:
            opened: The base, opened without adapters.
            residents: The adapters over it.
            max_rows: Requests that run together.
            page_tokens: Tokens of a key-value page, the unit in which prompts are found again.
            cache_bytes: Bytes of all pages: of running requests and of the prefix cache.
            prefill_tokens: Most tokens of prompts in a step while others get new tokens; fewer, where the step would take
                much longer for them.
            idle_prefill_tokens: Tokens of prompts in a step while none waits for one.
            queue: Requests that may wait.
            make_forward: Function of the model and the pool, for another forward pass than the plain one.
        """
        self.model: Any = opened.model
        self.tokenizer = opened.tokenizer if isinstance(opened, Base) else opened.base.tokenizer
        self.task = Task() if isinstance(opened, Base) else opened.task
        self.residents = residents
        self.max_rows, self.queue = max_rows, queue
        self.ends: frozenset[int] = frozenset()
        self.forward: Forward | None = None
        if self.task.name == "CAUSAL_LM":
            self.ends = frozenset(end_tokens(self.model, self.tokenizer))
            self.forward = choose_forward(self.model, page_tokens, cache_bytes, make_forward)
        self.pages = self.forward.pages if self.forward else None
        self.prefixes = PrefixCache(self.pages) if self.pages else None
        self._scheduler = Scheduler(
            self.pages,
            self.prefixes,
            max_rows=max_rows,
            queue=queue,
            prefill_tokens=prefill_tokens,
            idle_prefill_tokens=idle_prefill_tokens,
        )
        self._vocabulary = embedding_rows(self.model)
        self._window = window(self.model.config)
        self._meter = Meter()
        self._changed = threading.Condition()  # guards the scheduler, the tasks and the flags
        self._steps = None
        if self.forward is not None:
            self._steps = Steps(self.forward, self._scheduler, residents, self._meter, self._changed)
        self._tasks: list[Callable[[], None]] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        residents.between_steps = self.between_steps
        if self.forward is not None:
            residents.own_copy, residents.get_ready = self.forward.own_copy, self.forward.get_ready
            for resident in residents.list():
                self.forward.get_ready(resident)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread.

        What is in memory now is left out of garbage collection until the end: to look through a model's objects takes most of
        a second, for which all streams would pause.
        """
        gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="lorakeet-engine", daemon=True)
        self._thread.start()

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Stop taking requests, and end the thread.

        Args:
            drain: Whether the requests under way and waiting are answered first.
            timeout: Seconds to wait for them; the rest is cancelled then.
        """
        with self._changed:
            self._stopping = True
            if not drain:
                self._cancel_all()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                with self._changed:
                    self._cancel_all()
                thread.join()
            gc.unfreeze()

    def _cancel_all(self) -> None:
        for row in self._scheduler.rows():
            row.ticket.cancelled = True

    @property
    def is_running(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread is not None and not self._stopping

    @property
    def is_busy(self) -> bool:
        """Whether requests are under way or waiting."""
        with self._changed:
            return not self._scheduler.idle

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Let a request wait for its turn.

        Raises:
            RequestError: It is out of range, or the model writes no text.
            UnknownAdapter: Its adapter is not served.
            QueueFull: As many requests wait as may.
            EngineStopped: The engine stops.
        """
        limit = self._checked(request)
        adapter = None if request.adapter is None else self.residents.acquire(request.adapter)
        ticket = Ticket(0 if adapter is None else adapter.version, self._wake)
        tokenizer, ends = self.tokenizer, self.ends
        if request.tokenizer is not None and request.tokenizer is not tokenizer:
            tokenizer, ends = request.tokenizer, frozenset(end_tokens(self.model, request.tokenizer))
        row = Row(request, ticket, adapter, tokenizer, limit, ends)
        if self.pages is not None:
            row.root = self.residents.root(adapter)
            row.keys = chain(row.root, request.prompt[:-1], self.pages.page_tokens)
        with self._changed:  # nothing long in here: the thread waits for it between its steps
            is_stopping = self._stopping
            if is_taken := not is_stopping and self._scheduler.add(row):
                self._changed.notify_all()
        if not is_stopping:
            self._meter.note(Event("queued" if is_taken else "refused", row.adapter_name))
        if is_taken:
            return row.ticket
        if adapter is not None:
            self.residents.release(adapter)
        if is_stopping:
            raise EngineStopped("the server stops and takes no further request", "send it again in a while")
        raise QueueFull(f"{self.queue} requests are waiting, as many as may", "try again later")

    def _checked(self, request: Request) -> int:
        """Return the number of new tokens that a request can have.

        Raises:
            RequestError: It is out of range.
        """
        if self.forward is None:
            raise RequestError(f"this is a {self.task.name} model and writes no text", "ask it to classify or to embed")
        check_request(request, self._vocabulary)
        return fitting_tokens(request, self._window, self.pages)

    def encode(self, rows: Sequence[Question], adapter: str | None = None) -> list[dict[str, Any]]:
        """Predict the answer of an encoder's task for each text; see :func:`lorakeet.inference.predict.predict`.

        Raises:
            RequestError: The model writes text.
            UnknownAdapter: The adapter is not served.
            DataError: A row is empty, or not of the form that the task needs.
        """
        if self.task.verb != "predict":
            raise RequestError(f"this is a {self.task.name} model and writes text", "ask it to complete")
        resident = None if adapter is None else self.residents.acquire(adapter)
        try:
            return self.between_steps(lambda: self._predict(rows, resident))
        finally:
            if resident is not None:
                self.residents.release(resident)

    def _predict(self, rows: Sequence[Question], resident: Resident | None) -> list[dict[str, Any]]:
        taught = Taught() if resident is None else resident.taught
        with acting(self.model, [resident]):
            settings: dict[str, Any] = {"max_length": taught.max_length, "pairs": taught.pairs}
            return predict(self.model, self.tokenizer, self.task.name, rows, **settings)

    # -- figures ----------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return the figures of this moment."""
        pages, meter = self.pages, self._meter
        with self._changed:
            return EngineStats(
                waiting=self._scheduler.waiting,
                rows=len(self._scheduler.running),
                pages=len(pages) if pages else 0,
                pages_free=pages.free if pages else 0,
                pages_cached=len(self.prefixes) if self.prefixes else 0,
                steps=self._steps.count if self._steps else 0,
                queue=self.queue,
                max_rows=self.max_rows,
                requests=dict(meter.requests),
                new_tokens=dict(meter.new_tokens),
                prompt_tokens=dict(meter.prompt_tokens),
                cached_tokens=dict(meter.cached_tokens),
            )

    def listen(self, callback: Callable[[Event], None]) -> None:
        """Call ``callback`` with every event of every request; it runs in the engine's thread, so it is brief."""
        self._meter.listen(callback)

    # -- the thread -------------------------------------------------------------------------------------------------

    def between_steps(self, task: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return its result."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            is_other = self._thread is not None and threading.current_thread() is not self._thread
            if is_other:
                self._tasks.append(run)
                self._changed.notify_all()
        if not is_other:
            run()
        return future.result()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop(self) -> None:
        self._measure_pace()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or not self._scheduler.idle or self._stopping)
                tasks, self._tasks = self._tasks, []
                if self._stopping and not tasks and self._scheduler.idle:
                    self._thread = None  # it takes no task any more
                    return
            for task in tasks:
                task()
            if not self._scheduler.idle:
                self._guarded_step()

    def _measure_pace(self) -> None:
        """Measure the steps, before the first one; without their times, prompts are cut by a number of tokens alone."""
        if self.forward is None:
            return
        try:
            self._scheduler.pace.measure(self.forward, self._window)
        except Exception as error:
            warn(f"steps could not be measured: {type(error).__name__}: {error}")

    def _guarded_step(self) -> None:
        """Run one step; one that fails in a way that was not foreseen ends all rows, and the thread goes on."""
        assert self._steps is not None
        try:
            self.step()
        except Exception as error:
            warn(f"a step failed: {type(error).__name__}: {error}")
            self._steps.fail(list(self._scheduler.rows()), str(error))

    def step(self) -> None:
        """Run one step. The thread does; without it, the caller may."""
        assert self._steps is not None
        self._steps.run()
