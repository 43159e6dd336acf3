"""A model with adapters: the very object that was given, with LoRA layers inside and more methods.

Nothing is wrapped. The model's class becomes a subclass of both :class:`LoraModel` and its own former class, as in FSDP2.
So ``forward``, ``generate``, ``Trainer``, device maps and gradient checkpointing are the architecture's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import AdapterError, ConfigError, did_you_mean
from lorakeet.log import warn
from lorakeet.lora.algebra.of_model import CombineMethods
from lorakeet.lora.checks.direct_reads import was_watched, watched_calls
from lorakeet.lora.config import PeftConfig, refuse_unknown
from lorakeet.lora.default_targets import resolve_config
from lorakeet.lora.initialization.loftq import start_from_quantized
from lorakeet.lora.initialization.taken_part import give_back, tell_rounding
from lorakeet.lora.inject import InjectionPlan, Part, inject, plan_injection, release_unused, restore, trained_biases
from lorakeet.lora.interop.peft_classes import AnswersAsPeft
from lorakeet.lora.interop.wrappers import bare
from lorakeet.lora.layer import ActiveAdapters, LoraLayer
from lorakeet.lora.lifecycle.adapter_names import check_adapter_name
from lorakeet.lora.lifecycle.adoption import abandon, blank, parents
from lorakeet.lora.lifecycle.merged import merged_names, take_apart, unmerged
from lorakeet.lora.lifecycle.mixed_batch import check_mixed_batch
from lorakeet.lora.lifecycle.rollback import all_or_nothing
from lorakeet.lora.merge import MergeMethods
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.peft_names.model import ModelNames
from lorakeet.lora.peft_names.words import DELETE_MERGED, TAKEN, UNKNOWN
from lorakeet.quant.protocol import value_count


class LoraModel(AnswersAsPeft, ModelNames, MergeMethods, CombineMethods):
    """The methods that a model gains with its first adapter. Never constructed: see :mod:`.lifecycle.adoption`.

    Attributes:
        peft_config: The settings of each adapter, by name.
        switch: The active adapters, shared with all layers.
    """

    peft_class = ("peft", "PeftModel")
    peft_config: dict[str, PeftConfig]
    switch: ActiveAdapters
    _parts: list[Part]  # collected at each injection, so that switching does not walk the whole model
    _base_biases: list[tuple[nn.Parameter, Tensor]]  # the base's own values, while an adapter trains its biases

    # -- adapters, and which of them are active ---------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in order."""
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; a list, where several are."""
        return self.switch.active[0] if len(self.switch.active) == 1 else list(self.switch.active)

    def lora_parts(self) -> list[Part]:
        """Return every LoRA layer and every module trained whole."""
        return self._parts

    def lora_layers(self) -> list[LoraLayer]:
        """Return every LoRA layer."""
        return [part for part in self.lora_parts() if isinstance(part, LoraLayer)]

    def trains(self, adapter_name: str) -> bool:
        """Whether any parameter of the adapter is trainable."""
        return any(parameter.requires_grad for parameter in self.adapter_parameters(adapter_name))

    def adapter_parameters(self, adapter_name: str) -> list[Tensor]:
        """Return the parameters of one adapter."""
        here = [part for part in self.lora_parts() if adapter_name in part.adapters]
        return [parameter for part in here for parameter in part.parts(adapter_name)]

    def add_adapter(
        self,
        adapter_name: str | PeftConfig,
        peft_config: PeftConfig | str | None = None,
        strict: bool = True,
        autocast_adapter_dtype: bool = True,
        **peft_only: Any,
    ) -> InjectionPlan:
        """Add a further, new adapter on the same base; it is frozen and inactive until :meth:`set_adapter`.

        Args:
            adapter_name: Its name. In the order of transformers, ``(config, name)``, it acts and trains at once.
            peft_config: Its settings; the model keeps the object.
            strict: Whether a name in the settings that matches nothing is an error.
            autocast_adapter_dtype: Keep the adapter in fp32 where the base is in half precision; False: in the base's dtype.
            **peft_only: Arguments that only PEFT has; each is refused by name.

        Raises:
            AdapterError: the name is taken or not usable as one.
            TargetError: see :func:`lorakeet.lora.inject.plan_injection`; nothing has been changed then.
            ConfigError: a second adapter beside one that trains the base's own biases.
        """
        refuse_unknown("add_adapter", peft_only, {"low_cpu_mem_usage"})
        if isinstance(adapter_name, PeftConfig):
            plan = self.add_adapter(name := str(peft_config or "default"), adapter_name, strict, autocast_adapter_dtype)
            self.set_adapter(name)
            return plan
        assert isinstance(peft_config, PeftConfig), f"peft_config is a {type(peft_config).__name__}"
        self._check_new(adapter_name, peft_config)
        bare(self)
        with all_or_nothing(self), unmerged(self):
            release_unused(self)
            config = resolve_config(self, peft_config, fresh=strict)
            plan = plan_injection(self, config, strict=strict)
            for part in inject(self, plan, config, adapter_name, self.switch):
                part.set_trainable(adapter_name, False)
                part.train(self.training)
            self._parts = [module for module in self.modules() if isinstance(module, (LoraLayer, SavedModule))]
            start_from_quantized(self, adapter_name, config, fresh=strict)
            tell_rounding(self, adapter_name)
            if not autocast_adapter_dtype:
                self.store_in_base_dtype(adapter_name)
            biases = trained_biases(self, config, adapter_name)
            self._base_biases = [(bias, bias.detach().clone()) for bias in biases]
            peft_config.keep(config)
            self.peft_config[adapter_name] = peft_config
        return plan

    def _check_new(self, name: str, config: PeftConfig) -> None:
        check_adapter_name(name)
        if name in self.peft_config:
            raise AdapterError(TAKEN.format(adapter=name), "choose another name, or delete_adapter first")
        biased = [other for other, known in self.peft_config.items() if known.bias != "none"]
        if self.peft_config and (biased or config.bias != "none"):
            raise ConfigError(
                f"bias={config.bias!r} with another adapter ({', '.join(self.peft_config)}) on the same base: trained "
                "biases belong to the base and would change every adapter",
                "use bias='none', or one adapter a model",
            )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or the sum of several; they are trainable unless ``inference_mode``.

        A merged model is unmerged first, with a warning.

        Raises:
            AdapterError: no such adapter (with the nearest names), none named, or they cannot act together.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(dict.fromkeys(adapter_name))
        self._check_names(names)
        self._check_conflict(names)
        take_apart(self, f"{', '.join(names)} is activated")
        self.switch.active = names
        for part in self.lora_parts():
            part.switch = self.switch
        for name in self.peft_config:
            self.set_trainable(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them, whether they are active or not.

        Raises:
            AdapterError: no such adapter.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self._check_names(names)
        for name in names:
            self.set_trainable(name, requires_grad)

    def set_trainable(self, adapter_name: str, trainable: bool) -> None:
        """Make the adapter's parameters and the base's biases that it trains trainable, or freeze them."""
        for part in self.lora_parts():
            part.set_trainable(adapter_name, trainable)
        if self.peft_config[adapter_name].bias != "none":
            for bias, _ in self._base_biases:
                bias.requires_grad_(trainable)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first that remains becomes active, frozen.

        Raises:
            AdapterError: no such adapter, or it is merged; nothing has been changed then.
        """
        self._check_known(adapter_name)
        if adapter_name in merged_names(self):
            raise AdapterError(DELETE_MERGED.format(adapters=[adapter_name]), "unmerge_adapter() first")
        with all_or_nothing(self), unmerged(self):
            self.remove_parts(adapter_name)
            del self.peft_config[adapter_name]
            self.switch.active = tuple(name for name in self.switch.active if name != adapter_name)
            if not self.switch.active and self.peft_config:
                successor = next(iter(self.peft_config))
                warn(f"adapter {adapter_name!r} was the active one, now {successor!r} is, frozen")
                self.set_adapter(successor, inference_mode=True)

    def remove_parts(self, adapter_name: str) -> None:
        """Remove the adapter's parameters from all layers, and what it trained of the base; its settings stay."""
        for part in self.lora_parts():
            part.delete_adapter(adapter_name)
        if self.peft_config[adapter_name].bias != "none":
            self._restore_biases()

    @torch.no_grad()
    def _restore_biases(self) -> None:
        """Put the base's own biases back in place of trained ones."""
        for bias, original in self._base_biases:
            bias.requires_grad_(False)
            bias.data = original.to(bias.device)
        self._base_biases = []

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the bare base inside the block; afterwards everything is as it was, also what was merged."""
        if any(config.bias != "none" for config in self.peft_config.values()):
            warn("trained biases belong to the base: disabling the adapter leaves them as they are")
        with unmerged(self), self.switch.disabled():
            yield

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Run row i of a batch with ``adapter_names[i]`` inside the block; ``__base__`` is the bare base.

        ``model(**inputs, adapter_names=...)`` and ``generate(..., adapter_names=...)`` do the same for one call. The base
        runs once for all rows. Inference only.

        Raises:
            AdapterError: no such adapter; in training; while merged; or an adapter has target_parameters, whose layers cannot
                tell rows apart. In ``forward``: the batch has another number of rows.
        """
        check_mixed_batch(self, adapter_names)
        with self.switch.by_row(tuple(adapter_names)):
            yield

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run ``forward``; ``adapter_names``: see :meth:`mixed_batch`."""
        if adapter_names is None and not was_watched(self):
            with watched_calls(self):
                return super().__call__(*args, **kwargs)
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is not None and given.shape[0] != len(adapter_names):
            raise AdapterError(
                f"adapter_names has {len(adapter_names)} names, expected one for each of {given.shape[0]} rows"
            )
        with self.mixed_batch(adapter_names):
            return super().__call__(*args, **kwargs)

    def _check_conflict(self, names: Sequence[str]) -> None:
        for part in self.lora_parts() if len(names) > 1 else ():
            if reason := part.conflict(names):
                raise AdapterError(
                    f"adapters {', '.join(names)} cannot be active together: {reason}", "activate one of them"
                )

    def _check_names(self, names: Sequence[str]) -> None:
        if not names:
            raise AdapterError("no adapter is named, expected at least one", "disable_adapter() runs the bare base")
        for name in names:
            self._check_known(name)

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(
                f"{UNKNOWN.format(adapter=name)}, there is {', '.join(map(repr, self.peft_config)) or 'none'}",
                did_you_mean(name, self.peft_config),
            )

    def unload(self, _merged: bool = False) -> nn.Module:
        """Remove all adapters and what they trained of the base; returns it, of its own class again."""
        with all_or_nothing(self):
            if not _merged:
                self.unmerge()
                self._restore_biases()
            for layer in self.lora_layers():
                give_back(layer)
            restore(self)
            del self.peft_config, self.switch, self._parts, self._base_biases
            self.__dict__.pop("_watched", None)
            abandon(self)
        return self

    # -- what it is -------------------------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """Return the model itself: the base with its LoRA layers inside (PEFT's name)."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count trainable parameters and all parameters; tied parameters count once. Works on the meta device."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad), value_count(self)

    def print_trainable_parameters(self) -> None:
        """Print ``trainable params: T || all params: N || trainable%: P`` to stdout."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable} || all params: {total} || trainable%: {share}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time and cannot be found by name: pickle and deepcopy make it again.
        return blank, parents(type(self)), self.__getstate__()  # torch leaves out what is compiled
