"""Bodies of ``/v1/embeddings`` and ``/v1/classify``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from lorakeet.serve.http.schema.fields import Body, Name, Refused, is_text, wrong

#: Texts of one request.
MOST_TEXTS = 256


def _texts(value: Any) -> list[Any]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or len(texts) > MOST_TEXTS:
        raise wrong(f"expected a text, or a list of 1 to {MOST_TEXTS} texts")
    return texts


def _plain(value: Any) -> list[str]:
    texts = _texts(value)
    if not all(map(is_text, texts)):
        raise wrong("expected texts that are not empty; token ids are not taken")
    return texts


def _pairs(value: Any) -> list[Any]:
    texts = _texts(value)
    for text in texts:
        is_pair = isinstance(text, dict) and text.keys() == {"text", "text_pair"} and all(map(is_text, text.values()))
        if not (is_text(text) or is_pair):
            raise wrong("expected texts that are not empty, or objects with text and text_pair")
    return texts


class EmbeddingsBody(Body):
    """Body of a request for vectors."""

    model: Name
    input: Annotated[list[str], BeforeValidator(_plain)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Refused = None
    user: Refused = None


class ClassifyBody(Body):
    """Body of a request for classes."""

    model: Name
    input: Annotated[list[Any], BeforeValidator(_pairs)]
    user: Refused = None
