"""The contract of a layer with adapters: its output, its adapters, and its weight while they are merged.

:class:`LoraLayer` wraps a frozen base layer and holds any number of adapters by name. :class:`ActiveAdapters`, shared by all
layers of a model, holds the names of those that act. There is a subclass for each layer type: :mod:`lorakeet.lora.linear`
(with the equation), :mod:`~lorakeet.lora.embedding`, :mod:`~lorakeet.lora.conv`, :mod:`~lorakeet.lora.target_parameters` and
:mod:`~lorakeet.lora.trainable_tokens`. An adapter's equation is its variant's (:mod:`lorakeet.lora.variants`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.errors import AdapterError
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.mica import MICA
from lorakeet.lora.initialization.taken_part import TABLE, add_idle_parts, give_back, leave_part
from lorakeet.lora.interop.peft_classes import AnswersAsPeft
from lorakeet.lora.lifecycle.merged import refuse_gradient
from lorakeet.lora.peft_names.layer import LayerNames
from lorakeet.lora.variants import Variant
from lorakeet.lora.variants.host import VariantHost
from lorakeet.quant.protocol import dense_weight, is_quantized, weight_dtype


@dataclass
class ActiveAdapters:
    """The adapters that act, shared by all layers of a model: switching is one assignment.

    Attributes:
        active: Names of the adapters whose updates are summed.
        enabled: Whether any adapter acts.
        rows: In a mixed batch, the adapter of each row; None otherwise.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: tuple[str, ...] | None = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let no adapter act inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def by_row(self, rows: tuple[str, ...]) -> Iterator[None]:
        """Let each row of a batch have its own adapter inside the block."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class LoraLayer(AnswersAsPeft, LayerNames, VariantHost):
    """A frozen base layer and its adapters. A subclass computes the low-rank output of one layer type.

    Attributes:
        base_layer: The adapted module; it answers ``forward``, ``weight`` and ``bias``.
        switch: The adapters that act.
        r: Rank of each adapter, by name.
        lora_alpha: α of each adapter.
        scaling: s of each adapter.
        configured_scaling: s of each adapter as its settings give it, without a later ``set_scale``.
        use_rslora: Whether s is α/√r, of each adapter.
        lora_dropout: Dropout of each adapter's input, as a module; an ``Identity`` where there is none.
        variants: Variant of each adapter.
        notes: Values that the variant of an adapter keeps.
        frozen_b: Adapters whose B is never trained (MiCA).
        originals: The base layer's parameters before a merge, by name.
        merged_adapters: Names of the merged adapters.
    """

    peft_class = ("peft.tuners.tuners_utils", "BaseTunerLayer")
    linear = False  # whether target_modules="all-linear" includes the layer type
    shown_as = "LoraLayer"  # name in the model's repr; PEFT's
    base_layer: Any

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.configured_scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.variants: dict[str, Variant] = {}
        self.notes: dict[str, Any] = {}
        self.frozen_b: set[str] = set()
        self.originals: dict[str, Tensor] = {}
        self.merged_adapters: list[str] = []

    # -- what a layer type answers ----------------------------------------------------------------------------------

    @classmethod
    def rank_error(cls, base_layer: nn.Module, r: int) -> str | None:
        """Return why an adapter of rank r does not fit ``base_layer``; None if it does."""
        return None

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        """Create the adapter's A and B, not yet initialized."""
        raise NotImplementedError

    def initialize(self, adapter: str, how: bool | str) -> None:
        """Initialize A and B as ``init_lora_weights`` says."""
        raise NotImplementedError

    def low_rank(self, adapter: str, dropped: Tensor) -> Tensor:
        """Compute s·B·A·x for an input after dropout, in the adapter's dtype."""
        raise NotImplementedError

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A [r, in] and B [out, r], of a convolution with the kernel flattened into ``in``."""
        raise NotImplementedError

    def delta(self, adapter: str) -> Tensor:
        """Return s·B·A in the base weight's layout, in the adapter's dtype. The only place that forms it."""
        raise NotImplementedError

    def parts(self, adapter: str) -> list[Tensor]:
        """Return the adapter's parameters in this layer."""
        raise NotImplementedError

    def dropped(self, adapter: str, x: Tensor) -> Tensor:
        """Return dropout(x); ``x`` itself where no dropout acts."""
        return x

    def tensor_names(self, adapter: str) -> dict[str, str]:
        """Map names in the adapter's file to names in the state dict, both relative to this layer."""
        raise NotImplementedError

    def probe(self) -> Tensor:
        """Return a fixed pseudo-random input of :meth:`forward`, to compare merged and unmerged outputs."""
        raise NotImplementedError

    def merge_error(self) -> str | None:
        """Return why no weight of the base's shape can hold the update; None if one can."""
        return None

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the base layer's output and apply the active adapters; in a mixed batch, to each row its own."""
        h = self.base_layer(x, *args, **kwargs)
        if TABLE in self._modules:
            h = add_idle_parts(self, self.merged_adapters or self.acting, x, h)
        if self.switch.rows is not None and self.switch.enabled:
            return self._forward_by_row(x, h, self.switch.rows)
        if self.merged_adapters and self.training:
            return refuse_gradient(h, [part for name in self.merged_adapters for part in self.parts(name)])
        for adapter in self.acting:
            h = self.update(adapter, x, h)
        return h

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        """Apply the adapter to the output ``h`` for the input ``x``."""
        return self.variants[adapter].update(self, adapter, x, h)

    def dropout_probability(self, adapter: str) -> float:
        """Return the probability of the adapter's dropout."""
        # straight to the table, as nn.Module's attribute look-up is slow; an Identity has no p
        return self._modules["lora_dropout"]._modules[adapter].__dict__.get("p", 0.0)  # type: ignore[union-attr]

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have a part here."""
        return list(self.r)

    @property
    def acting(self) -> list[str]:
        """The adapters that act on all rows; none while merged, since the weight holds them."""
        if not self.switch.enabled or self.merged_adapters or self.switch.rows is not None:
            return []
        return [adapter for adapter in self.switch.active if adapter in self.r]

    def _forward_by_row(self, x: Tensor, h: Tensor, rows: tuple[str, ...]) -> Tensor:
        for adapter, indices in row_indices(rows, x):
            if adapter in self.r:
                own = leave_part(self, adapter, x[indices], h[indices])
                h = h.index_copy(0, indices, self.update(adapter, x[indices], own))
        return h

    # -- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter: str, config: PeftConfig, r: int, alpha: float) -> None:
        """Give the layer a further adapter.

        Args:
            adapter: The adapter's name.
            config: Its settings.
            r: Its rank in this layer.
            alpha: Its α in this layer.
        """
        self.variants[adapter] = config.variant
        self.make(adapter, config, r)
        self._note_settings(adapter, config, r, alpha)
        config.variant.init(self, adapter, config)

    def _note_settings(self, adapter: str, config: PeftConfig, r: int, alpha: float) -> None:
        """Keep the rank, α, s and dropout of an adapter; arguments as in :meth:`add_adapter`."""
        self.r[adapter], self.lora_alpha[adapter] = r, alpha
        self.scaling[adapter] = config.variant.scaling(config, r, alpha)
        self.configured_scaling[adapter] = self.scaling[adapter]
        self.use_rslora[adapter] = config.use_rslora
        self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        if config.init_lora_weights == MICA:
            self.frozen_b.add(adapter)

    def delete_adapter(self, adapter: str) -> None:
        """Remove the adapter and its parameters; the base's weight gets the part back that the adapter took of it."""
        give_back(self, [adapter])
        self.delete_parts(adapter)
        self.frozen_b.discard(adapter)
        for table in (self.r, self.lora_alpha, self.scaling, self.configured_scaling, self.use_rslora, self.variants):
            table.pop(adapter, None)
        if adapter in self.lora_dropout:
            del self.lora_dropout[adapter]

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Make the adapter's parameters trainable, or freeze them."""
        if adapter in self.r:
            fixed = self.parts(adapter)[1] if adapter in self.frozen_b else None  # A, B, and further ones
            for parameter in self.parts(adapter):
                parameter.requires_grad = trainable and parameter is not fixed

    def conflict(self, adapters: Sequence[str]) -> str | None:
        """Return why these adapters cannot act together here; None if they can."""
        return None

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_(self, adapters: list[str]) -> None:
        """Merge the adapters, W ← W + Σ ΔW and b ← b + Σ s·b_B, rounded once; :meth:`unmerge_` restores the old parameters.

        The merged weight is a new parameter, so a weight tied to another module's leaves that module alone.
        """
        mine = [adapter for adapter in adapters if adapter in self.r]
        if not mine or self.merged_adapters:
            return
        weight, base = self.merged_weight(mine), self.base_layer
        tensors = base.quantized_weight().requantize(weight).tensors() if is_quantized(base) else {"weight": weight}
        for name, tensor in tensors.items():
            self._replace_parameter(name, tensor, tensor.dtype if is_quantized(base) else None)
        for extra in map(self.bias_delta, mine):
            if extra is not None:
                self._replace_parameter("bias", self.base_layer.bias + extra)
        self.merged_adapters = mine

    def merged_weight(self, adapters: list[str]) -> Tensor:
        """Return the base layer's weight with these adapters in it, in fp32; in fp64 for a base in fp64."""
        weight = dense_weight(self.base_layer, self._adapter_dtype())
        for adapter in adapters:
            weight = self.variants[adapter].merged_weight(self, adapter, weight)
        return weight

    def weight_updates(self, adapters: list[str]) -> Iterable[Tensor]:
        """Return ΔW of these adapters together, in the slices that :meth:`weight_slices` makes of the weight."""
        if all(adapter not in self.variants or self.variants[adapter].additive for adapter in adapters):
            return [sum((self.delta(adapter) for adapter in adapters[1:]), self.delta(adapters[0]))]
        return [self.merged_weight(adapters) - dense_weight(self.base_layer, self._adapter_dtype())]

    def weight_slices(self, weight: Tensor) -> Sequence[Tensor]:
        """Return the base layer's weight in the parts that a merge is measured in: one, or one for each expert."""
        return [weight]

    def bias_delta(self, adapter: str) -> Tensor | None:
        """Return what merging adds to the base layer's bias; None, if nothing."""
        return None

    def unmerge_(self) -> None:
        """Put the original parameters back, bit for bit."""
        for name, original in self.originals.items():
            setattr(self.base_layer, name, original)
        self.forget_originals()
        self.merged_adapters = []

    def forget_originals(self) -> None:
        """Release the parameters that :meth:`unmerge_` would restore."""
        self.originals = {}

    def _replace_parameter(self, name: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        old = getattr(self.base_layer, name)
        self.originals.setdefault(name, old)
        setattr(
            self.base_layer,
            name,
            nn.Parameter(value.detach().to(dtype or old.dtype).contiguous(), requires_grad=old.requires_grad),
        )

    def _get_name(self) -> str:
        return self.shown_as

    def __getattr__(self, name: str) -> Any:
        # ``weight``, ``bias``, ``in_features`` and the like, for code that does not know about adapters
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self.base_layer, name)

    def _adapter_dtype(self) -> torch.dtype:
        """Return fp64 for a plain base in fp64, else fp32: half precision would round small updates away."""
        base = self.base_layer
        return torch.float64 if not is_quantized(base) and weight_dtype(base) == torch.float64 else torch.float32

    def _device_dtype(self) -> dict[str, Any]:
        """Return the keyword arguments ``device`` and ``dtype`` of a new adapter's tensors."""
        return {"device": self.base_layer.weight.device, "dtype": self._adapter_dtype()}


def row_indices(rows: Sequence[str], x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapter of a mixed batch and the indices of its rows in ``x``.

    ``x`` may hold several consecutive rows for each row of the batch (as with beam search).

    Raises:
        AdapterError: ``x`` does not hold the same number of rows for each row of the batch.
    """
    per_row, remainder = divmod(x.shape[0], len(rows))
    if remainder or not per_row:
        raise AdapterError(
            f"a layer got {x.shape[0]} rows in a mixed batch of {len(rows)}, so its rows cannot be told apart",
            "run one batch for each adapter",
        )
    for adapter in dict.fromkeys(rows):
        indices = [row * per_row + k for row, name in enumerate(rows) if name == adapter for k in range(per_row)]
        yield adapter, torch.tensor(indices, device=x.device)


def noise(shape: tuple[int, ...], layer: Any) -> Tensor:
    """Return fixed normal values of this shape, on the device of ``layer`` and in the dtype that it computes in."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.device, weight_dtype(layer))
