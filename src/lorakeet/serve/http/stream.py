"""Streams of server-sent events, in OpenAI's form: an event for each piece, the usage if asked for, and ``[DONE]``."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorakeet.serve.http.answers import Answers
from lorakeet.serve.http.errors import ApiError

#: Last event of a stream.
_DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Answer of events; the answers under way end with it, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], answers: Answers) -> None:
        super().__init__(_encoded(events), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and cancel the rest once the caller has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _encoded(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield events as bytes; an error of an answer that has begun is an event too."""
    try:
        async for event in events:
            yield _event(event)
    except ApiError as error:
        yield _event(error.body())
    yield _DONE


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n\n"
