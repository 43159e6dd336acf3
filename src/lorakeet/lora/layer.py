"""The layer: h = W₀x + s·B·A·dropout(x), s = α/r  (Hu et al. 2021, arXiv:2106.09685, equation 3).

W₀ is frozen and belongs to whatever layer is wrapped. A [r, in] starts Kaiming-uniform (a = √5) and B [out, r] at zero, so a
new adapter changes nothing. For an embedding the input is one-hot: A is [r, vocabulary] and starts at zero, B is
[dim, r] and starts normal. One layer holds any number of adapters by name; :class:`ActiveAdapters` says which of them answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet.errors import AdapterError
from lorakeet.kernels.decoder_step import LinearWeights
from lorakeet.kernels.dropout import dropout
from lorakeet.kernels.lora_linear import lora_linear
from lorakeet.lora.config import PeftConfig
from lorakeet.quant.protocol import is_hooked, is_quantized


@dataclass
class ActiveAdapters:
    """Which adapters answer, shared by all layers of a model: switching is one assignment."""

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: tuple[str, ...] | None = None  # a mixed batch: which adapter answers each of its rows


class LoraLayer(nn.Module):
    """A base layer and its adapters. Subclasses say how one kind of layer multiplies.

    Attributes (by adapter name): ``r``, ``lora_alpha``, ``scaling``, and in subclasses the parameters themselves.
    """

    linear = False
    base_layer: Any  # whatever module is adapted; it answers forward(), weight and bias

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.originals: dict[str, Tensor] = {}  # parameters as they were before a merge, by name
        self.merged_adapters: list[str] = []

    # -- what a kind of layer answers -------------------------------------------------------------------------------

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        """Create and initialise the adapter's parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h = W₀x + s·B·A·dropout(x), summed over the active adapters; in a mixed batch each row with its own."""
        h = self.base_layer(x, *args, **kwargs)
        if self.switch.rows is not None and self.switch.enabled:
            return self._row_by_row(x, h, self.switch.rows)
        for adapter in self.answering:
            h = self.update(adapter, x, h)
        return h

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        """``h``, the base's answer to ``x``, and what the adapter makes of it."""
        raise NotImplementedError

    def parts(self, adapter: str) -> list[Tensor]:
        """The adapter's parameters in this layer."""
        raise NotImplementedError

    def delta(self, adapter: str) -> Tensor:
        """ΔW = s·B·A in the base weight's layout, in the adapter's dtype. The only place that forms it."""
        raise NotImplementedError

    def probe(self) -> Tensor:
        """A fixed pseudo-random input for :meth:`forward`, to compare merged and unmerged on."""
        raise NotImplementedError

    @classmethod
    def complaint(cls, base_layer: nn.Module, config: PeftConfig, r: int) -> str | None:
        """Why an adapter of rank r does not fit on ``base_layer``; None if it does."""
        return None

    def conflict(self, adapters: Sequence[str]) -> str | None:
        """Why these adapters cannot answer together here; None if they can."""
        return None

    def unmergeable(self) -> str | None:
        """Why no weight of the base's shape can hold the update; None if one can."""
        return None

    # -- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter: str, config: PeftConfig, r: int, alpha: float) -> None:
        """Give the layer a further adapter of rank r."""
        self.make(adapter, config, r)
        self.r[adapter], self.lora_alpha[adapter] = r, alpha
        self.scaling[adapter] = config.scaling(r, alpha)
        self.lora_dropout[adapter] = config.lora_dropout

    def delete_adapter(self, adapter: str) -> None:
        """Forget the adapter's parameters."""
        for table in (self.r, self.lora_alpha, self.scaling, self.lora_dropout):
            table.pop(adapter, None)

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Whether the adapter's parameters learn."""
        if adapter in self.r:
            for parameter in self.parts(adapter):
                parameter.requires_grad = trainable

    @property
    def answering(self) -> list[str]:
        """The adapters that add to the base's answer to all rows now; none while merged, since the weight holds them."""
        if not self.switch.enabled or self.merged_adapters or self.switch.rows is not None:
            return []
        return [adapter for adapter in self.switch.active if adapter in self.r]

    def _row_by_row(self, x: Tensor, h: Tensor, rows: tuple[str, ...]) -> Tensor:
        """The rows of each adapter together, then back to their places."""
        for adapter, places in row_places(rows, x):
            if adapter in self.r:
                h = h.index_copy(0, places, self.update(adapter, x[places], h[places]))
        return h

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge_(self, adapters: list[str]) -> None:
        """W ← W + Σ ΔW (and b ← b + Σ s·b_B), rounded once. The old parameters are kept for :meth:`unmerge_`.

        The merged weight is a new parameter, so a weight tied to another module's leaves that module alone.
        """
        mine = [adapter for adapter in adapters if adapter in self.r]
        if not mine or self.merged_adapters:
            return
        self._swap("weight", self.merged_weight(mine))
        for extra in map(self.bias_delta, mine):
            if extra is not None:
                self._swap("bias", self.base_layer.bias + extra)
        self.merged_adapters = mine

    def merged_weight(self, adapters: list[str]) -> Tensor:
        """W + Σ ΔW in the wider of both dtypes."""
        weight = self.base_layer.weight.to(self.delta(adapters[0]).dtype)
        for adapter in adapters:
            weight = weight + self.delta(adapter)
        return weight

    def bias_delta(self, adapter: str) -> Tensor | None:
        """What merging adds to the base's bias, if anything."""
        return None

    def unmerge_(self) -> None:
        """Put the original parameters back, bit for bit."""
        for name, original in self.originals.items():
            setattr(self.base_layer, name, original)
        self.forget_originals()
        self.merged_adapters = []

    def forget_originals(self) -> None:
        """Let go of what :meth:`unmerge_` would need."""
        self.originals = {}

    def _swap(self, name: str, value: Tensor) -> None:
        old = getattr(self.base_layer, name)
        self.originals.setdefault(name, old)
        setattr(self.base_layer, name, nn.Parameter(value.detach().to(old.dtype), requires_grad=old.requires_grad))

    def __getattr__(self, name: str) -> Any:
        # ``weight``, ``bias``, ``in_features`` and the like, asked for by code that does not know about adapters
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self.base_layer, name)

    def _adapter_dtype(self) -> torch.dtype:
        """fp32 beside a half-precision or integer base (small updates would be rounded away), else the base's own."""
        return torch.float64 if self.base_layer.weight.dtype == torch.float64 else torch.float32


