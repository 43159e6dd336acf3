"""Parameters of the base that are trained beside an adapter: a norm or an embedding that a person unfroze.

They change the answers, so every adapter of the model is saved with them, under their own names, and restores them. The
notes of the adapter list them. ``modules_to_save`` is the setting that keeps a copy for each adapter instead.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorakeet.adapter.tensor_names import PREFIX, tensor_names
from lorakeet.lora.inject import OWN
from lorakeet.lora.interop.wrappers import canonical
from lorakeet.lora.model import LoraModel

#: Key of the adapter's notes that lists the names.
NOTE = "unfrozen"


def unfrozen_names(model: LoraModel) -> list[str]:
    """List the base's parameters that train, or trained once; the model remembers those that were listed."""
    owned = {name for adapter in model.peft_config for name in tensor_names(model, adapter).values()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned_ids = {id(parameters[name]) for name in owned & parameters.keys()}
    remembered: set[str] = getattr(model, "unfrozen", set())
    names = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in owned_ids
        and not any(mark in name for mark in (*OWN, ".original_module."))
        and (parameter.requires_grad or canonical(name) in remembered)
    ]
    remember(model, names)
    return names


def remember(model: LoraModel, names: Iterable[str]) -> None:
    """Note names of parameters, so that they are saved even if they are frozen again."""
    if more := set(map(canonical, names)):
        model.__dict__["unfrozen"] = getattr(model, "unfrozen", set()) | more


def unfrozen_keys(model: LoraModel, names: Iterable[str]) -> dict[str, str]:
    """Map keys of the file to keys of the state dict for these parameters, as far as the model has them."""
    own = {canonical(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {PREFIX + canonical(name): own[canonical(name)] for name in names if canonical(name) in own}
