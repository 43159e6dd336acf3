"""Errors of the server in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lorakeet.errors import LorakeetError, UnknownAdapter
from lorakeet.log import log
from lorakeet.security.shown import cut, for_people

#: Status -> type of the error, in OpenAI's words.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
#: Problems of one body that an error lists.
_LISTED = 5
#: Characters of an error's message.
_LONGEST = 1000
#: Parts of a place in a body that pydantic adds: names of variants, such as ``list[str]``.
_MARKS = ("[", "(")


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: Status of HTTP.
        message: One sentence, lower case, no period.
        param: Field of the body that is at fault.
        code: Word for programs, such as ``model_not_found``.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return error_body(self.status_code, str(self.detail), self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an error in OpenAI's form.

    Args:
        status: Status of HTTP, which decides the type.
        message: One sentence.
        param: Field of the body that is at fault.
        code: Word for programs.
    """
    shown = cut(for_people(message), _LONGEST)
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": shown, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return an error of status 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def from_lorakeet(error: LorakeetError, param: str | None = None) -> ApiError:
    """Return an error of a caller's values, with its hint, as one of status 400; 404 if the adapter was unloaded."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, UnknownAdapter):  # it was served when the route looked its name up
        return ApiError(404, message, param="model", code="model_not_found")
    return bad_request(message, param)


def install_handlers(app: FastAPI) -> None:
    """Let every error leave the app in OpenAI's form, without a traceback and without a text of a caller in the log."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        body = error.body() if isinstance(error, ApiError) else error_body(error.status_code, str(error.detail).lower())
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = describe_problems(error.errors())
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(LorakeetError)
    async def not_usable(request: Request, error: LorakeetError) -> JSONResponse:
        answer = from_lorakeet(error)
        return JSONResponse(answer.body(), answer.status_code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server met an error of its own; its log has the place"), 500)


def log_unexpected(error: BaseException) -> None:
    """Log the kind and the place of an error, not its message, which may hold a text of a caller."""
    trace, place = error.__traceback__, "an unknown place"
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    log.error(f"{type(error).__name__} at {place}")


def describe_problems(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Return the message to the problems that pydantic found in a body, and the field of the first."""
    told = dict.fromkeys(f"{_field(one['loc'])}: {_expected(one)}" for one in problems)
    more = f"; and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return "; ".join(list(told)[:_LISTED]) + more, _field(problems[0]["loc"]) if problems else None


def _field(location: Sequence[str | int]) -> str:
    """Return the dotted name of a place in a body, without the variants of a union that were tried."""
    parts = [str(part) for part in location if part != "body"]
    named = [cut(part, 80) for part in parts if not any(mark in part for mark in _MARKS)]
    return ".".join(named) or "body"


def _expected(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "this field is not known here"
    text = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be ", "expected ")
    return text[:1].lower() + text[1:]
