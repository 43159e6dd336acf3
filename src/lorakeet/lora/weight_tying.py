"""Plans for embeddings: which rows are trained, and which layers share the weight of an adapted embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.layer_types import unwrapped
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.targeting import matches
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.quant.protocol import is_quantized, weight_shape


def tied_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Layers that share one weight with the input embedding, which comes first; empty without an input embedding."""
    ask: Any = getattr(model, "get_input_embeddings", lambda: None)
    embedding = ask()
    weight = None if embedding is None else _weight(embedding)
    if weight is None:
        return []
    names = [name for name, module in modules.items() if name and _weight(module) is weight]
    return sorted(names, key=lambda name: modules[name] is not embedding)


def trained_tokens(
    model: nn.Module,
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    taken: Sequence[str],
    complaints: list[str],
) -> dict[str, list[int]]:
    """Name of a layer -> the rows that ``trainable_token_indices`` mean there; what is wrong is added to ``complaints``.

    Args:
        taken: layers that are adapted or trained whole.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    if isinstance(wanted, list):
        embedding = tied_names(model, modules)[:1]
        if not embedding:
            complaints.append("trainable_token_indices is a list, and this model does not tell its input embedding")
        wanted = dict.fromkeys(embedding, wanted)
    found: dict[str, list[int]] = {}
    for key, tokens in wanted.items():
        names = [name for name in modules if name and matches(name, [key])]
        if not names:
            complaints.append(f"trainable_token_indices names {key!r}, which the model has not")
        for name in names:
            if why := _unfit(modules[name], name in taken, tokens):
                complaints.append(f"trainable_token_indices: {name!r} {why}")
            found[name] = tokens
    return found


def tie(
    model: nn.Module,
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    layers: Sequence[str],
    saved: tuple[str, ...],
    tokens: dict[str, list[int]],
    complaints: list[str],
) -> tuple[list[str], tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What is adapted and what is trained whole, once tied layers follow the input embedding; and who follows whom.

    Trained rows are tied wherever the weights are, unless the settings name other rows for a tied layer; low-rank pairs and
    modules trained whole only with ``ensure_weight_tying``. ``tokens`` loses what follows now.

    Returns:
        Layers to adapt, modules to train whole, and pairs (follower, the input embedding).
    """
    group = tied_names(model, modules)
    if len(group) < 2:
        if config.ensure_weight_tying:
            warn("ensure_weight_tying has no effect: no layer of this model shares the weight of the input embedding")
        return list(layers), saved, ()
    embedding, others = group[0], group[1:]
    if embedding in tokens:
        different = [name for name in others if tokens.get(name, tokens[embedding]) != tokens[embedding]]
        if different and config.ensure_weight_tying:
            complaints.append(
                f"trainable_token_indices names other tokens for {', '.join(different)} than for {embedding}, and "
                "ensure_weight_tying means the same"
            )
        if different:
            return list(layers), saved, ()
        for name in others:
            tokens.pop(name, None)
        complaints += [f"{name!r} {why}" for name in others if (why := _taken(modules[name]))]
        return list(layers), saved, tuple((name, embedding) for name in others)
    adapted, whole = [name for name in layers if name in group], [name for name in saved if name in group]
    if not adapted and not whole:
        if config.ensure_weight_tying:
            warn(f"ensure_weight_tying has no effect: nothing is done to {', '.join(group)}, which share a weight")
        return list(layers), saved, ()
    if not config.ensure_weight_tying:
        if len(adapted) + len(whole) < len(group):
            warn(
                f"{', '.join(group)} share a weight, and only {', '.join([*adapted, *whole])} will differ from it: merged, "
                "they no longer share one; ensure_weight_tying changes all of them alike"
            )
        return list(layers), saved, ()
    follows = tuple((name, embedding) for name in others)
    if whole:
        complaints += [f"{name!r} is adapted, and its weight is trained whole elsewhere" for name in adapted]
        return list(layers), (*(name for name in saved if name not in group), *group), follows
    complaints += [f"{name!r} {why}" for name in others if (why := _taken(modules[name]))]
    return [*(name for name in layers if name not in group), embedding], saved, follows


def _weight(module: nn.Module) -> Any:
    below = unwrapped(module)
    below = below.original_module if isinstance(below, SavedModule) else below
    return below._parameters.get("weight") if isinstance(below, nn.Module) else None


def _unfit(module: nn.Module, taken: bool, tokens: list[int]) -> str | None:
    base = unwrapped(module)
    if not isinstance(base, (nn.Embedding, nn.Linear)) and not is_quantized(base):
        return f"is a {type(base).__name__}, expected an embedding or a head"
    if taken:
        return "is adapted or trained whole already, its rows with it"
    if isinstance(module, LoraLayer) and not isinstance(module, TrainableTokens):
        return "is adapted by another adapter in another way"
    rows = weight_shape(base)[0]
    beyond = [token for token in tokens if token >= rows]
    return f"has {rows:,} rows, which leaves no token {beyond[0]} (resize_token_embeddings first?)" if beyond else None


def _taken(module: nn.Module) -> str | None:
    if isinstance(module, SavedModule) or (isinstance(module, LoraLayer) and not isinstance(module, TiedLayer)):
        return "shares the embedding's weight, and another adapter changes it in another way"
    return None
