"""LoRA on a linear layer (Hu et al. 2021, arXiv:2106.09685, equation 3).

    h = W₀x + (α/r)·B·A·dropout(x)

             x [..., in]
        ┌────────┴─────────┐
        │                  ▼
        │               dropout
        ▼                  ▼
    W₀ [out, in]       A [r, in]      Kaiming-uniform (a = √5)
     (frozen)              ▼
        │              B [out, r]     zero, so a new adapter changes nothing
        │                  ▼
        │               · α/r
        └───────►+◄────────┘
                 ▼
            h [..., out]

W₀ belongs to the layer that is wrapped. r is the rank, far below ``in`` and ``out``; s = α/r is the scaling. A and B are
trained. Merged, W' = W₀ + s·B·A. Dropout acts in training only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.kernels.decoder_layer_training import TrainedLinear
from lorakeet.kernels.decoder_step import LinearWeights, Update
from lorakeet.kernels.dropout import dropout
from lorakeet.kernels.lora_linear import lora_linear
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.mica import MICA, initialize_minor
from lorakeet.lora.initialization.random import initialize_pair
from lorakeet.lora.initialization.taken_part import out_in, take_part, taken_parts, takes_part
from lorakeet.lora.layer import ActiveAdapters, LoraLayer, noise
from lorakeet.lora.variants import Variant
from lorakeet.lora.variants.bdlora import BlockDiagonal
from lorakeet.quant.protocol import dense_weight, frozen_weights, is_hooked, is_quantized, weight_shape


class LoraPair(LoraLayer):
    """A base layer with the update s·B(A(dropout(x))), where A and B are modules of the base layer's type."""

    def __init__(self, base_layer: Any, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()  # PEFT has all four

    def pair(self, adapter: str) -> tuple[Any, Any]:
        """Return A and B as modules, each with a weight; B with a bias if ``lora_bias``."""
        # straight to the tables: nn.Module's attribute look-up is slow, and this is asked in every forward
        a, b = self._modules["lora_A"], self._modules["lora_B"]
        return a._modules[adapter], b._modules[adapter]  # type: ignore[union-attr]

    def set_pair(self, adapter: str, a: nn.Module, b: nn.Module) -> None:
        """Take A and B as the adapter's."""
        self.lora_A[adapter], self.lora_B[adapter] = a, b

    def initialize(self, adapter: str, how: bool | str) -> None:
        a, b = self.pair(adapter)
        initialize_pair(a.weight, b.weight, how, self.r[adapter])
        if b.bias is not None:
            nn.init.zeros_(b.bias)

    def dropped(self, adapter: str, x: Tensor) -> Tensor:
        p = self.dropout_probability(adapter) if self.training else 0.0
        if not p:
            return x
        weight = self.pair(adapter)[0].weight  # a function, once torch.ao has quantized the layer
        return dropout(x.to(weight.dtype) if isinstance(weight, Tensor) else x, p, True)

    def low_rank(self, adapter: str, dropped: Tensor) -> Tensor:
        a, b = self.pair(adapter)
        dtype = a.weight.dtype if isinstance(a.weight, Tensor) else dropped.dtype
        low_rank: Tensor = b(a(dropped.to(dtype))) * self.scaling[adapter]
        return low_rank

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        a, b = map(_matrix, self.pair(adapter))
        return self.variants[adapter].factors(self, adapter, a, b)

    def parts(self, adapter: str) -> list[Tensor]:
        a, b = self.pair(adapter)
        own = [p for p in (*a._parameters.values(), *b._parameters.values()) if p is not None]
        return own + self.variant_parts(adapter)

    def tensor_names(self, adapter: str) -> dict[str, str]:
        names = ["lora_A.weight", "lora_B.weight"] if self.variants[adapter].stores_pair else []
        if self.pair(adapter)[1].bias is not None:
            names.append("lora_B.bias")
        own = {name: name.replace(".", f".{adapter}.") for name in names}
        return own | self.variants[adapter].tensor_names(adapter)

    def bias_delta(self, adapter: str) -> Tensor | None:
        b = self.pair(adapter)[1]
        return None if b.bias is None else self.scaling[adapter] * b.bias

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        for table in (self.lora_A, self.lora_B):
            if adapter in table:
                del table[adapter]


def _matrix(module: nn.Module) -> Tensor:
    """Return the weight of an A or B as a matrix."""
    weight: Any = module.dense() if isinstance(module, BlockDiagonal) else module.weight
    return weight.flatten(1)


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """Return address and version of a tensor's values; a tensor of inference mode has no version."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


class LoraLinear(LoraPair):
    """LoRA on ``nn.Linear`` and its quantized forms (weight [out, in]) and on the ``Conv1D`` of GPT-2 (weight [in, out]).

    Attributes:
        fan_in_fan_out: Whether the base layer stores its weight as [in, out].
    """

    linear = True
    shown_as = "lora.Linear"

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)
        self.channel_dim = int(self.fan_in_fan_out)
        self._fused: set[str] = set()  # adapters whose equation is kernels.lora_linear's
        self._outputs: dict[str, tuple[list[Any], Tensor]] = {}  # of each adapter, and what it was computed from

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        shape = weight_shape(self.base_layer)
        out_features, in_features = reversed(shape) if self.fan_in_fan_out else shape
        a = nn.utils.skip_init(nn.Linear, in_features, r, bias=False, **self._device_dtype())
        b = nn.utils.skip_init(nn.Linear, r, out_features, bias=config.lora_bias, **self._device_dtype())
        self.set_pair(adapter, a, b)
        if self.variants[adapter].fused and not config.lora_bias:
            self._fused.add(adapter)

    def attach(self, adapter: str, config: PeftConfig, r: int, alpha: float, a: nn.Module, b: nn.Module) -> None:
        """Give the layer a further adapter whose A and B are there already, frozen; parts of its variant come after.

        Args:
            adapter: The adapter's name.
            config: Its settings.
            r: Its rank in this layer.
            alpha: Its α in this layer.
            a: A [r, in], as a linear layer.
            b: B [out, r], as a linear layer without bias.
        """
        self.variants[adapter] = config.variant
        self.set_pair(adapter, a, b)
        if config.variant.fused:
            self._fused.add(adapter)
        self._note_settings(adapter, config, r, alpha)

    def initialize(self, adapter: str, how: bool | str) -> None:
        if isinstance(how, str) and takes_part(how):
            take_part(self, adapter, how)
        elif how == MICA:
            a, b = self.pair(adapter)
            initialize_minor(a.weight, b.weight, out_in(self, dense_weight(self.base_layer, a.weight.dtype)))
        else:
            super().initialize(adapter, how)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self.acting
        if len(adapters) != 1 or not self._can_fuse(adapters[0]):
            return super().forward(x, *args, **kwargs)
        (a, b), base = self.pair(adapters[0]), self.base_layer
        p = self.dropout_probability(adapters[0]) if self.training else 0.0
        scaling = self.scaling[adapters[0]]
        weight = base.quantized_weight() if is_quantized(base) else base.weight
        scale = self.variants[adapters[0]].output_scale(self, adapters[0])
        lora_A, lora_B = self.variants[adapters[0]].factors(self, adapters[0], a.weight, b.weight)
        if scale is None:
            return lora_linear(x, weight, base.bias, lora_A, lora_B, scaling, p, self.fan_in_fan_out)
        if p:
            return super().forward(x, *args, **kwargs)
        h = lora_linear(x, weight, None, lora_A, lora_B, scaling, 0.0, self.fan_in_fan_out)
        return (h * scale if base.bias is None else torch.addcmul(base.bias, h, scale)).to(h.dtype)

    def _can_fuse(self, adapter: str) -> bool:
        """Whether base and update can run as one operation: plain LoRA on a frozen weight without hooks."""
        base = self.base_layer
        return (
            (type(base) in (nn.Linear, Conv1D) or is_quantized(base))
            and not base.weight.requires_grad
            and not is_hooked(base)
            and adapter in self._fused
            and not base.weight.is_meta
            and taken_parts(self).keys() <= {adapter}
        )

    def delta(self, adapter: str) -> Tensor:
        a, b = self.matrices(adapter)
        ba = self.scaling[adapter] * (b @ a)  # [out, in]
        return ba.T if self.fan_in_fan_out else ba

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self._fused.discard(adapter)
        self._outputs.pop(adapter, None)

    def decoder_weights(self) -> LinearWeights | None:
        """Return the operands of the compiled decoder step, base and update; None where it cannot compute the layer."""
        base, adapters = self._modules["base_layer"], self.acting
        mixed = self.switch.enabled and self.switch.rows is not None
        if not is_quantized(base) or is_hooked(base) or mixed or len(adapters) > 1:
            return None
        if not taken_parts(self).keys() <= {*adapters, *self.merged_adapters}:
            return None
        own = base.decoder_weights()
        if own is None or not adapters:
            return own
        update = self.decoder_update(adapters[0])
        return None if update is None else own._replace(**update._asdict())

    def training_weights(self) -> TrainedLinear | None:
        """Return the operands of the compiled training step, base and update; None where it cannot compute the layer."""
        base, adapters = self._modules["base_layer"], self.acting
        mixed = self.switch.enabled and self.switch.rows is not None
        if self.merged_adapters or mixed or len(adapters) > 1 or self.fan_in_fan_out:
            return None
        own = None if is_hooked(base) else frozen_weights(base)  # type: ignore[arg-type]
        if own is None or not adapters:
            return None if taken_parts(self) else own
        (adapter,) = adapters
        variant = type(self.variants[adapter])
        plain = variant.factors is Variant.factors and variant.output_scale is Variant.output_scale
        if not plain or not self._can_fuse(adapter):
            return None
        a, b = (one._parameters["weight"] for one in self.pair(adapter))
        p = self.dropout_probability(adapter) if self.training else 0.0
        return own._replace(a=a, b=b, scaling=self.scaling[adapter], p=p)

    def decoder_update(self, adapter: str) -> Update | None:
        """Return the update that the compiled decoder step computes for an adapter; None for one that it cannot."""
        if not self.variants[adapter].fused or (self.training and self.dropout_probability(adapter)):
            return None
        if type(self.variants[adapter]).factors is not Variant.factors:
            return None  # it multiplies other matrices than those that are stored
        a, b = (one._parameters["weight"] for one in self.pair(adapter))
        return Update(a, b, self.scaling[adapter], self._output(adapter))  # type: ignore[arg-type]

    def _output(self, adapter: str) -> Tensor | None:
        """Return c and d, fp32 [2, out], of an adapter that makes c∘h + d of an output h; None for any other.

        DoRA makes c∘(h - b) + b, where b is the base's bias; ``lora_bias`` adds s times the bias of B. They are computed
        once for values of the adapter's parts.
        """
        of_b, base = self.pair(adapter)[1]._parameters["bias"], self.base_layer
        if of_b is None and type(self.variants[adapter]).output_scale is Variant.output_scale:
            return None
        state = [self.scaling[adapter], *(_state(part) for part in (*self.parts(adapter), base.weight, base.bias))]
        if self._outputs.get(adapter, ([], None))[0] != state:
            with torch.no_grad():
                self._outputs[adapter] = state, self._computed_output(adapter, of_b, base.bias)
        return self._outputs[adapter][1]

    def _computed_output(self, adapter: str, of_b: Tensor | None, bias: Tensor | None) -> Tensor:
        scale = self.variants[adapter].output_scale(self, adapter)
        if scale is None:
            assert of_b is not None
            return torch.stack([torch.ones_like(of_b), self.scaling[adapter] * of_b]).float()
        return torch.stack([scale, torch.zeros_like(scale) if bias is None else (1 - scale) * bias]).float()

    def probe(self) -> Tensor:
        return noise((32, weight_shape(self.base_layer)[0 if self.fan_in_fan_out else 1]), self.base_layer)
