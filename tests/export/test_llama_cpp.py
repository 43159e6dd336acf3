"""Exports opened by llama.cpp: the same tokens and nearly the same predictions as here, of merged models and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet import LoraConfig, get_peft_model
from lorakeet.base.load import load_base
from lorakeet.cli import main
from lorakeet.export.gguf.files import write_model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

PROMPTS = ["Two things are infinite: the", "The capital of France is", "In 1492 and 2026 there were"]
#: Format -> mean Kullback-Leibler divergence from the predictions in fp32 at most; llama.cpp rounds keys and values to f16.
DIVERGENCE = {"f16": 2e-4, "bf16": 2e-3, "q8_0": 2e-2}
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
def expected(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tensor, Tensor]:
    """Save an adapter of the embedded base; return its folder, the tokenizer, and the predictions with it and without."""
    base = load_base(str(smollm2), dtype="fp32", device="cpu")
    plain = predictions(base)
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(**SETTINGS))
    with torch.no_grad():
        for layer in model.lora_layers():
            b = layer.lora_B["default"].weight
            b.copy_(0.03 * torch.randn(b.shape, generator=torch.Generator().manual_seed(len(b))))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    adapted = predictions(base)
    assert divergence(adapted, plain) > 10 * max(DIVERGENCE.values())
    return folder, base.tokenizer, adapted, plain


def predictions(base: Any) -> Tensor:
    """Return the log probabilities at every token of the prompts."""
    with torch.no_grad():
        logits = [base.model(**base.tokenizer(prompt, return_tensors="pt")).logits[0] for prompt in PROMPTS]
    return torch.cat(logits).log_softmax(-1)


def llama_predictions(tokenizer: Any, path: Path, lora: Path | None = None) -> Tensor:
    """Return the same of llama.cpp, which must split the prompts into the same tokens."""
    options = {"n_ctx": 256, "n_threads": 2, "logits_all": True, "verbose": False}
    llm = llama_cpp.Llama(str(path), lora_path=None if lora is None else str(lora), **options)
    logits = []
    for prompt in PROMPTS:
        ids = llm.tokenize(prompt.encode(), add_bos=False, special=True)
        assert ids == tokenizer(prompt).input_ids
        llm.reset()
        llm.eval(ids)
        logits.append(torch.tensor(llm.scores[: len(ids)]))
    return torch.cat(logits).log_softmax(-1)


def divergence(truth: Tensor, found: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of predictions from the true ones."""
    return float((truth.exp() * (truth - found)).sum(-1).mean())


@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0"])
def test_a_merged_model_predicts_the_same(expected: Any, smollm2: Path, tmp_path: Path, form: str) -> None:
    folder, tokenizer, adapted, _ = expected
    words = ["export", str(folder), "--for", "merged-gguf", "--out", str(tmp_path / "out"), "--format", form]
    assert main([*words, "--model", str(smollm2)]) == 0
    found = divergence(adapted, llama_predictions(tokenizer, tmp_path / "out/model.gguf"))
    assert found < DIVERGENCE[form]


def test_base_and_adapter_predict_the_same(expected: Any, smollm2: Path, tmp_path: Path) -> None:
    folder, tokenizer, adapted, plain = expected
    base = load_base(str(smollm2), dtype="fp32", device="cpu")
    write_model(tmp_path / "base.gguf", base.model, tokenizer, "SmolLM2", "f16", "smollm")
    words = ["export", str(folder), "--for", "gguf", "--out", str(tmp_path / "out"), "--model", str(smollm2)]
    assert main(words) == 0
    assert divergence(plain, llama_predictions(tokenizer, tmp_path / "base.gguf")) < DIVERGENCE["f16"]
    lora = llama_predictions(tokenizer, tmp_path / "base.gguf", tmp_path / "out/adapter.gguf")
    assert divergence(adapted, lora) < DIVERGENCE["f16"]
