"""Settings of PEFT that Lorakeet does not have: kept in files while they are neutral, and left out where they never act."""

from __future__ import annotations

from typing import Any

from lorakeet.log import warn
from lorakeet.lora.variants import variant_settings

#: PEFT's keys that Lorakeet does not implement -> the values that mean "not used".
NEUTRAL: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "use_qalora": False,
}


def without_runtime(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out ``runtime_config``, which no file has: PEFT's wish to move weights to a GPU while DoRA forms a dense one."""
    runtime = values.get("runtime_config")
    if getattr(runtime, "ephemeral_gpu_offload", False) or (isinstance(runtime, dict) and any(runtime.values())):
        warn("ephemeral_gpu_offload has no effect: no dense weight is formed")
    return {key: value for key, value in values.items() if key != "runtime_config"}


def is_neutral(key: str, value: Any) -> bool:
    """Whether a foreign key does not change the result: unset, PEFT's default, or read only when another key is set."""
    if value in (None, False, {}, []) or key in ("megatron_core", "qalora_group_size"):
        return True
    return value == {**NEUTRAL, **variant_settings()}.get(key)
