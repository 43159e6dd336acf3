"""Compatibility of an adapter with other tools: which load it, which refuse it, which silently read it wrongly.

From the sources of each tool in 2026: vLLM's ``PEFTHelper``, llama.cpp's ``convert_lora_to_gguf.py`` (which scales by
``lora_alpha`` / rank of the tensor), Ollama's ``convert.go``, mlx-lm's ``tuner``. Tools change, so each answer has a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.requirements import residual_error
from lorakeet.lora.initialization.taken_part import takes_part
from lorakeet.lora.variants.adalora import AdaLora

#: vLLM's choices for --max-lora-rank and its default.
VLLM_RANKS, VLLM_DEFAULT = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16
#: Names of modules_to_save that vLLM accepts.
VLLM_HEADS = ("classifier", "score")
#: Architectures whose adapters Ollama converts itself; llama.cpp's names, here the same as transformers'.
OLLAMA_BASES = ("llama", "gemma2")
#: Architectures (``model_type``) that Lorakeet writes as GGUF.
GGUF_BASES = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
#: Architectures whose modules have the same names in mlx-lm.
MLX_BASES = ("gemma", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2")

#: Tool that an adapter, or a model made with it, can be written for.
Consumer = Literal["peft", "vllm", "gguf", "mlx", "merged", "merged-gguf"]
#: The consumers that get an adapter -> their names in messages.
OF_ADAPTERS: dict[str, str] = {"peft": "peft", "vllm": "vLLM", "gguf": "llama.cpp", "mlx": "mlx-lm"}
#: Ends of the tensors that an adapter of plain LoRA has, and of the base's own beside an adapted embedding.
_PLAIN = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight")


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
    extra = sorted(key for key in keys if not key.endswith(_PLAIN) and "_layernorm" not in key and ".norm" not in key)
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


def exports(
    config: PeftConfig, keys: Iterable[str], ranks: Iterable[int], *, base: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return for each consumer whether ``lorakeet export`` can write for it: ``{"can": bool, "why": [...]}``.

    The reasons of ``can: true`` say what is changed. Scales, ranks and variants are no obstacle, since they are written as
    plain LoRA with s = 1.

    Args:
        config: The adapter's settings.
        keys: Names of the tensors in its file.
        ranks: The ranks of its layers.
        base: The base's architecture (``model_type``), if known.
    """
    keys = list(keys)
    found = {}
    for consumer in get_args(Consumer):
        reasons = _obstacles(consumer, config, keys, max(ranks, default=0), base)
        found[consumer] = {"can": not reasons, "why": reasons or _changes(consumer, config)}
    return found


def _obstacles(consumer: str, config: PeftConfig, keys: list[str], rank: int, base: str | None) -> list[str]:
    """Return the reasons for which an adapter cannot be written for a consumer."""
    bases = {"gguf": GGUF_BASES, "merged-gguf": GGUF_BASES, "mlx": MLX_BASES}.get(consumer)
    wrong_base = bases is not None and base not in (None, *bases)
    reasons = [f"the base is one of {base}, expected one of {', '.join(bases or ())}"] if wrong_base else []
    if consumer in ("vllm", "gguf", "mlx"):
        own = (*config.variant.tensor_names(""), *config.variant.shared_names("", config))
        heads = VLLM_HEADS if consumer == "vllm" else ()
        extra = sorted(
            key
            for key in keys
            if not key.endswith((*_PLAIN, *own)) and not any(f".{head}." in f".{key}" for head in heads)
        )
        reasons += [f"{OF_ADAPTERS[consumer]} takes no tensors but A and B ({extra[0]})"] if extra else []
        reasons += ["the layers of target_parameters have no names there"] if config.target_parameters else []
    if consumer == "vllm" and rank > VLLM_RANKS[-1]:
        reasons.append(f"rank {rank} is above its largest, {VLLM_RANKS[-1]}: make it smaller with lorakeet rank")
    return reasons


def _changes(consumer: str, config: PeftConfig) -> list[str]:
    """Return what the export changes for a consumer."""
    folds = isinstance(config.variant, AdaLora)
    if consumer in ("merged", "merged-gguf") or (consumer == "peft" and is_read_by_peft(config) and not folds):
        return []
    how = "with the singular values in B" if folds else "by an SVD, at a loss"
    changes = [] if not config.variant_settings else [f"{config.variant.name} becomes plain LoRA {how}"]
    if takes_part(config.init_lora_weights):
        changes.append(
            f"{config.init_lora_weights} becomes plain LoRA of twice the rank, on the whole weights of the base"
        )
    scaled = config.use_rslora or config.alpha_pattern or config.lora_alpha != config.r
    changes += ["the scale is multiplied into B"] if scaled and consumer != "peft" else []
    changes += ["all layers get one rank"] if config.rank_pattern and consumer in ("vllm", "mlx") else []
    return changes


def is_plain(config: PeftConfig) -> bool:
    """Whether an adapter is the plain sum W + s·B·A with the whole weight W of its base."""
    return not config.variant_settings and not takes_part(config.init_lora_weights)


def is_read_by_peft(config: PeftConfig) -> bool:
    """Whether PEFT reads an adapter as it is."""
    return "peft" not in config.variant.refused_by
