"""Tensors of the base that are trained beside an adapter: a norm that a person unfroze, the means of a batch norm.

They change the answers, so every adapter of the model is saved with them, under their own names, and restores them. The
notes of the adapter list them. ``modules_to_save`` is the setting that keeps a copy for each adapter instead.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakeet.adapter.tensor_names import PREFIX, tensor_names
from lorakeet.lora.inject import OWN
from lorakeet.lora.interop.wrappers import canonical
from lorakeet.lora.model import LoraModel

#: Key of the adapter's notes that lists the names.
NOTE = "unfrozen"


def unfrozen_names(model: LoraModel) -> list[str]:
    """List the base's tensors that train, or trained once; the model remembers those that were listed.

    These are parameters, and the running means and variances of batch norms in training mode.
    """
    owned = {name for adapter in model.peft_config for name in tensor_names(model, adapter).values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned_ids = {id(parameters[name]) for name in owned & parameters.keys()}
    remembered: set[str] = getattr(model, "unfrozen", set())
    names = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in owned_ids and (parameter.requires_grad or canonical(name) in remembered)
    ]
    names += [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for name, _ in module.named_buffers(recurse=False)
        if module.training or canonical(f"{path}.{name}") in remembered
    ]
    names = [name for name in names if not any(mark in name for mark in (*OWN, ".original_module."))]
    remember(model, names)
    return names


def remember(model: LoraModel, names: Iterable[str]) -> None:
    """Note names of parameters, so that they are saved even if they are frozen again."""
    if more := set(map(canonical, names)):
        model.__dict__["unfrozen"] = getattr(model, "unfrozen", set()) | more


def unfrozen_keys(model: LoraModel, names: Iterable[str]) -> dict[str, str]:
    """Map keys of the file to keys of the state dict for these tensors, as far as the model has them."""
    own = {canonical(name): name for name in model.state_dict()}
    return {PREFIX + canonical(name): own[canonical(name)] for name in names if canonical(name) in own}
