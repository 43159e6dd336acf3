"""Settings of an adapter that is computed, not trained: plain LoRA with s = 1 and a rank for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakeet.errors import AdapterError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.targeting import target_of


def with_ranks(config: PeftConfig, ranks: Mapping[str, int], **changes: Any) -> PeftConfig:
    """Return the settings with these ranks and s = 1; α equals the rank.

    Args:
        config: Settings of a trained adapter.
        ranks: The rank of each layer, by its name.
        **changes: Further settings.

    Raises:
        AdapterError: The names of layers cannot say these ranks.
    """
    values = list(ranks.values())
    common = max(set(values), key=lambda r: (values.count(r), r))
    own = {name: r for name, r in ranks.items() if r != common}
    scale = {"r": common, "lora_alpha": common, "use_rslora": False, "rank_pattern": own, "alpha_pattern": dict(own)}
    new = config.model_copy(deep=True, update={**changes, **scale})
    if wrong := [name for name, r in ranks.items() if (t := target_of(name, new)).r != r or t.alpha != r]:
        raise AdapterError(
            f"the ranks cannot be written: the name {wrong[0]!r} is the end of another layer's",
            "choose one rank for all layers",
        )
    return new
