"""Requests to the engine, the pieces of their answers, and the ticket that stands for an answer under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

#: Reasons for which an answer ends.
Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


class Grammar(Protocol):
    """A state of a grammar that an answer follows, for one request."""

    def allowed(self) -> NDArray[np.bool_]:
        """Return the tokens that may come next, bool [vocabulary] or shorter; tokens beyond its end are not allowed."""

    def accept(self, token: int) -> None:
        """Take a chosen token."""

    def is_complete(self) -> bool:
        """Whether the answer is whole, and nothing may follow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of the choice of tokens, of one request.

    Attributes:
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_p: Share of probability of the smallest set of tokens that is sampled from.
        top_k: Number of tokens that are sampled from; 0: all.
        min_p: Smallest probability of a token, as a share of the most likely one's.
        seed: Seed of the request's own generator; None: another one each time.
        max_tokens: Largest number of new tokens.
        stop: Texts that end the answer, and are not part of it.
        presence_penalty: Subtracted from the logit of each token that the answer has.
        frequency_penalty: The same, for each time that the answer has the token.
        logit_bias: Number to add to a token's logit, by token id.
        logprobs: Number of likely tokens to report at each position, with the chosen one; None: report nothing.
        grammar: Grammar that the answer follows.
        ignore_end: Whether the model's end token is a token like others.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None
    ignore_end: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how its answer is chosen.

    Attributes:
        prompt: Token ids.
        sampling: Settings of the answer.
        adapter: Name of a served adapter; None: the bare base.
        deadline: Time at which the answer ends, finished or not, as ``time.monotonic()`` counts; None: no limit.
        tokenizer: Tokenizer that the adapter was taught with, for the answer's text and its end; None: the base's.
        shown: Special tokens that are part of the answer's text, by id; others are left out of it.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    deadline: float | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    shown: Mapping[int, str] = field(default_factory=dict)


class TokenLogprob(NamedTuple):
    """Log probability of a chosen token, and of the most likely ones; by the model's own logits, without any setting.

    Attributes:
        token: Token id.
        logprob: Natural logarithm of its probability.
        top: Token id and log probability of the most likely tokens, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """Numbers of tokens of a request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        completion_tokens: New tokens, with the end token.
        cached_tokens: Tokens of the prompt whose keys and values were found in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Chunk(NamedTuple):
    """A piece of an answer.

    Attributes:
        text: New text; empty in a last piece that only says how the answer ended.
        tokens: New tokens since the last piece. Their text may follow later.
        logprobs: An entry for each of them, if the request asked.
        finish: Reason for which the answer ends here; None: it goes on.
        error: Sentence about what failed, with ``finish="error"``.
        usage: Numbers of tokens, in the last piece.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish: Finish | None = None
    error: str | None = None
    usage: Usage | None = None


class Completed(NamedTuple):
    """A whole answer; fields as in :class:`Chunk`."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None
    finish: Finish
    error: str | None
    usage: Usage


class Ticket:
    """An answer under way: to iterate over, to wait for, to listen to, to cancel. Usable from any thread.

    Attributes:
        version: Version of the adapter that answers; 0 for the base.
        cancelled: Whether the caller has left.
    """

    def __init__(self, version: int = 0, wake: Callable[[], None] = lambda: None) -> None:
        self.version = version
        self.cancelled = False
        self._wake = wake  # tells the engine that something has changed
        self._chunks: list[Chunk] = []
        self._listeners: list[Callable[[Chunk], None]] = []
        self._changed = threading.Condition()

    def put(self, chunk: Chunk) -> None:
        """Add a piece; called by the engine."""
        with self._changed:
            self._chunks.append(chunk)
            for listener in list(self._listeners):
                try:
                    listener(chunk)
                except Exception:  # its event loop is closed, or the like: the caller has left
                    self._listeners.remove(listener)
                    self.cancelled = True
            self._changed.notify_all()

    def listen(self, callback: Callable[[Chunk], None]) -> None:
        """Call ``callback`` with every piece, in order, those of before too; in the engine's thread, so it is brief."""
        with self._changed:
            for chunk in self._chunks:
                callback(chunk)
            self._listeners.append(callback)

    def cancel(self) -> None:
        """Ask the engine to end the answer; its pages are free within two steps."""
        self.cancelled = True
        self._wake()

    @property
    def done(self) -> bool:
        """Whether the last piece is there."""
        with self._changed:
            return bool(self._chunks) and self._chunks[-1].finish is not None

    def __iter__(self) -> Iterator[Chunk]:
        chunk, position = self._wait_for(0), 0
        while chunk.finish is None:
            yield chunk
            position += 1
            chunk = self._wait_for(position)
        yield chunk

    def _wait_for(self, position: int) -> Chunk:
        with self._changed:
            self._changed.wait_for(lambda: len(self._chunks) > position)
            return self._chunks[position]

    def result(self) -> Completed:
        """Wait for the whole answer."""
        chunks = list(self)
        last = chunks[-1]
        logprobs = None if last.logprobs is None else [one for chunk in chunks for one in chunk.logprobs or ()]
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert last.finish is not None and last.usage is not None
        return Completed("".join(chunk.text for chunk in chunks), tokens, logprobs, last.finish, last.error, last.usage)
