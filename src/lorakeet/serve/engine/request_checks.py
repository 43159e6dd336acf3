"""Checks of a request before it waits: every number in range, so that no step can fail because of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lorakeet.errors import RequestError
from lorakeet.serve.cache.pages import Pages
from lorakeet.serve.engine.requests import Request, Sampling


def check_request(request: Request, vocabulary: int | None) -> None:
    """Check the prompt and the settings of a request; all complaints at once.

    Args:
        request: The request.
        vocabulary: Rows of the model's embedding; None: unknown.

    Raises:
        RequestError: The prompt is empty or has a token that the model has not, or a setting is out of range.
    """
    problems = [*_prompt_problems(request, vocabulary), *_sampling_problems(request.sampling, vocabulary)]
    if problems:
        raise RequestError("; ".join(problems))


def fitting_tokens(request: Request, window: int | None, pages: Pages | None) -> int:
    """Return the number of new tokens that a request can have.

    Args:
        request: The request.
        window: The model's window, in tokens; None: any number.
        pages: The pool, if there is one.

    Raises:
        RequestError: The prompt fills the window, or prompt and answer do not fit the pool.
    """
    length, limit = len(request.prompt), request.sampling.max_tokens
    if window is not None:
        if length >= window:
            raise RequestError(
                f"the prompt has {length} tokens, expected fewer than the model's window of {window}",
                "shorten the prompt",
            )
        limit = min(limit, window - length)
    if pages is not None and pages.needed(length + limit) > len(pages):
        room = len(pages) * pages.page_tokens
        raise RequestError(
            f"the prompt and its answer may have {length + limit} tokens, expected at most the cache's {room}",
            "ask for fewer new tokens, or give the server a larger cache",
        )
    return limit


def _prompt_problems(request: Request, vocabulary: int | None) -> Iterator[str]:
    if not request.prompt:
        yield "the prompt has no token, expected at least one"
        return
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        yield f"the prompt has token {low if low < 0 else high}, expected 0 to {(vocabulary or 0) - 1}"


def _sampling_problems(sampling: Sampling, vocabulary: int | None) -> Iterator[str]:
    # a comparison with NaN is false, so each condition is stated as what must hold
    if not 0 <= sampling.temperature < math.inf:
        yield f"temperature = {sampling.temperature}: expected 0 or more"
    if not 0 < sampling.top_p <= 1:
        yield f"top_p = {sampling.top_p}: expected more than 0, at most 1"
    if not 0 <= sampling.min_p <= 1:
        yield f"min_p = {sampling.min_p}: expected 0 to 1"
    if sampling.top_k < 0:
        yield f"top_k = {sampling.top_k}: expected 0 or more"
    if sampling.max_tokens < 1:
        yield f"max_tokens = {sampling.max_tokens}: expected 1 or more"
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        yield f"seed = {sampling.seed}: expected an integer of 64 bits"
    if sampling.logprobs is not None and sampling.logprobs < 0:
        yield f"logprobs = {sampling.logprobs}: expected 0 or more"
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(value := getattr(sampling, name)):
            yield f"{name} = {value}: expected a finite number"
    for token, value in sampling.logit_bias.items():
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            yield f"logit_bias has token {token}, expected 0 to {(vocabulary or 0) - 1}"
        if not math.isfinite(value):
            yield f"logit_bias of token {token} is {value}, expected a finite number"
