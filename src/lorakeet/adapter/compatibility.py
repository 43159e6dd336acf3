"""Compatibility of an adapter with other tools: which load it, which refuse it, which silently read it wrongly.

From the sources of each tool in 2026: vLLM's ``PEFTHelper``, llama.cpp's ``convert_lora_to_gguf.py`` (which scales by
``lora_alpha`` / rank of the tensor), Ollama's ``convert.go``, mlx-lm's ``tuner``. Tools change, so each answer has a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.taken_part import residual_error

#: vLLM's choices for --max-lora-rank and its default.
VLLM_RANKS, VLLM_DEFAULT = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
#: Names of modules_to_save that vLLM accepts.
VLLM_HEADS = ("classifier", "score")
#: Architectures whose adapters Ollama converts itself; llama.cpp's names, here the same as transformers'.
OLLAMA_BASES = ("llama", "gemma2")


def readers(
    config: PeftConfig,
    keys: Iterable[str],
    ranks: Iterable[int],
    *,
    base: str | None = None,
    problems: Iterable[str] = (),
) -> dict[str, dict[str, Any]]:
    """Return for each tool ``{"can": bool, "why": [...]}``; the reasons of ``can: true`` are conditions.

    Args:
        config: The adapter's settings.
        keys: Names of the tensors in its file.
        ranks: The ranks of its layers.
        base: The base's architecture (``model_type``), if known.
        problems: The reasons for which Lorakeet refuses to load it.
    """
    gguf, gguf_conditions = _gguf(config, list(keys))
    unknown_base = [] if base else [f"if the base is {' or '.join(OLLAMA_BASES)}"]
    answers: dict[str, tuple[list[str], list[str]]] = {  # reasons to refuse, and conditions
        "lorakeet": (list(problems), []),
        "peft": ([], []),
        "vLLM": _vllm(config, max(ranks, default=0)),
        "llama.cpp": (gguf, ["after convert_lora_to_gguf.py", *gguf_conditions]),
        "Ollama": ([*gguf, *_ollama(config, base)], unknown_base + gguf_conditions),
        "mlx-lm": (["it has its own tensor names and config file"], []),
    }
    refused_by = config.variant.refused_by
    residual = residual_error(config)
    found = {}
    for tool, (reasons, conditions) in answers.items():
        reasons = [*reasons, *([refused_by[tool]] if tool in refused_by else [])]
        reasons += [f"it {residual}"] if residual and tool not in ("lorakeet", "peft") else []
        found[tool] = {"can": not reasons, "why": reasons or conditions}
    return found


def _vllm(config: PeftConfig, rank: int) -> tuple[list[str], list[str]]:
    """Return the reasons for which vLLM refuses the adapter, and conditions."""
    heads = [name for name in config.modules_to_save or () if name not in VLLM_HEADS]
    reasons = [f"modules_to_save {', '.join(heads)} is refused"] if heads else []
    reasons += [f"bias={config.bias!r} is refused"] if config.bias != "none" else []
    reasons += ["lora_bias is refused"] if config.lora_bias else []
    reasons += ["the rows of trainable_token_indices are refused"] if config.trainable_token_indices else []
    reasons += [f"rank {rank} is above its largest, {VLLM_RANKS[-1]}"] if rank > VLLM_RANKS[-1] else []
    conditions = []
    if config.target_parameters:
        conditions.append("in a release that reads target_parameters; others silently ignore the experts")
    if VLLM_DEFAULT < rank <= VLLM_RANKS[-1]:
        conditions.append(f"with --max-lora-rank {min(size for size in VLLM_RANKS if size >= rank)}")
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]:
        conditions.append(f"in a release that reads {' and '.join(patterns)}; earlier ones scale wrongly")
    return reasons, conditions


def _gguf(config: PeftConfig, keys: list[str]) -> tuple[list[str], list[str]]:
    """Return the reasons for which llama.cpp cannot load the adapter, and conditions.

    It scales by ``lora_alpha`` / rank of each tensor, so ``rank_pattern`` works.
    """
    reasons = ["use_rslora is ignored, so the update is scaled wrongly"] if config.use_rslora else []
    reasons += ["alpha_pattern is ignored, so some layers are scaled wrongly"] if config.alpha_pattern else []
    reasons += ["it has no names for the tensors of target_parameters"] if config.target_parameters else []
    accepted = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")
    extra = sorted(key for key in keys if not key.endswith(accepted) and "_layernorm" not in key and ".norm" not in key)
    reasons += [f"tensors other than A and B are refused ({extra[0]})"] if extra else []
    head = any(key.endswith("lm_head.lora_A.weight") for key in keys)
    return reasons, ["if the base does not tie lm_head to the embeddings"] if head else []


def _ollama(config: PeftConfig, base: str | None) -> list[str]:
    whole = float(config.lora_alpha).is_integer()
    reasons = [] if whole else [f"lora_alpha={config.lora_alpha} is not a whole number"]
    known = base is None or base in OLLAMA_BASES
    return reasons + (
        [] if known else [f"it converts adapters of {' and '.join(OLLAMA_BASES)} only, this is one of {base}"]
    )
