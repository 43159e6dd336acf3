"""Answers under way: requests handed to the engine, and the pieces that come back to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest

from lorakeet.errors import EngineStopped, LorakeetError, QueueFull
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Chunk, Request, Sampling, Ticket, TokenLogprob, Usage
from lorakeet.serve.http.errors import ApiError, from_lorakeet

#: Seconds after which a caller may try again, once the queue was full.
RETRY_AFTER = 1
#: Status of an answer whose caller has left; it is never read.
CLIENT_LEFT = 499


@dataclass
class Whole:
    """A whole answer."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = "stop"

    def add(self, chunk: Chunk) -> None:
        """Add a piece."""
        self.text += chunk.text
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs or ()
        self.finish = chunk.finish or self.finish


class Answers:
    """Answers to the prompts of one body, under way together.

    Attributes:
        usage: Numbers of tokens, of the answers that have ended.
    """

    def __init__(self, tickets: Sequence[Ticket], prompts: int, has_grammar: bool = False) -> None:
        """Take the pieces of answers.

        Args:
            tickets: Of the answers: those to the first prompt, then those to the next.
            prompts: Number of prompts.
            has_grammar: Whether they keep to a schema of the caller, whose fault it is if they cannot.
        """
        self._tickets, self._has_grammar = tickets, has_grammar
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Chunk]] = asyncio.Queue()
        self._choices = max(1, len(tickets) // max(1, prompts))
        self.usage = Usage(0, 0, 0)
        for index, ticket in enumerate(tickets):
            ticket.listen(lambda chunk, index=index: self._take(index, chunk))  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._tickets)

    def _take(self, index: int, chunk: Chunk) -> None:
        """Give a piece to the event loop; runs in the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, chunk))

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield the pieces of all answers as they come, each with the number of its answer.

        Raises:
            ApiError: One of them failed; the others are cancelled.
        """
        left = len(self._tickets)
        try:
            while left:
                index, chunk = await self._pieces.get()
                if chunk.finish is not None:
                    left -= 1
                    self._count(index, chunk.usage)
                    check_finish(chunk, self._has_grammar)
                yield index, chunk
        finally:
            self.cancel()

    def _count(self, index: int, usage: Usage | None) -> None:
        if usage is not None:
            is_first = index % self._choices == 0  # several answers to one prompt: its tokens count once
            prompt, cached = (usage.prompt_tokens, usage.cached_tokens) if is_first else (0, 0)
            before = self.usage
            self.usage = Usage(
                before.prompt_tokens + prompt,
                before.completion_tokens + usage.completion_tokens,
                before.cached_tokens + cached,
            )

    async def whole(self, request: HttpRequest) -> list[Whole] | None:
        """Wait for all answers; None if the caller left before, which cancels them.

        Raises:
            ApiError: One of them failed.
        """
        collected = asyncio.ensure_future(self._collect())
        left = asyncio.ensure_future(_until_left(request))
        try:
            await asyncio.wait((collected, left), return_when=asyncio.FIRST_COMPLETED)
            return collected.result() if collected.done() else None
        finally:
            self.cancel()
            for task in (collected, left):
                task.cancel()

    async def _collect(self) -> list[Whole]:
        answers = [Whole() for _ in self._tickets]
        async for index, chunk in self.pieces():
            answers[index].add(chunk)
        return answers

    def cancel(self) -> None:
        """End the answers that are still under way."""
        for ticket in self._tickets:
            if not ticket.done:
                ticket.cancel()


def submit(engine: Engine, requests: Sequence[Request]) -> list[Ticket]:
    """Give requests to the engine: all of them or none.

    Raises:
        ApiError: The queue is full, the server stops, or a request is out of range.
    """
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(engine.submit(request))
    except LorakeetError as error:
        for ticket in tickets:
            ticket.cancel()
        raise _refused(error) from None
    return tickets


def _refused(error: LorakeetError) -> ApiError:
    if isinstance(error, QueueFull):
        wait = {"Retry-After": str(RETRY_AFTER)}
        return ApiError(429, "the queue of requests is full; try again later", code="queue_full", headers=wait)
    if isinstance(error, EngineStopped):
        return ApiError(503, "the server is stopping", code="stopping")
    subject = error.message.split()[0]  # of the engine's complaints, the setting comes first
    return from_lorakeet(error, subject if subject in Sampling.__dataclass_fields__ else None)


def check_finish(chunk: Chunk, has_grammar: bool = False) -> None:
    """Check that an answer has ended well.

    Raises:
        ApiError: It has not.
    """
    if chunk.finish == "deadline":
        raise ApiError(408, "the request took longer than its timeout", param="timeout", code="deadline")
    if chunk.finish == "cancelled":
        raise ApiError(503, "the server ended the answer, because it stops", code="stopping")
    if chunk.finish == "error":
        status = 400 if has_grammar else 500
        raise ApiError(status, f"the answer could not be finished: {chunk.error}", code="answer_failed")


def deadline(seconds: float) -> float:
    """Return the end of a span of time, as the engine counts."""
    return time.monotonic() + seconds


async def _until_left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
