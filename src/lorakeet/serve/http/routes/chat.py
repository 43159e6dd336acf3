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
from lorakeet.serve.http.tool_calls import ToolCallReader, tool_form

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatBody, service: Served) -> Response:
    """Continue a conversation with an assistant's turn."""
    service.check_task("CAUSAL_LM")
    adapter = service.adapter(body.model)
    tokenizer, tickets = await run_in_threadpool(_begin, service, body, adapter)
    has_grammar = body.answer_schema is not None or body.forced_tools is not None
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
    schema, forced, grammar = body.answer_schema, body.forced_tools, None
    if schema is not None:
        grammar = service.grammars_of(adapter).for_schema(schema)
    elif forced is not None and form is not None:
        grammar = service.grammars_of(adapter).for_call(form, forced)
    wanted = Wanted(body.longest_answer, body.listed_logprobs, grammar, form.special_ids(tokenizer) if form else {})
    return tokenizer, submit(service.engine, engine_requests(service, body, [ids], adapter, wanted))


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
        content = answer.text
        calls: list[dict[str, Any]] = []
        if (reader := self._reader()) is not None:
            before = reader.add(answer.text)
            rest, calls = reader.end()
            content = before + rest
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": "tool_calls" if calls else answer.finish,
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
        text = chunk.text if reader is None else reader.add(chunk.text)
        calls: list[dict[str, Any]] = []
        if reader is not None and chunk.finish is not None:
            rest, calls = reader.end()
            text += rest
        logprobs = self._logprobs(chunk.logprobs)
        events = [self._event(index, {"content": text}, logprobs)] if text or chunk.logprobs else []
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            events.append(self._event(index, {"tool_calls": numbered}))
        if chunk.finish is not None:
            events.append(self._event(index, {}, finish="tool_calls" if calls else chunk.finish))
        return events

    def _event(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.body.wants_usage else {}
        return {**self.head("chat.completion.chunk"), "choices": [choice], **usage}

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, tokens or ()) if self.body.logprobs else None
