"""Body of ``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorakeet.serve.http.schema.fields import MOST_LOGPROBS, MOST_TOKENS, Refused, SamplingBody, is_text, wrong

#: Prompts of one request.
MOST_PROMPTS = 64
#: Largest id of a token that a body may name; the model's vocabulary is the true limit.
_LARGEST_ID = 1 << 31


def _prompts(value: Any) -> list[str | list[int]]:
    """Return the prompts of a body, each a text or token ids; it has one or a list of them."""
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise wrong("expected a text, a list of texts, a list of token ids, or a list of these lists")
    if len(prompts) > MOST_PROMPTS:
        raise wrong(f"expected at most {MOST_PROMPTS} prompts, got {len(prompts)}")
    if not all(is_text(prompt) or _are_ids(prompt) for prompt in prompts):
        raise wrong("a prompt is empty, or neither a text nor a list of token ids")
    return prompts


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_TOKENS
        and all(type(one) is int and 0 <= one < _LARGEST_ID for one in value)
    )


class CompletionBody(SamplingBody):
    """Body of a completion."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Refused = None
    suffix: Refused = None
