"""Route ``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from lorakeet.serve.engine.requests import Chunk
from lorakeet.serve.http.answers import CLIENT_LEFT, Answers, Whole, submit
from lorakeet.serve.http.body import JsonRoute
from lorakeet.serve.http.logprobs import chat_logprobs
from lorakeet.serve.http.prompts import chat_ids
from lorakeet.serve.http.requests import Wanted, engine_requests, usage_body
from lorakeet.serve.http.schema.chat import ChatBody
from lorakeet.serve.http.service import Served, Service
from lorakeet.serve.http.stream import EventStream
from lorakeet.serve.http.tools.forms import tool_form
from lorakeet.serve.http.tools.reader import Delta, ToolCallReader, joined

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatBody, service: Served) -> Response:
    """Continue a conversation with an assistant's turn."""
    service.check_task("CAUSAL_LM")
    adapter = service.adapter(body.model)
    tokenizer, tickets, has_grammar = await run_in_threadpool(_begin, service, body, adapter)
    answers = Answers(tickets, prompts=1, has_grammar=has_grammar)
    writer = _Writer(tokenizer, body, f"chatcmpl-{uuid.uuid4().hex}")
    if body.stream:
        return EventStream(writer.events(answers), answers)
    whole = await answers.whole(request)
    if whole is None:
        return Response(status_code=CLIENT_LEFT)
    choices = [writer.choice(index, answer) for index, answer in enumerate(whole)]
    return JSONResponse({**writer.head("chat.completion"), "choices": choices, "usage": usage_body(answers.usage)})


def _begin(service: Service, body: ChatBody, adapter: str | None) -> Any:
    """Render the conversation, compile the grammar, and hand all of it to the engine."""
    ids, tokenizer = chat_ids(service, body, adapter), service.tokenizers.of(adapter)
    form = tool_form(tokenizer) if body.offered_tools else None
    schema, grammar = body.answer_schema, None
    if schema is not None:
        grammar = service.grammars_of(adapter).for_schema(schema)
    elif form is not None and (ruled := body.ruled_tools) is not None:
        grammar = service.grammars_of(adapter).for_calls(form, *ruled)
    wanted = Wanted(body.longest_answer, body.listed_logprobs, grammar, form.special_ids(tokenizer) if form else {})
    tickets = submit(service.engine, engine_requests(service, body, [ids], adapter, wanted))
    return tokenizer, tickets, grammar is not None


@dataclass
class _Writer:
    """Writer of the answers to one conversation."""

    tokenizer: Any
    body: ChatBody
    id: str

    def head(self, kind: str) -> dict[str, Any]:
        """Return the members that every body and event begins with."""
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.body.model}

    def choice(self, index: int, answer: Whole) -> dict[str, Any]:
        """Return a whole answer."""
        reader = self._reader()
        deltas = [{"content": answer.text}] if reader is None else [*reader.add(answer.text), *reader.end()]
        content, calls = joined(deltas)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish if reader is None else reader.finish(answer.finish),
        }

    def _reader(self) -> ToolCallReader | None:
        """Return a reader of calls; None: no tools were offered."""
        tools, form = self.body.offered_tools, tool_form(self.tokenizer)
        return ToolCallReader(form, [tool["function"]["name"] for tool in tools]) if tools and form else None

    async def events(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        readers = [self._reader() for _ in range(len(answers))]
        for index in range(len(answers)):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for index, chunk in answers.pieces():
            for event in self._piece(index, chunk, readers[index]):
                yield event
        if self.body.wants_usage:
            yield {**self.head("chat.completion.chunk"), "choices": [], "usage": usage_body(answers.usage)}

    def _piece(self, index: int, chunk: Chunk, reader: ToolCallReader | None) -> list[dict[str, Any]]:
        if reader is None:
            deltas: list[Delta] = [{"content": chunk.text}] if chunk.text else []
        else:
            deltas = [*reader.add(chunk.text), *(reader.end() if chunk.finish is not None else ())]
        if chunk.logprobs and not deltas:
            deltas = [{"content": ""}]
        logprobs = [self._logprobs(chunk.logprobs), *[None] * len(deltas)]  # those of all tokens, with the first event
        events = [self._event(index, delta, own) for delta, own in zip(deltas, logprobs, strict=False)]
        if chunk.finish is not None:
            finish = chunk.finish if reader is None else reader.finish(chunk.finish)
            events.append(self._event(index, {}, finish=finish))
        return events

    def _event(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.body.wants_usage else {}
        return {**self.head("chat.completion.chunk"), "choices": [choice], **usage}

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, tokens or ()) if self.body.logprobs else None
