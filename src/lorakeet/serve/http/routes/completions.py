"""Route ``/v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from lorakeet.serve.engine.requests import Chunk
from lorakeet.serve.http.answers import CLIENT_LEFT, Answers, submit
from lorakeet.serve.http.body import JsonRoute
from lorakeet.serve.http.logprobs import completion_logprobs
from lorakeet.serve.http.prompts import completion_ids
from lorakeet.serve.http.requests import Wanted, engine_requests, usage_body
from lorakeet.serve.http.schema.completions import CompletionBody
from lorakeet.serve.http.service import Served, Service
from lorakeet.serve.http.stream import EventStream

#: Tokens of an answer where the body does not say; OpenAI's number.
_LENGTH = 16

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody, service: Served) -> Response:
    """Continue texts."""
    service.check_task("CAUSAL_LM")
    adapter = service.adapter(body.model)
    tokenizer, tickets = await run_in_threadpool(_begin, service, body, adapter)
    answers = Answers(tickets, prompts=len(body.prompt))
    writer = _Writer(tokenizer, body, f"cmpl-{uuid.uuid4().hex}")
    if body.stream:
        return EventStream(writer.events(answers), answers)
    whole = await answers.whole(request)
    if whole is None:
        return Response(status_code=CLIENT_LEFT)
    choices = [writer.choice(index, one.text, one.logprobs, one.finish) for index, one in enumerate(whole)]
    return JSONResponse({**writer.head(), "choices": choices, "usage": usage_body(answers.usage)})


def _begin(service: Service, body: CompletionBody, adapter: str | None) -> Any:
    """Tokenize the prompts, and hand them to the engine."""
    prompts = [completion_ids(service, prompt, adapter) for prompt in body.prompt]
    longest = _LENGTH if body.max_tokens is None else body.max_tokens
    requests = engine_requests(service, body, prompts, adapter, Wanted(longest, body.logprobs))
    return service.tokenizers.of(adapter), submit(service.engine, requests)


@dataclass
class _Writer:
    """Writer of the answers to the prompts of one body."""

    tokenizer: Any
    body: CompletionBody
    id: str
    lengths: dict[int, int] = field(default_factory=dict)  # characters of each answer so far

    def head(self) -> dict[str, Any]:
        """Return the members that every body and event begins with."""
        return {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": self.body.model}

    def choice(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return an answer, or a piece of one.

        Args:
            index: Number of the answer.
            text: New text.
            logprobs: Log probabilities of the new tokens.
            finish: Reason for which the answer ends.
        """
        told = None
        if self.body.logprobs is not None:
            told = completion_logprobs(self.tokenizer, logprobs or (), self.lengths.get(index, 0))
            self.lengths[index] = self.lengths.get(index, 0) + sum(map(len, told["tokens"]))
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        usage = {"usage": None} if self.body.wants_usage else {}
        async for index, chunk in answers.pieces():
            if chunk.text or chunk.logprobs or chunk.finish:
                yield {**self.head(), "choices": [self._piece(index, chunk)], **usage}
        if self.body.wants_usage:
            yield {**self.head(), "choices": [], "usage": usage_body(answers.usage)}

    def _piece(self, index: int, chunk: Chunk) -> dict[str, Any]:
        return self.choice(index, chunk.text, chunk.logprobs, chunk.finish)
