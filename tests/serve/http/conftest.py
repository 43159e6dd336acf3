"""A server of the tiny model for all tests of this folder, and OpenAI's client for it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from helpers.http_server import ADMIN, USER, serving, tiny_app
from lorakeet.serve.http.access.gate import Gate
from lorakeet.serve.http.access.keys import Keys


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return tiny_app(tmp_path_factory.mktemp("served"), keys=Keys.of([USER], [ADMIN]))


@pytest.fixture(scope="session")
def url(app: Gate) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=USER, max_retries=0)
