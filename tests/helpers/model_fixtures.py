"""Tiny models as folders that plain transformers wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from helpers.bytewise import byte_tokenizer, llama_config
from lorakeet.base.load import Base, load_base


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model, by default a tiny random Llama, and its tokenizer into a new folder."""

    def save(name: str = "tiny", model: Any = None, **options: Any) -> Path:
        folder = tmp_path / name
        (model or LlamaForCausalLM(llama_config())).save_pretrained(folder, **options)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model()


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(str(folder), dtype="fp32", device="cpu")
