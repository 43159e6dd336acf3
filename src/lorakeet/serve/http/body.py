"""Bodies of requests as JSON: read with limits on depth and numbers, each key once, and in UTF-8 throughout."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from lorakeet.security.json_file import JsonError, parse_json
from lorakeet.serve.http.errors import bad_request


class JsonRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        """Return the value of the body.

        Raises:
            ApiError: It is no JSON that is read here.
        """
        return parse(await self.body())


class JsonRoute(APIRoute):
    """A route that reads bodies as :class:`JsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handler


def parse(content: bytes) -> Any:
    """Return the value of a body.

    Raises:
        ApiError: It is no UTF-8 or no JSON, is nested deeply, has a key twice, or half of a character.
    """
    try:
        value = parse_json(content)
        if b"\\u" in content:  # an escape may be half of a character, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (JsonError, UnicodeError) as error:
        raise bad_request(f"the body is no JSON that is read here: {error}", "body", "invalid_json") from None
    return value
