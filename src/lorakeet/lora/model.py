"""A model with adapters: the very object that was given, with LoRA layers inside and a few more verbs.

Nothing is wrapped. The model's class becomes a subclass of both :class:`LoraModel` and its own former class (as FSDP2
does), so ``forward``, ``generate``, ``Trainer``, device maps and gradient checkpointing are the architecture's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorakeet.errors import AdapterError, ConfigError, did_you_mean
from lorakeet.log import warn
from lorakeet.lora.combine import combine
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.default_targets import TASK_HEADS, resolve_targets, task_heads
from lorakeet.lora.inject import Part, Plan, inject, plan_injection, restore, set_trainable
from lorakeet.lora.layer import ActiveAdapters, LoraLayer
from lorakeet.lora.merge import MergeReport, checked_merge, untie
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.targeting import ALL_LINEAR

#: In a mixed batch, the name of the base without an adapter; PEFT's.
BARE = "__base__"

_classes: dict[tuple[type, type], type] = {}


class LoraModel(nn.Module):
    """The verbs that a model gains with its first adapter. Never constructed: see :func:`adopt`."""

    peft_config: dict[str, PeftConfig]
    switch: ActiveAdapters
    _parts: list[Part]  # found once an injection, so that switching does not walk the whole model

    # -- which adapters there are, and which answer -----------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that answer, in order."""
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str:
        """The adapter that answers; the first, where several do."""
        return self.switch.active[0]

    def lora_parts(self) -> list[Part]:
        """Every LoRA layer and every module trained whole."""
        return self._parts

    def lora_layers(self) -> list[LoraLayer]:
        """Every LoRA layer."""
        return [part for part in self.lora_parts() if isinstance(part, LoraLayer)]

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, strict: bool = True, **peft_only: Any) -> Plan:
        """Add a further, new adapter on the same base; it is frozen and silent until :meth:`set_adapter`.

        Raises:
            AdapterError: the name is taken or not usable as one.
            TargetError: see :func:`lorakeet.lora.inject.plan_injection`; nothing has been touched then.
            ConfigError: a second adapter beside one that trains the base's own biases.
        """
        refuse_unknown("add_adapter", peft_only, {"low_cpu_mem_usage", "autocast_adapter_dtype"})
        self._check_new(adapter_name, peft_config)
        config = completed(self, peft_config, fresh=strict)
        what = plan_injection(self, config, strict=strict)
        touched = inject(self, what, config, adapter_name, self.switch)
        for part in touched:
            part.set_trainable(adapter_name, False)
            part.train(self.training)
        self._parts = [module for module in self.modules() if isinstance(module, (LoraLayer, SavedModule))]
        self.peft_config[adapter_name] = config
        return what

    def _check_new(self, name: str, config: PeftConfig) -> None:
        if name in self.peft_config:
            raise AdapterError(f"there is an adapter {name!r} already", "choose another name, or delete_adapter first")
        taken = name in ("weight", "bias", BARE) or hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name)
        if not name or "." in name or taken:  # a table of modules has attributes: half, train, keys
            raise AdapterError(
                f"an adapter cannot be named {name!r}", "use letters, digits, '-' and '_', or another word"
            )
        biased = [other for other, known in self.peft_config.items() if known.bias != "none"]
        if self.peft_config and (biased or config.bias != "none"):
            raise ConfigError(
                f"bias={config.bias!r} with another adapter ({', '.join(self.peft_config)}) on the same base: trained "
                "biases belong to the base and would change every adapter",
                "use bias='none', or one adapter a model",
            )
        if any(layer.merged_adapters for layer in self.lora_layers()):
            raise AdapterError("an adapter is merged into the base", "unmerge first")

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let this adapter (or these, summed) answer and, unless ``inference_mode``, learn. No weight changes.

        Raises:
            AdapterError: no such adapter (with the nearest names).
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._known(name)
        parts = self.lora_parts()
        self._refuse_merged("switching would do nothing")
        self._refuse_conflict(names)
        self.switch.active = names
        for part in parts:
            for name in self.peft_config:
                part.set_trainable(name, name in names and not inference_mode)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **peft_only: Any,
    ) -> None:
        """Make a further adapter out of several: ΔW = Σ wᵢ·ΔWᵢ. It is frozen and silent until :meth:`set_adapter`.

        Args:
            adapters: Which; their low-rank pairs are combined, and nothing else.
            weights: One for each, of any sign.
            adapter_name: What to call the new one.
            combination_type: ``cat`` is exact, with a rank as large as all together; ``svd`` the nearest of rank
                ``svd_rank`` (Eckart and Young 1936); ``linear`` adds up the A and the B, which is cheap and has cross terms.
            svd_rank: Left out: the largest rank of the adapters.

        Raises:
            AdapterError: no such adapter; one of them has more than low-rank pairs, or they cannot be combined so.
        """
        refuse_unknown("add_weighted_adapter", peft_only, {"svd_full_matrices", "svd_driver"})
        for name in adapters:
            self._known(name)
        combined = combine(self, adapters, weights, combination_type, svd_rank)
        self.add_adapter(adapter_name, combined.config, strict=False)
        combined.fill(self, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the active one, the first that remains answers, frozen; if none, the bare base."""
        self._known(adapter_name)
        for part in self.lora_parts():
            part.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        self.switch.active = tuple(name for name in self.switch.active if name != adapter_name)
        if not self.switch.active and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)), inference_mode=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the bare base answers; afterwards everything is as it was."""
        before = self.switch.enabled
        if any(config.bias != "none" for config in self.peft_config.values()):
            warn("the biases that were trained belong to the base: disabling the adapter leaves them as they are")
        self._refuse_merged("it cannot be disabled")
        self.switch.enabled = False
        try:
            yield
        finally:
            self.switch.enabled = before

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Inside the block, row i of a batch is answered by ``adapter_names[i]``; ``__base__`` is the bare base.

        ``model(**inputs, adapter_names=...)`` and ``generate(..., adapter_names=...)`` do the same for one call. The base
        runs once for all rows. Inference only.

        Raises:
            AdapterError: no such adapter; in training; while merged; an adapter has target_parameters, whose layers cannot
                tell rows apart; and in ``forward``, if the batch has another number of rows.
        """
        names = tuple(adapter_names)
        for name in names:
            if name != BARE:
                self._known(name)
        if not names:
            raise AdapterError("adapter_names is empty, expected one for each row of the batch")
        if self.training:
            raise AdapterError("a mixed batch is for inference, and the model is in training mode", "call eval() first")
        self._refuse_merged("rows cannot have their own")
        bare_parameters = [
            name for name in dict.fromkeys(names) if name != BARE and self.peft_config[name].target_parameters
        ]
        if bare_parameters:
            raise AdapterError(
                f"adapter {bare_parameters[0]!r} has target_parameters, which see tokens of all rows at once",
                "run one batch for each adapter",
            )
        before, self.switch.rows = self.switch.rows, names
        try:
            yield
        finally:
            self.switch.rows = before

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """``forward``; ``adapter_names``: see :meth:`mixed_batch`."""
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is not None and given.shape[0] != len(adapter_names):
            raise AdapterError(
                f"adapter_names has {len(adapter_names)} names, expected one for each of {given.shape[0]} rows"
            )
        with self.mixed_batch(adapter_names):
            return super().__call__(*args, **kwargs)

    def _refuse_merged(self, what: str) -> None:
        if any(layer.merged_adapters for layer in self.lora_layers()):
            raise AdapterError(f"an adapter is merged into the base, so {what}", "unmerge first")

    def _refuse_conflict(self, names: Sequence[str]) -> None:
        for layer in self.lora_layers():
            if len(names) > 1 and (why := layer.conflict(names)):
                raise AdapterError(
                    f"adapters {', '.join(names)} cannot answer together: {why}", "let one of them answer"
                )

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(
                f"no adapter {name!r}, there is {', '.join(map(repr, self.peft_config)) or 'none'}",
                did_you_mean(name, self.peft_config),
            )

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        *,
        probe: dict[str, torch.Tensor] | None = None,
        tolerance: float | None = None,
        **peft_only: Any,
    ) -> MergeReport:
        """Write ΔW into the base's weights, checked on a probe batch; :meth:`unmerge` puts back the very same bits.

        Args:
            adapter_names: Which adapters; left out: the active ones.
            probe: Keyword arguments of ``forward`` to compare on; left out: a fixed batch of token ids.
            tolerance: Largest accepted difference, as a share of the largest output; left out: by dtype.

        Raises:
            MergeError: merged and unmerged outputs differ by more, or the base cannot be written to. The model is as
                before then.
        """
        refuse_unknown("merge_adapter", peft_only, {"safe_merge"})
        names = list(adapter_names or self.active_adapters)
        for name in names:
            self._known(name)
        self._refuse_conflict(names)
        return checked_merge(self, names, probe=probe, tolerance=tolerance)

    def unmerge(self) -> None:
        """Undo :meth:`merge_adapter`, bit for bit."""
        for layer in self.lora_layers():
            layer.unmerge_()

    unmerge_adapter = unmerge

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        *,
        probe: dict[str, torch.Tensor] | None = None,
        tolerance: float | None = None,
    ) -> nn.Module:
        """Merge (see :meth:`merge_adapter`), then give back the plain model without any LoRA layer.

        Weights that were tied and no longer are (an adapted head, say) are marked so in the model's config.
        ``progressbar`` and ``safe_merge`` are accepted for code written for PEFT; every merge here is checked.
        """
        if not any(layer.merged_adapters for layer in self.lora_layers()):
            self.merge_adapter(adapter_names, probe=probe, tolerance=tolerance)
        for part in self.lora_parts():
            if isinstance(part, LoraLayer):
                part.forget_originals()
            else:
                part.original_module = part.current
        model = self.unload(_merged=True)
        untie(model)
        return model

    def unload(self, _merged: bool = False) -> nn.Module:
        """Take all adapters off; gives back the base model, of its own class again."""
        if not _merged:
            self.unmerge()
        restore(self)
        _, base_class = _parents(type(self))
        del self.peft_config, self.switch, self._parts
        for module in self.modules():
            if module.__dict__.get("model") is self:
                del module.__dict__["model"]
        self.__class__ = base_class
        return self

    # -- what it is -------------------------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The model itself: the base with its LoRA layers inside (PEFT's name)."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that train, all parameters); tied parameters count once. Works on the meta device."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print ``trainable params: T || all params: N || trainable%: P`` to stdout."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable} || all params: {total} || trainable%: {share}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time and cannot be found by name: pickle and deepcopy make it again.
        own, base = _parents(type(self))
        return _blank, (own, base), self.__dict__


def refuse_unknown(verb: str, given: dict[str, Any], harmless: set[str]) -> None:
    """Accept arguments of PEFT's that change nothing here; anything else is a TypeError, as in any function."""
    if unknown := sorted(set(given) - harmless):
        raise TypeError(f"{verb}() got an unexpected keyword argument {unknown[0]!r}")


def completed(model: nn.Module, config: PeftConfig, fresh: bool = True) -> PeftConfig:
    """A copy of ``config`` as it will be saved: targets named, the task's fresh head trained whole, base named.

    Args:
        fresh: whether the adapter is a new one; of a saved one, whose file knows what it has, only the heads of usual names
            are added, as PEFT does.
    """
    targets = resolve_targets(model, config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        targets = _shortest(model, list(targets))
    heads = task_heads(model, config.task_type) if fresh else TASK_HEADS.get(config.task_type or "", [])
    saved = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    copy = config.model_copy(deep=True)
    copy.target_modules, copy.modules_to_save, copy.base_model_name_or_path = targets, saved or None, name or None
    return copy


def _shortest(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of ``names`` if they mean the same layers of ``model``, else the full names."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return leaves if meant == set(names) and not any(leaf.isdigit() for leaf in leaves) else names


def adopt(model: Any, own: type[LoraModel]) -> LoraModel:
    """Give ``model`` the verbs of ``own``, in place. It has no adapter yet."""
    if isinstance(model, LoraModel):
        return model
    backbone = getattr(model, "base_model", None)
    for module in (backbone if isinstance(backbone, nn.Module) else model, model):
        if not hasattr(module, "model"):  # PEFT's path model.base_model.model leads to the model
            module.__dict__["model"] = model
    model.peft_config, model._parts = {}, []
    model.switch = ActiveAdapters()
    model.__class__ = _subclass(own, type(model))
    return model


def start(model: nn.Module, config: PeftConfig, adapter_name: str, own: type[LoraModel]) -> LoraModel:
    """Plan, then inject the first adapter and make it the one that answers and learns."""
    if isinstance(model, LoraModel):
        raise AdapterError("this model has adapters already", "call add_adapter on it")
    plan_injection(model, completed(model, config))  # raises before anything is touched
    adopted = adopt(model, own)
    adopted.add_adapter(adapter_name, config)
    set_trainable(adopted, adopted.peft_config[adapter_name], adopted.lora_parts())
    adopted.set_adapter(adapter_name, inference_mode=config.inference_mode)
    return adopted


def _generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The base's ``generate``; ``adapter_names``: see :meth:`LoraModel.mixed_batch`."""
    _, base = _parents(type(self))
    if adapter_names is None:
        return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]
    with self.mixed_batch(adapter_names):
        return base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]


def _subclass(own: type, base: type) -> type:
    if (own, base) not in _classes:
        more = {"generate": _generate} if hasattr(base, "generate") else {}
        made = type(base.__name__, (own, base), {"__module__": base.__module__, "__doc__": base.__doc__, **more})
        _classes[own, base] = made
    return _classes[own, base]


def _parents(made: type) -> tuple[type, type]:
    return next(key for key, value in _classes.items() if value is made)


def _blank(own: type, base: type) -> Any:
    made: Any = _subclass(own, base)
    return made.__new__(made)
