"""Who can load an adapter as it is, and who would refuse it or, worse, read it wrongly without a word.

Read from the sources of each tool in 2026: vLLM's ``PEFTHelper``, llama.cpp's ``convert_lora_to_gguf.py`` (the scale is
``lora_alpha`` / rank of the tensor), Ollama's ``convert.go``, mlx-lm's ``tuner``. Tools move: the notes say why.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorakeet.lora.config import PeftConfig

#: vLLM's choices for --max-lora-rank and its default.
VLLM_RANKS, VLLM_DEFAULT = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
VLLM_HEADS = ("classifier", "score")
#: Architectures (llama.cpp's names, which are transformers' here) of which Ollama converts adapters itself.
OLLAMA_BASES = ("llama", "gemma2")


def readers(
    config: PeftConfig,
    keys: Iterable[str],
    ranks: Iterable[int],
    *,
    base: str | None = None,
    problems: Iterable[str] = (),
) -> dict[str, dict[str, Any]]:
    """For each tool ``{"can": bool, "why": [...]}``; what stands beside ``can: true`` are conditions.

    Args:
        config: The adapter's settings.
        keys: Names of the tensors in its file.
        ranks: The ranks of its layers.
        base: The base's architecture (``model_type``), if known.
        problems: What Lorakeet refuses to load it for.
    """
    names = list(keys)
    gguf, conditions = _gguf(config, names)
    ollama = [*gguf, *_ollama(config, base)]
    unknown = [] if base else [f"if the base is {' or '.join(OLLAMA_BASES)}"]
    vllm, options = _vllm(config, max(ranks, default=0))
    return {
        "lorakeet": _answer(list(problems), []),
        "peft": _answer([], []),
        "vLLM": _answer(vllm, options),
        "llama.cpp": _answer(gguf, ["after convert_lora_to_gguf.py", *conditions]),
        "Ollama": _answer(ollama, unknown + conditions),
        "mlx-lm": _answer(["it has tensor names and a config file of its own"], []),
    }


def _answer(reasons: list[str], conditions: list[str]) -> dict[str, Any]:
    return {"can": not reasons, "why": reasons or conditions}


def _vllm(config: PeftConfig, rank: int) -> tuple[list[str], list[str]]:
    """(why not, on which conditions)."""
    heads = [name for name in config.modules_to_save or () if name not in VLLM_HEADS]
    reasons = [f"modules_to_save {', '.join(heads)} is refused"] if heads else []
    reasons += [f"bias={config.bias!r} is refused"] if config.bias != "none" else []
    reasons += ["lora_bias is refused"] if config.lora_bias else []
    reasons += ["the rows of trainable_token_indices are refused"] if config.trainable_token_indices else []
    reasons += [f"rank {rank} is above its largest, {VLLM_RANKS[-1]}"] if rank > VLLM_RANKS[-1] else []
    conditions = []
    if config.target_parameters:
        conditions.append("in a release that reads target_parameters, as others pass the experts by without a word")
    if VLLM_DEFAULT < rank <= VLLM_RANKS[-1]:
        conditions.append(f"with --max-lora-rank {min(size for size in VLLM_RANKS if size >= rank)}")
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]:
        conditions.append(f"in a release that reads {' and '.join(patterns)}, as earlier ones scale wrongly")
    return reasons, conditions


def _gguf(config: PeftConfig, keys: list[str]) -> tuple[list[str], list[str]]:
    """(why llama.cpp cannot, on which conditions). It scales by ``lora_alpha`` / rank: own ranks are no trouble."""
    reasons = ["use_rslora is ignored, so the update is scaled wrongly"] if config.use_rslora else []
    reasons += ["alpha_pattern is ignored, so some layers are scaled wrongly"] if config.alpha_pattern else []
    reasons += ["it has no names for the pairs of target_parameters"] if config.target_parameters else []
    passed = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")
    extra = sorted(key for key in keys if not key.endswith(passed) and "_layernorm" not in key and ".norm" not in key)
    reasons += [f"tensors that are no low-rank pair are refused ({extra[0]})"] if extra else []
    head = any(key.endswith("lm_head.lora_A.weight") for key in keys)
    return reasons, ["if the base does not tie lm_head to the embeddings"] if head else []


def _ollama(config: PeftConfig, base: str | None) -> list[str]:
    whole = float(config.lora_alpha).is_integer()
    reasons = [] if whole else [f"lora_alpha={config.lora_alpha} is no whole number"]
    known = base is None or base in OLLAMA_BASES
    return reasons + ([] if known else [f"it converts adapters of {' and '.join(OLLAMA_BASES)} only, this is {base}"])