class LoraPair(LoraLayer):
    """A base layer with the update s·B(A(dropout(x))), A and B being modules of the base's kind without anything else."""

    def __init__(self, base_layer: Any, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()

    def pair(self, adapter: str) -> tuple[Any, Any]:
        """(A, B) as modules, each with a weight; B with a bias if ``lora_bias``."""
        return self.lora_A[adapter], self.lora_B[adapter]

    def put(self, adapter: str, a: nn.Module, b: nn.Module, config: PeftConfig, r: int) -> None:
        """Take (A, B) as the adapter's, and initialise them."""
        self.lora_A[adapter], self.lora_B[adapter] = a, b
        lora_A, lora_B = self.pair(adapter)
        initialize(lora_A.weight, lora_B.weight, config.init_lora_weights, r)
        if lora_B.bias is not None:
            nn.init.zeros_(lora_B.bias)

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        a, b = self.pair(adapter)
        low = dropout(x.to(a.weight.dtype), self.lora_dropout[adapter], self.training)
        return (h + b(a(low)) * self.scaling[adapter]).to(h.dtype)

    def parts(self, adapter: str) -> list[Tensor]:
        # straight to the tables: switching adapters asks every layer, and nn.Module's attribute look-up is slow
        tables = (self._modules["lora_A"]._modules[adapter], self._modules["lora_B"]._modules[adapter])  # type: ignore[union-attr]
        return [p for half in tables for p in half._parameters.values() if p is not None]  # type: ignore[union-attr]

    def bias_delta(self, adapter: str) -> Tensor | None:
        b = self.pair(adapter)[1]
        return None if b.bias is None else self.scaling[adapter] * b.bias

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        for table in (self.lora_A, self.lora_B):
            if adapter in table:
                del table[adapter]


class LoraLinear(LoraPair):
    """LoRA on ``nn.Linear`` and its quantized kinds (weight [out, in]) and on the ``Conv1D`` of GPT-2 (weight [in, out])."""

    linear = True

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        weight: Tensor = self.base_layer.weight
        out_features, in_features = reversed(weight.shape) if self.fan_in_fan_out else weight.shape
        place: dict[str, Any] = {"device": weight.device, "dtype": self._adapter_dtype()}
        a = nn.utils.skip_init(nn.Linear, in_features, r, bias=False, **place)
        b = nn.utils.skip_init(nn.Linear, r, out_features, bias=config.lora_bias, **place)
        self.put(adapter, a, b, config, r)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self.answering
        if len(adapters) != 1 or not self._plain(adapters[0]):
            return super().forward(x, *args, **kwargs)
        (a, b), base = self.pair(adapters[0]), self.base_layer
        p = self.lora_dropout[adapters[0]] if self.training else 0.0
        scaling = self.scaling[adapters[0]]
        weight = base.quantized_weight() if is_quantized(base) else base.weight
        return lora_linear(x, weight, base.bias, a.weight, b.weight, scaling, p, self.fan_in_fan_out)

    def decoder_weights(self) -> LinearWeights | None:
        """What this layer multiplies by now, base in 8 bits and update; None where it does anything else."""
        base, adapters = self._modules["base_layer"], self.answering
        mixed = self.switch.enabled and self.switch.rows is not None
        if not is_quantized(base) or is_hooked(base) or mixed or len(adapters) > 1:
            return None
        own = base.decoder_weights()
        if own is None or not adapters:
            return own
        parts, p = self.parts(adapters[0]), self.lora_dropout[adapters[0]]
        if len(parts) > 2 or (self.training and p):  # B with a bias
            return None
        return LinearWeights(own.weight, own.scale, own.bias, parts[0], parts[1], self.scaling[adapters[0]])

    def _plain(self, adapter: str) -> bool:
        """Whether base and update can run as one operation: a dense frozen weight that nothing else watches or moves."""
        base = self.base_layer
        return (
            (type(base) in (nn.Linear, Conv1D) or is_quantized(base))
            and not base.weight.requires_grad
            and not is_hooked(base)
            and self.pair(adapter)[1].bias is None
            and not base.weight.is_meta
        )

    def delta(self, adapter: str) -> Tensor:
        a, b = self.pair(adapter)
        ba = self.scaling[adapter] * (b.weight @ a.weight)  # [out, in]
        return ba.T if self.fan_in_fan_out else ba

    def probe(self) -> Tensor:
        weight = self.base_layer.weight
        return noise((32, weight.shape[0 if self.fan_in_fan_out else 1]), weight)


class LoraEmbedding(LoraLayer):
    """LoRA on ``nn.Embedding`` (weight [vocabulary, dim]): the input is one-hot, so A·x is a column of A."""

    def __init__(self, base_layer: nn.Module, switch: ActiveAdapters) -> None:
        super().__init__(base_layer, switch)
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def make(self, adapter: str, config: PeftConfig, r: int) -> None:
        weight: Tensor = self.base_layer.weight
        vocabulary, dim = weight.shape
        place: dict[str, Any] = {"device": weight.device, "dtype": self._adapter_dtype()}
        self.lora_embedding_A[adapter] = nn.Parameter(torch.zeros(r, vocabulary, **place))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(dim, r, **place).normal_())
        if config.init_lora_weights is False:  # both random, as the linear layers of such a test
            nn.init.normal_(self.lora_embedding_A[adapter])

    def update(self, adapter: str, x: Tensor, h: Tensor) -> Tensor:
        return self.looked_up(adapter, x, h, self.base_layer)

    def looked_up(self, adapter: str, ids: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """``h``, what the embedding ``base`` has for ``ids``, with the update of these rows."""
        columns = F.embedding(ids, self.lora_embedding_A[adapter].T)  # [..., r]
        update = columns @ self.lora_embedding_B[adapter].T * self.scaling[adapter]
        return (h + scaled(update, base)).to(h.dtype)

    def projected(self, adapter: str, x: Tensor, h: Tensor, base: nn.Module) -> Tensor:
        """``h``, what the head ``base`` makes of ``x``, with the update of a weight that it shares with the embedding."""
        low = x.to(self.lora_embedding_B[adapter].dtype) @ self.lora_embedding_B[adapter]  # [..., r]
        return (h + low @ self.lora_embedding_A[adapter] * self.scaling[adapter]).to(h.dtype)

    def parts(self, adapter: str) -> list[Tensor]:
        return [self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]]

    def delta(self, adapter: str) -> Tensor:
        return self.scaling[adapter] * (self.lora_embedding_B[adapter] @ self.lora_embedding_A[adapter]).T

    def probe(self) -> Tensor:
        return vocabulary_probe(self.base_layer)

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        for table in (self.lora_embedding_A, self.lora_embedding_B):
            if adapter in table:
                del table[adapter]


