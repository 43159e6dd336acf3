"""A request under way: its tokens so far, and the pieces for its ticket."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Many

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakeet.serve.engine.forward import Piece, Sequence
from lorakeet.serve.engine.requests import Chunk, Finish, Request, Ticket, TokenLogprob, Usage
from lorakeet.serve.engine.residents import Resident
from lorakeet.serve.engine.sampling import Sampler
from lorakeet.serve.engine.text import TextStream


class Row:
    """A request that waits or runs.

    Attributes:
        request: The request.
        ticket: Where its pieces go.
        adapter: The version of the adapter that answers; None: the base.
        sequence: Its stored tokens; None while it waits.
        root: Hash that the keys of its pages begin with.
        keys: Keys of the prefix cache for the full pages of the prompt, without its last token.
        cached: Tokens of the prompt that the prefix cache had.
        new: Number of new tokens, with the end token.
        ends: Its end tokens.
        finish: Reason for which it has ended; None: it goes on.
        submitted: Time of submission, as ``time.monotonic()`` counts.
        last_token: Time of the last new token; before the first, of submission.
    """

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        adapter: Resident | None,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.request, self.ticket, self.adapter = request, ticket, adapter
        self.ends = ends
        self.limit = limit  # new tokens: what the request asks for, as far as the window goes
        self.sequence: Sequence | None = None
        self.root = b""
        self.keys: list[bytes] = []
        self.cached = 0
        self.new = 0
        self.finish: Finish | None = None
        self.submitted = self.last_token = time.monotonic()
        self.sampler = Sampler(request.sampling)
        self.tokens = list(request.prompt)
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop, request.shown)
        self._untold: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def adapter_name(self) -> str | None:
        """Public name of the adapter; None: the base."""
        return None if self.adapter is None else self.adapter.name

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not stored yet: a part of the prompt, or the last new token."""
        return len(self.tokens) - (self.sequence.length if self.sequence else 0)

    @property
    def decodes(self) -> bool:
        """Whether the prompt is stored, so that each step gives a new token."""
        return self.new > 0

    def piece(self, most: int) -> Piece:
        """Return the next tokens to store, at most ``most``."""
        assert self.sequence is not None
        start = self.sequence.length
        return Piece(self.sequence, self.tokens[start : start + most])

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take a new token, and tell the ticket what is certain of the text.

        Args:
            token: Its id.
            logprob: Its log probability, if the request asks for it.
        """
        wanted = self.request.sampling
        self.new += 1
        if token in self.ends and not wanted.ignore_end:
            self.end("stop")
            return
        self.sampler.accept(token)
        self.tokens.append(token)
        self._untold.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        text = self._text.add(token)
        is_whole = wanted.grammar is not None and wanted.grammar.is_complete()
        if self._text.stopped or is_whole:
            self.end("stop", text)
        elif self.new >= self.limit:
            self.end("length", text)
        elif text:
            self.ticket.put(self._chunk(text))

    def end(self, finish: Finish, text: str = "", error: str | None = None) -> None:
        """Tell the ticket how the answer ends.

        Args:
            finish: The reason.
            text: Text that was not told yet.
            error: Sentence about what failed.
        """
        if self.finish is None:
            self.finish = finish
            usage = Usage(len(self.request.prompt), self.new, self.cached)
            last = self._chunk(text + self._text.end())
            self.ticket.put(last._replace(finish=finish, error=error, usage=usage))

    def _chunk(self, text: str) -> Chunk:
        wanted = self.request.sampling.logprobs is not None
        chunk = Chunk(text, self._untold, self._logprobs if wanted else None)
        self._untold, self._logprobs = [], []
        return chunk


def choose_all(rows: Many[Row], logits: Tensor) -> list[tuple[int, TokenLogprob | None] | str]:
    """Choose the next token of each row; a sentence instead, for a row that cannot have one.

    Args:
        rows: The rows.
        logits: fp32 [rows, vocabulary].
    """
    on_cpu = logits.cpu()
    sums = on_cpu.sum(dim=-1).tolist()  # finite only if all of them are, and in a fraction of the time
    return [_choice(row, line, total) for row, line, total in zip(rows, on_cpu, sums, strict=True)]


def _choice(row: Row, logits: Tensor, total: float) -> tuple[int, TokenLogprob | None] | str:
    if not math.isfinite(total) and not bool(logits.isfinite().all()):
        return "the model's logits are not finite"
    try:
        return row.sampler.choose(logits)
    except Exception as error:  # of a grammar, which is the caller's
        return f"no token can be chosen: {error}"
