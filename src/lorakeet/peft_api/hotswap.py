"""Hot-swapping: another adapter's tensors in the place of those of a loaded one, so that a compiled model stays compiled.

The parameters stay the very same objects, and s may be a tensor, so nothing that ``torch.compile`` guards changes. Lower
ranks are filled up with zeros. The settings follow, so a saved adapter is the one that answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakeet.adapter.serialization import check_base, read_notes, read_tensors
from lorakeet.adapter.tensor_checks import nonfinite_error
from lorakeet.adapter.tensor_names import PREFIX, tensor_names
from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.lora.config import PeftConfig, refuse_unknown
from lorakeet.lora.interop.wrappers import is_compiled
from lorakeet.lora.lifecycle.adapter_files import DOWNLOAD_ARGUMENTS
from lorakeet.lora.lifecycle.merged import merged_names
from lorakeet.lora.linear import LoraPair
from lorakeet.lora.model import LoraModel
from lorakeet.lora.peft_names.words import COMPILED, INCOMPATIBLE, NO_ADAPTER, TOO_LOW
from lorakeet.lora.target_parameters import LoraParameter
from lorakeet.lora.targeting import target_of

#: Settings that both adapters must share, since swapping tensors does not change them.
SHARED = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put a saved adapter in the place of a loaded one, without new parameters.

    Args:
        model: A model with the adapter, compiled or not.
        model_name_or_path: Folder or hub id of the new adapter.
        adapter_name: Name of the loaded one; it stays.
        torch_device: Accepted for code written for PEFT, without effect: the tensors go where the old ones are.
        **kwargs: ``revision``, ``subfolder``, ``allow_other_base``, and the arguments of a download.

    Raises:
        AdapterError: The new adapter has tensors that the model has no place for, NaN or infinite values, or another base.
            Or the old one is merged, or there is none of this name.
    """
    where = {key: kwargs.pop(key) for key in ("revision", "subfolder", *DOWNLOAD_ARGUMENTS) if key in kwargs}
    allow_other_base = kwargs.pop("allow_other_base", False)
    refuse_unknown("hotswap_adapter", kwargs, set())
    inner = _checked(model, adapter_name)
    config = PeftConfig.from_pretrained(model_name_or_path, **where)
    check_hotswap_configs_compatible(inner.peft_config[adapter_name], config)
    if not allow_other_base:
        check_base(model_name_or_path, read_notes(model_name_or_path, **where), inner)
    _swap(inner, adapter_name, config, read_tensors(model_name_or_path, **where))


def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put tensors in the place of a loaded adapter's.

    Args:
        model: A model with the adapter, compiled or not.
        state_dict: The new tensors, by the keys of the model's state dict.
        adapter_name: Name of the loaded adapter.
        config: Settings of the new one.
        parameter_prefix: Accepted for code written for PEFT, without effect.

    Raises:
        AdapterError: As :func:`hotswap_adapter`.
    """
    inner = _checked(model, adapter_name)
    files = {own: key for key, own in tensor_names(inner, adapter_name).items()}
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    _swap(inner, adapter_name, config, {files.get(key, key): tensor for key, tensor in plain.items()})


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse two adapters whose settings differ in what a swap of tensors cannot change.

    Raises:
        AdapterError: With the first setting that differs.
    """
    for key in SHARED:
        one, other = getattr(config0, key), getattr(config1, key)
        if one != other:
            raise AdapterError(
                INCOMPATIBLE.format(key=key, one=one, other=other),
                "load it as an adapter of its own: load_adapter",
            )


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Prepare adapters for swaps that leave a compiled model compiled: s as a tensor, and one rank for all of them.

    Args:
        model: A model with adapters, before it is compiled.
        target_rank: The largest rank of the adapters to come; each adapter is filled up with zeros to it.
        config: Further settings to give the new rank to; those of the model's adapters follow in any case.
        check_compiled: How to meet a model that is compiled already.

    Raises:
        AdapterError: The model is compiled, has no adapter, or one of a higher rank.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        _tell_compiled(check_compiled)
    layers = [layer for _, layer in _pairs(model) if layer.adapters]
    if not layers:
        raise AdapterError(NO_ADAPTER, "load an adapter first")
    if target_rank is not None:
        for layer in layers:
            _check_rank(layer, target_rank)
    for layer in layers:
        for adapter in layer.adapters:
            if target_rank is not None:
                _pad(layer, adapter, target_rank)
            _let_scale_change(layer, adapter)
    inner = getattr(model, "_orig_mod", model)
    for adapter in inner.peft_config if isinstance(inner, LoraModel) else ():
        _settle(inner, adapter)
    if config is not None and target_rank is not None:
        for settings in config.values() if isinstance(config, Mapping) else [config]:
            settings.r = target_rank
            settings.rank_pattern = dict.fromkeys(settings.rank_pattern, target_rank)


def _tell_compiled(how: str) -> None:
    if how == "error":
        raise AdapterError(COMPILED, "check_compiled='warn' goes on")
    if how == "warn":
        warn("prepare_model_for_compiled_hotswap was called with a model that is already compiled: it compiles again")
    elif how != "ignore":
        raise AdapterError(f"check_compiled is {how!r}, expected 'error', 'warn' or 'ignore'")


