"""Routes ``/v1/embeddings`` and ``/v1/classify``, for encoders."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from lorakeet.errors import LorakeetError
from lorakeet.facts.special_tokens import text_ids
from lorakeet.serve.http.body import JsonRoute
from lorakeet.serve.http.errors import from_lorakeet
from lorakeet.serve.http.schema.encoders import ClassifyBody, EmbeddingsBody
from lorakeet.serve.http.service import Served, Service

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingsBody, service: Served) -> dict[str, Any]:
    """Return a vector for each text."""
    service.check_task("FEATURE_EXTRACTION")
    found, usage = await run_in_threadpool(_predict, service, body.model, body.input)
    request.app.state.metrics.note_encoded(body.model, usage["prompt_tokens"])
    vectors = [one["embedding"] for one in found]
    if body.encoding_format == "base64":  # what OpenAI's client asks for: fp32 in little endian
        vectors = [base64.b64encode(np.asarray(one, "<f4").tobytes()).decode("ascii") for one in vectors]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(vectors)]
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


@router.post("/v1/classify")
async def classify(request: Request, body: ClassifyBody, service: Served) -> dict[str, Any]:
    """Return the classes of each text, or the tags of its words."""
    service.check_task("SEQ_CLS", "TOKEN_CLS")
    found, usage = await run_in_threadpool(_predict, service, body.model, body.input)
    request.app.state.metrics.note_encoded(body.model, usage["prompt_tokens"])
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model,
        "data": [{"index": index, **one} for index, one in enumerate(found)],
        "usage": usage,
    }


def _predict(service: Service, model: str, rows: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the answers to texts, and the tokens that these have."""
    adapter = service.adapter(model)
    try:
        found = service.engine.encode(rows, adapter)
        return found, service.engine.between_steps(lambda: _usage(service, rows))  # a tokenizer is for one thread
    except LorakeetError as error:
        raise from_lorakeet(error, "input") from None


def _usage(service: Service, rows: Sequence[Any]) -> dict[str, int]:
    """Return the tokens of the texts, before any is cut."""
    texts = [text for row in rows for text in ([row] if isinstance(row, str) else row.values())]
    count = sum(map(len, text_ids(service.tokenizer, texts)))
    return {"prompt_tokens": count, "total_tokens": count}
