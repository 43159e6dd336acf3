"""Requests to the engine out of a body: settings of the sampling, the room for an answer, and the deadline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lorakeet.facts.window import window
from lorakeet.serve.engine.requests import Request, Sampling, Usage
from lorakeet.serve.http.answers import deadline
from lorakeet.serve.http.errors import bad_request
from lorakeet.serve.http.grammar import SchemaGrammar
from lorakeet.serve.http.schema.fields import SamplingBody
from lorakeet.serve.http.service import Service


class Wanted(NamedTuple):
    """Wishes of a body for each answer, beside the settings of the sampling.

    Attributes:
        longest: Tokens at most; None: as many as the window and the server allow.
        logprobs: Likely tokens to report beside each one; None: none.
        grammar: Grammar of the answers, in its first state.
        shown: Special tokens that are part of the text, by id.
    """

    longest: int | None
    logprobs: int | None
    grammar: SchemaGrammar | None = None
    shown: Mapping[int, str] = {}


def engine_requests(
    service: Service, body: SamplingBody, prompts: Sequence[list[int]], adapter: str | None, wanted: Wanted
) -> list[Request]:
    """Return a request for each answer that a body asks for: its prompts in order, and each one's choices in order.

    Args:
        service: The served model.
        body: Settings of the sampling.
        prompts: Token ids of each prompt.
        adapter: Name of the adapter; None: the base.
        wanted: What else the body asks for.

    Raises:
        ApiError: A prompt with its answer does not fit the model's window.
    """
    seconds = service.limits.timeout if body.timeout is None else min(body.timeout, service.limits.timeout)
    end, values, requests = deadline(seconds), body.sampling_values(), []
    tokenizer = service.tokenizers.of(adapter)
    for prompt in prompts:
        values["max_tokens"] = answer_tokens(service, len(prompt), wanted.longest)
        for choice in range(body.choices):
            own = wanted.grammar.copy() if wanted.grammar else None
            sampling = Sampling(**values, seed=body.seed_of(choice), logprobs=wanted.logprobs, grammar=own)
            requests.append(Request(prompt, sampling, adapter, end, tokenizer, wanted.shown))
    return requests


def answer_tokens(service: Service, prompt: int, longest: int | None) -> int:
    """Return the tokens that an answer may have.

    Args:
        service: The served model.
        prompt: Tokens of the prompt.
        longest: Tokens that were asked for; None: as many as there is room for.

    Raises:
        ApiError: There is not enough room.
    """
    size, most = window(service.opened.model.config), service.limits.answer_tokens
    left = most if size is None else size - prompt
    if left < 1 or (longest is not None and longest > left):
        asked = "" if longest is None else f" and {longest:,} for the answer"
        raise bad_request(
            f"the prompt has {prompt:,} tokens{asked}, expected at most {size:,} together",
            "messages" if longest is None else "max_tokens",
            "context_length_exceeded",
        )
    if longest is not None and longest > most:
        raise bad_request(f"max_tokens is {longest:,}, expected at most {most:,} on this server", "max_tokens")
    return min(left, most) if longest is None else longest


def usage_body(usage: Usage) -> dict[str, Any]:
    """Return numbers of tokens in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