def scaled(rows: Tensor, embedding: nn.Module) -> Tensor:
    """Rows as ``embedding`` answers them: some multiply what they looked up."""
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale


def row_places(rows: Sequence[str], x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each adapter of a mixed batch with the places of its rows in ``x``, where a row may stand for several in a line.

    Raises:
        AdapterError: ``x`` has no whole number of places for each row.
    """
    each, left = divmod(x.shape[0], len(rows))
    if left or not each:
        raise AdapterError(
            f"a mixed batch of {len(rows)} rows meets a layer that is given {x.shape[0]}, so its rows cannot be told apart",
            "run one batch for each adapter",
        )
    for adapter in dict.fromkeys(rows):
        places = [row * each + k for row, name in enumerate(rows) if name == adapter for k in range(each)]
        yield adapter, torch.tensor(places, device=x.device)


def initialize(lora_A: Tensor, lora_B: Tensor, how: bool | str, r: int) -> None:
    """A Kaiming-uniform (a = √5) or normal (std 1/r), B zero; ``False``: both random, so that a test sees a change."""
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def vocabulary_probe(layer: nn.Module) -> Tensor:
    """A fixed pseudo-random input for an embedding (ids) or a head (vectors), of weight [vocabulary, dim]."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(weight.shape[0], (32,), generator=torch.Generator().manual_seed(0))
        return ids.to(weight.device)
    return noise((32, weight.shape[1]), weight)


def noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Fixed normal values of this shape, with the device and dtype of ``like``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
