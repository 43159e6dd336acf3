"""Requirements of the initializations on the layers that they begin from, checked before anything is changed."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.mica import MICA
from lorakeet.lora.initialization.taken_part import takes_part
from lorakeet.quant.protocol import is_quantized, weight_shape

#: Initializations that any layer can have.
_ANYWHERE = (True, False, "gaussian", "eva")


def initialization_error(base: nn.Module | nn.Parameter, config: PeftConfig, r: int) -> str | None:
    """Return why ``init_lora_weights`` cannot initialize an adapter of a layer or parameter; None if it can.

    Args:
        base: The base's layer, or a parameter of ``target_parameters``.
        config: The adapter's settings.
        r: Its rank there.
    """
    how = config.init_lora_weights
    embedding = isinstance(base, nn.Embedding)
    if how in _ANYWHERE or (embedding and how != MICA):
        return None  # an embedding begins as always, as in PEFT
    linear = isinstance(base, (nn.Linear, Conv1D)) or (isinstance(base, nn.Module) and is_quantized(base))
    if not embedding and not linear:
        return f"is a {type(base).__name__}, and init_lora_weights={how!r} is for linear layers"
    if how == "orthogonal" and r % 2:
        return f"has rank {r}, and the orthogonal initialization needs an even one"
    smaller = min(weight_shape(base))
    if (takes_part(how) or how in ("loftq", MICA)) and r > smaller:
        return f"has a weight of rank {smaller} at most, and init_lora_weights={how!r} needs {r} directions"
    return None


def residual_error(config: PeftConfig) -> str | None:
    """Return why an adapter's B·A alone is not its update of the base, by its settings; None if it is."""
    how = config.init_lora_weights
    if how == "loftq":
        return "acts on the quantized base of its training, not on the full one"
    if config.variant.takes_part:
        return f"acts on a base without the part that {config.variant.name} took"
    if not takes_part(how):
        return None
    return f"acts on a base without the part that {how} took; save_pretrained(plain_lora=True) writes it as plain LoRA"
