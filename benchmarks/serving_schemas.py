"""Answers that keep to a JSON schema beside free ones of the same length: valid texts, and tokens/s.

Usage::

    python benchmarks/serving_schemas.py             # 40 schemas at temperature 1, for 1 and 8 clients

Every schema is asked for by ``response_format``. The same question is then asked without it, for as many tokens, with the end
token forbidden. Both go through the app of the server, on the base in 8 bits. The time of the compilation of a schema counts,
that of the vocabulary, which an idle server reads by itself, does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from lorakeet.config import BaseSettings
from lorakeet.serve.http.app import make_app
from lorakeet.serve.http.start import Served, open_service

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.json_types import TYPES, check_text, schema_of

#: Tokens of the longest answer.
LONGEST = 300


def body_of(name: str, seed: int) -> dict[str, Any]:
    """Return the body of a question for an example of a type."""
    turn = {"role": "user", "content": f"Give an example of: {name}."}
    return {"model": "base", "messages": [turn], "max_tokens": LONGEST, "temperature": 1.0, "seed": seed}


def schema_form(name: str) -> dict[str, Any]:
    """Return the ``response_format`` of a type."""
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema_of(name)}}


def ask(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a body.

    Raises:
        RuntimeError: It has another status than 200.
    """
    answer = client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        raise RuntimeError(f"status {answer.status_code}: {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


def rate(client: TestClient, bodies: list[dict[str, Any]], clients: int) -> tuple[float, list[dict[str, Any]]]:
    """Return tokens/s of all answers, asked for by this number of clients at a time, and the answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: ask(client, body), bodies))
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / (time.perf_counter() - began), answers


def main() -> None:
    """Print the valid texts, and tokens/s with and without schemas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    service = open_service(BaseSettings(bits=8), Served(base_name="base"))
    end = {str(token): -100 for token in service.engine.ends}
    with TestClient(make_app(service), base_url="http://localhost") as client:
        for form in ({}, {"response_format": {"type": "json_object"}}):
            ask(client, {**body_of("nothing", 0), "max_tokens": 8, **form})
        for clients in (1, 8):
            ratios, valid, asked = [], 0, 0
            for seed in range(options.rounds):
                bodies = [{**body_of(name, seed), "response_format": schema_form(name)} for name in TYPES]
                bound, answers = rate(client, bodies, clients)
                for name, answer in zip(TYPES, answers, strict=True):
                    check_text(name, answer["choices"][0]["message"]["content"])
                    valid, asked = valid + (answer["choices"][0]["finish_reason"] == "stop"), asked + 1
                lengths = [answer["usage"]["completion_tokens"] for answer in answers]
                bodies = [
                    {**body_of(name, seed), "max_tokens": length, "logit_bias": end}
                    for name, length in zip(TYPES, lengths, strict=True)
                ]
                free, _ = rate(client, bodies, clients)
                ratios.append(bound / free)
                print(f"{clients} clients, seed {seed}: {bound:.1f} tokens/s with schemas, {free:.1f} without")
            print(f"{clients} clients: {valid} of {asked} valid, {statistics.median(ratios):.3f} of the speed without")


if __name__ == "__main__":
    main()
