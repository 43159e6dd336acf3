"""Quick writing: while a model of the Llama family in 8 bits writes, each new token passes a layer in two compiled calls.

The modules of the model stay what and where they are, with `transformers` around them; while :func:`fast_decode` holds,
decoder layers of known classes hand what they can to :mod:`~lorakeet.kernels.decoder_step`. That is looked at anew for each
token:
a layer in training, watched by a hook, not in 8 bits, or adapted by anything but one plain LoRA computes as ever, and so does
all but the next token of a few texts (:data:`~lorakeet.kernels.cpu.gemm.GEMV_TOKENS`). One layer of each kind is first held
against its
own forward on random numbers; a kind that differs is left as it is, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from lorakeet.kernels import decoder_step
from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS
from lorakeet.log import warn
from lorakeet.quant.protocol import has_quantized, is_hooked

#: Architectures of transformers whose ``…DecoderLayer`` is the one that the loops know.
KNOWN = ("Llama", "Mistral", "Qwen2", "Qwen3")
_SILU = ("SiLU", "SiLUActivation")
#: Hooks that torch calls for every module.
_FOR_ALL = (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks)
#: Share of the largest output by which the two may differ: sums of thousands of products in another order.
_NEAR = 2e-5


@contextmanager
def fast_decode(model: nn.Module) -> Iterator[None]:
    """While this holds, ``model.generate`` (or a loop of one's own over ``model``) takes a new token's layers at once.

    Same outputs, within the rounding of fp32; a model that is not in 8 bits, or of another family, is left alone.
    """
    agreed: dict[Any, bool] = {}
    replaced: list[nn.Module] = []
    quantized = has_quantized(model)
    try:
        for module in model.modules() if quantized and bindings.library() is not None else ():
            if _known(module) and "forward" not in module.__dict__:
                replaced.append(module)
                module.forward = _Quick(module, agreed)
        yield
    finally:
        for module in replaced:
            del module.forward


def _known(module: Any) -> bool:
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("DecoderLayer"):
        return False
    return kind.__name__.removesuffix("DecoderLayer") in KNOWN and type(module.mlp.act_fn).__name__ in _SILU


class _Quick:
    """What a decoder layer computes by meanwhile."""

    def __init__(self, module: Any, agreed: dict[Any, bool]) -> None:
        self.module, self.own, self.agreed = module, module.forward, agreed
        self.attention, self.mlp = module.self_attn, module.mlp
        in_attention, in_mlp = self.attention._modules, self.mlp._modules
        # nn.Module's attribute look-up is slow; these are read for every token
        self.linears = [(in_attention, f"{name}_proj") for name in "qkvo"]
        self.linears += [(in_mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        self.norms = [(module._modules, name) for name in ("input_layernorm", "post_attention_layernorm")]
        self.norms += [(in_attention, name) for name in ("q_norm", "k_norm")]
        self.layer: decoder_step.Layer | None = None
        self.where: list[float] = []  # that its weights lie, and the scalings of adapters

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Any:
        x, mask, places = hidden_states, attention_mask, position_embeddings
        simple = not others and past_key_values is not None and places is not None
        if simple and self.fits(x, mask, *places) and self.look():  # type: ignore[misc]
            return self.step(x, mask, places, past_key_values)  # type: ignore[arg-type]
        return self.own(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **others,
        )

    def step(self, x: Tensor, mask: Tensor | None, places: tuple[Tensor, Tensor], past: Any) -> Tensor:
        """The layer, for x [n, 1, hidden] that fits."""
        assert self.layer is not None
        q, k, v = decoder_step.before_attention(self.layer, x, *places)
        keys, values = past.update(k, v, self.attention.layer_idx)
        seen = None if mask is None else mask.expand(x.shape[0], 1, 1, keys.shape[2])[:, 0, 0]
        return decoder_step.after_attention(self.layer, x, q, keys, values, seen)

    def fits(self, x: Tensor, mask: Tensor | None, cosine: Tensor, sine: Tensor) -> bool:
        """Whether this is the next token of a few texts, and nobody wants a gradient."""
        dim = self.attention.head_dim
        return (
            x.ndim == 3
            and x.shape[1] == 1
            and 0 < x.shape[0] <= GEMV_TOKENS
            and x.dtype == cosine.dtype == sine.dtype == torch.float32
            and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1)))
            and cosine.shape == sine.shape
            and cosine.shape in ((1, 1, dim), (x.shape[0], 1, dim))
            and bindings.is_cpu_contiguous(x, cosine, sine)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def look(self) -> bool:
        """Whether the layer is plain, with its weights where the loops look for them."""
        linears = [table[name] for table, name in self.linears]
        norms = [table.get(name) for table, name in self.norms]
        given = [norm for norm in norms if norm is not None]
        inside: tuple[Any, ...] = (self.attention, self.mlp, self.mlp._modules["act_fn"], *linears, *given)
        if self.module.training or any(map(is_hooked, inside)) or any(_FOR_ALL):
            return False
        if self.attention.config._attn_implementation != "sdpa":
            return False
        factors: list[Any] = [
            linear.decoder_weights() if hasattr(linear, "decoder_weights") else None for linear in linears
        ]
        if None in factors:
            return False
        tensors = [tensor for one in factors for tensor in one[:5] if tensor is not None]
        tensors += [norm._parameters["weight"] for norm in given]
        where = [*[tensor.data_ptr() for tensor in tensors], *[one.scaling for one in factors]]
        if where != self.where:
            self.layer, self.where = self._laid_out(factors, norms), where
            kind = tuple(map(type, (self.module, *inside)))
            if self.layer is not None and not self._agrees(
                (*kind, self.layer.heads, self.layer.narrow, self.layer.dim)
            ):
                self.layer = None
        return self.layer is not None

    def _laid_out(self, factors: list[Any], norms: list[Any]) -> decoder_step.Layer | None:
        given = [None if norm is None else decoder_step.Norm(norm.weight, norm.variance_epsilon) for norm in norms]
        try:
            return decoder_step.Layer(factors, given, self.attention.head_dim, self.attention.scaling)
        except ValueError:
            return None

    def _agrees(self, kind: tuple[Any, ...]) -> bool:
        """Whether a layer of this kind computes what its own forward does, on random numbers; tried once."""
        if kind not in self.agreed:
            self.agreed[kind] = self._tried()
            if not self.agreed[kind]:
                warn(f"{type(self.module).__name__} computes otherwise than expected and stays as it is")
        return self.agreed[kind]

    def _tried(self) -> bool:
        layer, source = self.layer, torch.Generator().manual_seed(0)
        assert layer is not None
        x = torch.randn(2, 1, layer.hidden, generator=source)
        angle = 6 * torch.rand(2, 1, layer.dim // 2, generator=source).repeat(1, 1, 2)
        past = _Past(torch.randn(2, 2, layer.narrow // layer.dim, 5, layer.dim, generator=source))
        places = (angle.cos(), angle.sin())
        mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
        mask[0, 0, 0, :2] = False
        own = self.own(x, attention_mask=mask, past_key_values=past, position_embeddings=places)
        if not isinstance(own, Tensor):
            return False
        return torch.allclose(self.step(x, mask, places, past), own, rtol=0, atol=_NEAR * float(own.abs().max()))


class _Past:
    """A cache that remembers some tokens and learns no new ones."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # [keys and values, n, heads, length, dim]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.tokens[0], keys], 2), torch.cat([self.tokens[1], values], 2)
