"""Vectors and classes of encoders, with the answers of predict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.http_server import BASE, HTTP, serving
from helpers.tiny_tasks import save_tiny
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.config import BaseSettings
from lorakeet.inference.predict import predict
from lorakeet.loaded_model import open_model
from lorakeet.lora.config import LoraConfig
from lorakeet.serve.http.app import make_app
from lorakeet.serve.http.service import Service
from lorakeet.serve.http.start import Served, open_service
from lorakeet.tasks.task import Task

TEXTS = ["the old parrot", "a green house was seen"]


def opened(folder: Path, served: Served) -> Service:
    settings = BaseSettings(model=str(folder), dtype="fp32")
    return open_service(settings, served)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("encoder") / "base", "bert")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[tuple[str, Any]]:
    service = opened(folder, Served(base_name=BASE, task="FEATURE_EXTRACTION"))
    with serving(make_app(service)) as url:
        yield url, service.opened


def test_vectors_are_those_of_predict(embedder: tuple[str, Any]) -> None:
    url, model = embedder
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    expected = [one["embedding"] for one in predict(model.model, model.base.tokenizer, "FEATURE_EXTRACTION", TEXTS)]
    for form in ("float", "base64", openai.omit):
        found = client.embeddings.create(model=BASE, input=TEXTS, encoding_format=form)
        if form != "base64":
            assert [one.embedding for one in found.data] == [pytest.approx(one, abs=1e-6) for one in expected]
    assert found.usage.prompt_tokens == found.usage.total_tokens > 5
    assert client.embeddings.create(model=BASE, input=TEXTS[0]).data[0].index == 0
    assert f'lorakeet_requests_total{{adapter="{BASE}",finish="stop"}}' in HTTP.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": [1, 2]}, "token ids"),
        ({"input": ["x"] * 257}, "256"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "user": "me"}, "user"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "model": "other"}, "no model"),
    ],
    ids=str,
)
def test_what_is_refused(embedder: tuple[str, Any], fields: dict[str, Any], part: str) -> None:
    got = HTTP.post(f"{embedder[0]}/v1/embeddings", json={"model": BASE, **fields})
    assert got.status_code in (400, 404) and part in got.json()["error"]["message"]


def test_an_encoder_writes_no_text(embedder: tuple[str, Any]) -> None:
    for path, body in {
        "completions": {"prompt": "x"},
        "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "classify": {"input": "x"},
    }.items():
        got = HTTP.post(f"{embedder[0]}/v1/{path}", json={"model": BASE, **body})
        assert got.status_code == 400 and got.json()["error"]["code"] == "wrong_task"


def test_classes_are_those_of_predict(folder: Path, tmp_path: Path) -> None:
    task = Task("SEQ_CLS", "single_label", ("bird", "tool", "food"))
    model = open_model(BaseSettings(model=str(folder), dtype="fp32"), task=task)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    adapted = get_peft_model(model.model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(str(tmp_path / "things"), notes={"task": task.notes()})
    expected = predict(adapted, model.base.tokenizer, "SEQ_CLS", TEXTS)
    service = opened(folder, Served(tmp_path, base_name=BASE))
    with serving(make_app(service)) as url:
        found = HTTP.post(f"{url}/v1/classify", json={"model": "things", "input": TEXTS}).json()["data"]
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert [one["score"] for one in found] == [pytest.approx(one["score"], abs=1e-5) for one in expected]
