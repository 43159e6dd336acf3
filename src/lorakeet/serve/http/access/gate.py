"""Gate before every route: name of the host, origin, key, type and size of the body; it fails closed.

The gate is around the whole app, so that a new route needs a key without a line of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakeet.serve.http.access.keys import Keys
from lorakeet.serve.http.errors import ApiError, log_unexpected

#: Paths that need no key: a monitor that only asks whether the process answers.
OPEN = frozenset({"/health"})
#: Name of the host of a caller on the same machine.
_LOCAL = "localhost"


@dataclass(frozen=True)
class Rules:
    """Rules of the gate.

    Attributes:
        keys: Keys that open it.
        hosts: Names that a caller may reach the server by, besides localhost and plain addresses.
        origins: Web pages, such as ``https://example.org``, whose scripts may call.
        largest_body: Bytes.
    """

    keys: Keys
    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    largest_body: int = 1 << 21


class Gate:
    """Middleware that lets a request through, or answers it with an error."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # there are no websockets
        body = _Body(receive, self.rules.largest_body)
        try:
            check(self.rules, scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await _answer(error, scope, receive, send)
            return
        await self._run(scope, body.receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer; its errors end here, since a server would log them with the texts of callers."""
        try:
            await self.app(scope, receive, send)
        except Exception as error:
            log_unexpected(error)


def check(rules: Rules, method: str, path: str, headers: Headers) -> None:
    """Check the head of a request.

    Args:
        rules: Of the server.
        method: Of HTTP.
        path: Of the route.
        headers: Of the request.

    Raises:
        ApiError: The request must not reach its route.
    """
    if not _is_known(headers.get("host", ""), rules.hosts):
        raise ApiError(400, "the name of this host is not one of the server's", param="host", code="unknown_host")
    origin = headers.get("origin")
    if origin is not None and origin not in rules.origins:
        raise ApiError(403, "scripts of this web page may not call the server", param="origin", code="unknown_origin")
    if path not in OPEN and not (method == "OPTIONS" and origin) and not rules.keys.opens(headers.get("authorization")):
        raise ApiError(
            401,
            "no valid key, expected the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    _check_body(headers, rules.largest_body)


def _check_body(headers: Headers, largest: int) -> None:
    length = headers.get("content-length", "0")
    has_body = length != "0" or "transfer-encoding" in headers
    if not length.isascii() or not length.isdigit() or len(length) > 18:
        raise ApiError(400, "content-length is no number of bytes", param="content-length")
    if int(length) > largest:
        raise _too_large(largest)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and kind != "application/json":
        raise ApiError(415, "expected a body with the header `Content-Type: application/json`", param="content-type")


def _too_large(largest: int) -> ApiError:
    return ApiError(413, f"the body is too large, expected at most {largest:,} bytes", code="body_too_large")


class _Body:
    """Body of a request, which is refused once it has more bytes than it may."""

    def __init__(self, receive: Receive, largest: int) -> None:
        self._receive, self._largest, self._read = receive, largest, 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._largest:
                raise _too_large(self._largest)
        return message


def _is_known(host: str, names: Collection[str]) -> bool:
    """Whether a header ``Host`` is a plain address, localhost or one of the names; another name may be a web page's."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() in {_LOCAL, *(one.lower() for one in names)}
    return True


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse(error.body(), error.status_code, headers=error.headers)
    await response(scope, receive, send)
