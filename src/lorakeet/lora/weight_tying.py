"""Plans for embeddings: the rows that are trained, and the layers that share the weight of an adapted embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lorakeet.lora.config import PeftConfig
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.layer_types import unwrapped
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens
from lorakeet.quant.protocol import is_quantized, weight_shape


@dataclass(frozen=True)
class TyingPlan:
    """The layers that the settings choose, and the tied layers that follow the input embedding.

    Attributes:
        layers: Names of layers to adapt.
        saved: Names of modules to train whole.
        tokens: Name of a layer -> the rows to train there.
        tied: Pairs (follower, input embedding).
        errors: Reasons to refuse the settings.
        warnings: Remarks for the user.
    """

    layers: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, list[int]] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def tied_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """List the layers that share one weight with the input embedding, which comes first; empty without one."""
    get_embedding: Any = getattr(model, "get_input_embeddings", lambda: None)
    embedding = get_embedding()
    weight = None if embedding is None else _weight(embedding)
    if weight is None:
        return []
    names = [name for name, module in modules.items() if name and _weight(module) is weight]
    return sorted(names, key=lambda name: modules[name] is not embedding)


def trained_tokens(
    model: nn.Module, config: PeftConfig, modules: Mapping[str, nn.Module], taken: Sequence[str]
) -> tuple[dict[str, list[int]], list[str]]:
    """Find the layers that ``trainable_token_indices`` means.

    Args:
        model: The base model.
        config: The adapter's settings.
        modules: Its modules by name, without those inside adapters.
        taken: Names of layers that are adapted or trained whole.

    Returns:
        Name of a layer -> the rows to train there; and errors.
    """
    wanted, errors = config.trainable_token_indices, []
    if wanted is None:
        return {}, []
    if isinstance(wanted, list):
        embedding = tied_names(model, modules)[:1]
        if not embedding:
            errors.append("trainable_token_indices is a list, but this model does not name its input embedding")
        wanted = dict.fromkeys(embedding, wanted)
    found: dict[str, list[int]] = {}
    for key, tokens in wanted.items():
        names = [name for name in modules if name and name.endswith(key)]
        if not names:
            errors.append(f"trainable_token_indices names {key!r}, which is not in this model")
        for name in names:
            if error := _rows_error(modules[name], name in taken, tokens):
                errors.append(f"trainable_token_indices: {name!r} {error}")
            found[name] = tokens
    return found, errors


def plan_tying(model: nn.Module, config: PeftConfig, modules: Mapping[str, nn.Module], chosen: TyingPlan) -> TyingPlan:
    """Let the layers that share the input embedding's weight follow it.

    Trained rows are tied wherever the weights are, unless the settings name other rows for a tied layer. Adapters and modules
    trained whole are tied only with ``ensure_weight_tying``.

    Args:
        model: The base model.
        config: The adapter's settings.
        modules: The model's modules by name, without those inside adapters.
        chosen: What the settings choose, with nothing tied yet.
    """
    group = tied_names(model, modules)
    if len(group) < 2:
        shared = (
            "the model does not have tied weights: no tied modules were found in the model beside the input embedding"
        )
        return _without_effect(chosen, config, shared)
    if group[0] in chosen.tokens:
        return _tie_tokens(chosen, config, modules, group)
    if not {*chosen.layers, *chosen.saved} & set(group):
        return _without_effect(chosen, config, f"no tied modules are added: {', '.join(group)} share a weight")
    if config.ensure_weight_tying:
        return _tie_weights(chosen, config, modules, group)
    trained = [name for name in (*chosen.layers, *chosen.saved) if name in group]
    if len(trained) == len(group):
        return chosen
    warning = (
        f"{', '.join(group)} share a weight, but only {', '.join(trained)} will be trained, since `ensure_weight_tying` is "
        "not set to True: once merged, they no longer share it"
    )
    return replace(chosen, warnings=(warning,))


def _without_effect(chosen: TyingPlan, config: PeftConfig, reason: str) -> TyingPlan:
    warning = f"ensure_weight_tying=True but {reason}"
    return replace(chosen, warnings=(warning,) if config.ensure_weight_tying else ())


def _tie_tokens(
    chosen: TyingPlan, config: PeftConfig, modules: Mapping[str, nn.Module], group: Sequence[str]
) -> TyingPlan:
    embedding, followers = group[0], group[1:]
    tokens = chosen.tokens[embedding]
    different = [name for name in followers if chosen.tokens.get(name, tokens) != tokens]
    if different and config.ensure_weight_tying:
        error = (
            f"trainable_token_indices names other tokens for {', '.join(different)} than for {embedding}, but "
            "ensure_weight_tying requires the same"
        )
        return replace(chosen, errors=(error,))
    if different:
        return chosen
    return replace(
        chosen,
        tokens={name: rows for name, rows in chosen.tokens.items() if name not in followers},
        tied=tuple((name, embedding) for name in followers),
        errors=_sharing_errors(modules, followers),
    )


def _tie_weights(
    chosen: TyingPlan, config: PeftConfig, modules: Mapping[str, nn.Module], group: Sequence[str]
) -> TyingPlan:
    embedding, followers = group[0], group[1:]
    adapted = [name for name in chosen.layers if name in group]
    tied = tuple((name, embedding) for name in followers)
    if any(name in group for name in chosen.saved):
        saved = (*(name for name in chosen.saved if name not in group), *group)
        errors = tuple(f"{name!r} is adapted, but modules_to_save trains its weight whole" for name in adapted)
        return replace(chosen, saved=saved, tied=tied, errors=errors)
    errors = _sharing_errors(modules, followers)
    if not config.variant.additive or config.variant.parameters:
        errors += (f"ensure_weight_tying does not work with {config.variant.name}",)
    layers = (*(name for name in chosen.layers if name not in group), embedding)
    return replace(chosen, layers=layers, tied=tied, errors=errors)


def _weight(module: nn.Module) -> Any:
    base = unwrapped(module)
    base = base.original_module if isinstance(base, SavedModule) else base
    return base._parameters.get("weight") if isinstance(base, nn.Module) else None


def _rows_error(module: nn.Module, taken: bool, tokens: list[int]) -> str | None:
    """Return why these rows of a layer cannot be trained; None if they can."""
    base = unwrapped(module)
    if not isinstance(base, (nn.Embedding, nn.Linear)) and not is_quantized(base):
        return f"is a {type(base).__name__}, expected an embedding or a head"
    if taken:
        return "is adapted or trained whole already, including these rows"
    if isinstance(module, LoraLayer) and not isinstance(module, TrainableTokens):
        return "is adapted by another adapter in another way"
    rows = weight_shape(base)[0]
    beyond = [token for token in tokens if token >= rows]
    return f"has {rows:,} rows and no token {beyond[0]} (resize_token_embeddings first?)" if beyond else None


def _sharing_errors(modules: Mapping[str, nn.Module], followers: Sequence[str]) -> tuple[str, ...]:
    """Return an error for each follower that another adapter changes in its own way."""
    errors = []
    for name in followers:
        module = modules[name]
        adapted = isinstance(module, LoraLayer) and not isinstance(module, TiedLayer)
        if adapted or isinstance(module, SavedModule):
            errors.append(f"{name!r} shares the embedding's weight, but another adapter changes it in another way")
    return tuple(errors)