def _checked(model: Any, adapter: str) -> Any:
    """Return the model inside ``torch.compile``, if a swap of this adapter is possible."""
    inner = model._orig_mod if is_compiled(model) else model
    if not isinstance(inner, LoraModel):
        raise AdapterError("this model has no adapter to swap out", "PeftModel.from_pretrained first")
    if adapter not in inner.peft_config:
        raise AdapterError(
            f"no adapter {adapter!r} to swap out, there is {', '.join(map(repr, inner.peft_config))}",
            "give the name of a loaded one",
        )
    if adapter in merged_names(inner):
        raise AdapterError(f"adapter {adapter!r} is merged into the base, so it cannot be swapped out", "unmerge first")
    return inner


def _pairs(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers whose rank is a size of A and B: linear layers and convolutions, by name."""
    modules = model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, LoraPair) and not isinstance(m, LoraParameter)]


# -- the swap ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _swap(model: LoraModel, adapter: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    names, state = tensor_names(model, adapter), model.state_dict(keep_vars=True)
    if unexpected := sorted(key for key in tensors if key not in names):
        raise AdapterError(
            f"the adapter cannot be swapped in: unexpected keys found: {', '.join(unexpected[:5])}",
            "it adapts other layers: load_adapter",
        )
    if error := nonfinite_error(tensors):
        raise AdapterError(f"the adapter cannot be swapped in: {error}", "train it again")
    for key, own in names.items():
        if key in tensors:
            _put(model, own, state[own], tensors[key])
        elif ".lora_" in own:
            state[own].zero_()  # the new adapter leaves this layer alone
    for name, layer in _pairs(model):
        if adapter in layer.r:
            target = target_of(name, config)
            _set_scale(layer, adapter, config.scaling(target.r, target.alpha))
    _settle(model, adapter)


def _put(model: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Copy a tensor into a parameter; a smaller one into its first ranks, a larger one in its place."""
    new = new.to(old.device, old.dtype)
    if old.ndim != new.ndim or any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
        old.data = new.clone()
        return
    if old.shape == new.shape:
        old.copy_(new)
        return
    layer = model.get_submodule(name.rpartition(".lora_")[0]) if ".lora_" in name else None
    groups = getattr(getattr(layer, "base_layer", None), "groups", 1) if ".lora_A." in name else 1
    old.zero_()
    _first_ranks(old, new.shape, groups).copy_(new.unflatten(0, (groups, -1)) if groups > 1 else new)


def _first_ranks(old: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Return the view of the first ranks; of a grouped convolution's A, of each group's."""
    if groups > 1:
        return old.unflatten(0, (groups, -1))[:, : shape[0] // groups]
    return old[tuple(slice(size) for size in shape)]


def _check_rank(layer: LoraPair, rank: int) -> None:
    groups = getattr(layer.base_layer, "groups", 1)
    if rank % groups:
        raise AdapterError(
            f"the target rank is {rank}, expected one that is divisible by the {groups} groups of a convolution"
        )
    if larger := [r for r in layer.r.values() if r > rank]:
        raise AdapterError(TOO_LOW.format(rank=rank, own=larger[0]), "give the largest rank of all adapters")


@torch.no_grad()
def _pad(layer: Any, adapter: str, rank: int) -> None:
    """Fill A and B up with zeros to a rank; the update stays the same."""
    groups = getattr(layer.base_layer, "groups", 1)
    a, b = layer.pair(adapter)
    for part, dimension in ((a, 0), (b, 1)):
        shape = list(part.weight.shape)
        own = groups if dimension == 0 else 1
        shape[dimension] = rank if dimension == 0 else rank // groups
        padded = part.weight.new_zeros(shape)
        view = _first_ranks(padded, part.weight.shape, own)
        view.copy_(part.weight.unflatten(0, (own, -1)) if own > 1 else part.weight)
        part.weight = nn.Parameter(padded, requires_grad=part.weight.requires_grad)
    for part, names in ((a, ("out_features", "out_channels")), (b, ("in_features", "in_channels"))):
        for name in names:
            if hasattr(part, name):
                setattr(part, name, rank)
    layer.r[adapter] = rank


def _let_scale_change(layer: Any, adapter: str) -> None:
    """Make s a tensor, which may change under a compiled model; the layer then runs step by step, not fused."""
    getattr(layer, "_fused", set()).discard(adapter)
    if not isinstance(layer.scaling[adapter], Tensor):
        layer.scaling[adapter] = torch.tensor(layer.scaling[adapter], device=layer.base_layer.weight.device)


def _set_scale(layer: Any, adapter: str, scale: float) -> None:
    layer.configured_scaling[adapter] = scale
    if isinstance(layer.scaling[adapter], Tensor):
        layer.scaling[adapter].fill_(scale)
    else:
        layer.scaling[adapter] = scale


def _settle(model: LoraModel, adapter: str) -> None:
    """Give the adapter's settings the ranks and α that its layers have now, so that its file says what answers."""
    config = model.peft_config[adapter]
    ranks, alphas = {}, {}
    for name, layer in _pairs(model):
        if adapter in layer.r:
            a, _ = layer.pair(adapter)
            layer.r[adapter] = ranks[name] = len(a.weight)
            root = math.sqrt(ranks[name]) if config.use_rslora else ranks[name]
            alphas[name] = layer.lora_alpha[adapter] = float(f"{layer.configured_scaling[adapter] * root:.12g}")
    if not ranks:
        return
    r, alpha = max(ranks.values()), next(iter(alphas.values()))
    update = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != r},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }
    config.keep(config.model_copy(update=update))
