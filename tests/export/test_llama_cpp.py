"""Exports opened by llama.cpp: the same tokens and the same greedy text as here, of a merged model and of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakeet import LoraConfig, get_peft_model
from lorakeet.base.load import load_base
from lorakeet.cli import main
from lorakeet.export.gguf.files import write_model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

PROMPTS = ["Two things are infinite: the", "The capital of France is", "In 1492 and 2026 there were"]
#: Tokens of each completion.
LENGTH = 16
#: Settings whose scales llama.cpp does not read itself.
SETTINGS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "use_rslora": True,
    "alpha_pattern": {"q_proj": 5},
    "rank_pattern": {"down_proj": 4},
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def expected(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """Save an adapter of the embedded base; return its folder, and the greedy texts of the base with it and without."""
    base = load_base(str(smollm2), dtype="fp32", device="cpu")
    plain = [complete(base, prompt) for prompt in PROMPTS]
    model = get_peft_model(base.model, LoraConfig(**SETTINGS))
    with torch.no_grad():
        for layer in model.lora_layers():
            b = layer.lora_B["default"].weight
            b.copy_(0.01 * torch.randn(b.shape, generator=torch.Generator().manual_seed(len(b))))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, [complete(base, prompt) for prompt in PROMPTS], plain


def complete(base: Any, prompt: str) -> str:
    ids = base.tokenizer(prompt, return_tensors="pt")
    made = base.model.generate(**ids, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
    return base.tokenizer.decode(made[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def completed(llm: Any, tokenizer: Any) -> list[str]:
    texts = []
    for prompt in PROMPTS:
        ids = llm.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ids == tokenizer(prompt).input_ids
        texts.append(llm.create_completion(ids, max_tokens=LENGTH, temperature=0.0)["choices"][0]["text"])
    return texts


def opened(path: Path, lora: Path | None = None) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=2, lora_path=None if lora is None else str(lora), verbose=False, seed=0
    )


@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0"])
def test_a_merged_model_writes_the_same_text(expected: Any, smollm2: Path, tmp_path: Path, form: str) -> None:
    folder, texts, plain = expected
    assert texts != plain
    words = ["export", str(folder), "--for", "merged-gguf", "--out", str(tmp_path / "out"), "--format", form]
    assert main([*words, "--model", str(smollm2)]) == 0
    base = load_base(str(smollm2), dtype="fp32", device="cpu")
    found = completed(opened(tmp_path / "out/model.gguf"), base.tokenizer)
    assert found == texts if form == "f16" else found[0][:8] == texts[0][:8]


def test_base_and_adapter_write_the_same_text(expected: Any, smollm2: Path, tmp_path: Path) -> None:
    folder, texts, plain = expected
    base = load_base(str(smollm2), dtype="fp32", device="cpu")
    write_model(tmp_path / "base.gguf", base.model, base.tokenizer, "SmolLM2", "f16", "smollm")
    words = ["export", str(folder), "--for", "gguf", "--out", str(tmp_path / "out"), "--model", str(smollm2)]
    assert main(words) == 0
    assert completed(opened(tmp_path / "base.gguf"), base.tokenizer) == plain
    assert completed(opened(tmp_path / "base.gguf", tmp_path / "out/adapter.gguf"), base.tokenizer) == texts
