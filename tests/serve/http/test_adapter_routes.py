"""Adapters are loaded by names over one folder, replaced and unloaded while the server answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from helpers.http_server import ADMIN, BASE, HTTP
from lorakeet.serve.http.access.gate import Gate

AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def folder(app: Gate) -> Path:
    return Path(app.app.state.service.engine.residents.folder)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return HTTP.post(url + path, json=body, headers=AS_ADMIN)


def served(url: str) -> dict[str, int]:
    return {one["name"]: one["version"] for one in HTTP.get(f"{url}/v1/adapters", headers=AS_ADMIN).json()["data"]}


def test_load_answer_and_unload(url: str, client: openai.OpenAI) -> None:
    loaded = post(url, "/v1/adapters", name="spare").json()
    assert loaded["name"] == "spare" and set(loaded) == {"object", "name", "version", "digest", "rank", "bytes"}
    assert client.completions.create(model="spare", prompt="hi", max_tokens=2).model == "spare"
    gone = HTTP.delete(f"{url}/v1/adapters/spare", headers=AS_ADMIN)
    assert gone.json() == {"object": "adapter", "name": "spare", "deleted": True} and "spare" not in served(url)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="spare", prompt="hi")
    assert HTTP.delete(f"{url}/v1/adapters/spare", headers=AS_ADMIN).status_code == 404


def test_a_replaced_adapter_answers_by_its_new_weights(url: str, client: openai.OpenAI, folder: Path) -> None:
    shutil.copytree(folder / "red", folder / "green")
    before = post(url, "/v1/adapters", name="green").json()

    def answer(model: str) -> str:
        return client.completions.create(model=model, prompt="A bird", max_tokens=24, temperature=0).choices[0].text

    assert answer("green") == answer("red") != answer("blue")
    shutil.copytree(folder / "blue", folder / "green", dirs_exist_ok=True)
    after = post(url, "/v1/adapters", name="green").json()
    assert after["version"] > before["version"] and after["digest"] != before["digest"]
    assert answer("green") == answer("blue")
    HTTP.delete(f"{url}/v1/adapters/green", headers=AS_ADMIN)


def test_the_names_of_vllm(url: str) -> None:
    loaded = post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="spare")
    assert loaded.status_code == 200 and loaded.text == "Success: LoRA adapter 'second' added successfully."
    assert post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="spare").status_code == 400
    again = post(url, "/v1/load_lora_adapter", lora_name="second", lora_path="spare", load_inplace=True)
    assert again.status_code == 200 and served(url)["second"] > 2
    assert post(url, "/v1/unload_lora_adapter", lora_name="second").status_code == 200
    assert post(url, "/v1/unload_lora_adapter", lora_name="second").status_code == 404


@pytest.mark.parametrize("name", ["../red", "/etc", "a/b", "..", ".", "a\\b", "c:", "red\x00", "", "x" * 300, "%2e%2e"])
@pytest.mark.parametrize("field", ["name", "folder"])
def test_a_path_is_no_name(url: str, name: str, field: str) -> None:
    before = served(url)
    got = post(url, "/v1/adapters", **{"name": "new", field: name})
    assert got.status_code == 400 and served(url) == before, got.text
    got = post(url, "/v1/load_lora_adapter", **{"lora_name": "new", "lora_path": "new", f"lora_{field[0:4]}": name})
    assert got.status_code == 400 and served(url) == before, got.text


def test_a_link_out_of_the_folder_is_not_followed(url: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "red", tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    shutil.copytree(folder / "red", folder / "half")
    (folder / "half" / "adapter_model.safetensors").unlink()
    (folder / "half" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    for name in ("linked", "half"):
        got = post(url, "/v1/adapters", name=name)
        assert got.status_code == 400 and name not in served(url), got.text
    (folder / "linked").unlink()
    shutil.rmtree(folder / "half")


def test_what_is_refused(url: str, folder: Path) -> None:
    assert "the base has this name" in post(url, "/v1/adapters", name=BASE, folder="red").text
    assert post(url, "/v1/adapters", name="new", hub="user/adapter").status_code == 403
    assert post(url, "/v1/adapters", name="new", hub="/etc").status_code == 403
    assert "exclude" in post(url, "/v1/adapters", name="new", hub="user/adapter", folder="red").text
    assert "missing" in post(url, "/v1/adapters", name="missing").text
    (folder / "empty").mkdir()
    assert post(url, "/v1/adapters", name="empty").status_code == 400
    assert set(served(url)) >= {"red", "blue"} and not {"new", "missing", "empty"} & set(served(url))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_adapter_that_goes_after_its_name_was_looked_up(
    url: str, app: Gate, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    service = app.app.state.service
    look_up = service.adapter
    post(url, "/v1/adapters", name="spare")

    def look_up_and_unload(model: str) -> str | None:
        found = look_up(model)
        service.engine.residents.unload("spare")
        return found

    monkeypatch.setattr(service, "adapter", look_up_and_unload)
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    got = post(url, path, model="spare", **prompt)
    assert got.status_code == 404 and got.json()["error"]["code"] == "model_not_found", got.text
