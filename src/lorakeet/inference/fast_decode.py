"""Fast decoding on the CPU: in a quantized model of the Llama family, a new token takes two compiled calls per layer.

The model's modules stay in place, with `transformers` around them. Within :func:`fast_decode`, decoder layers of known
classes hand the next token of a few texts to :mod:`~lorakeet.kernels.decoder_step`. Conditions are checked for each token.
A layer falls back to its own forward in training mode, with hooks, in full precision, or with any adapter but one plain LoRA.
A layer of each class is first compared with its own forward on random numbers. A class that differs is
left alone, with a warning.
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
from lorakeet.patches.verify import Verifier, is_close
from lorakeet.quant.protocol import has_quantized, is_hooked

#: Architectures of transformers whose ``…DecoderLayer`` the compiled loops implement.
KNOWN = ("Llama", "Mistral", "Qwen2", "Qwen3")
_SILU = ("SiLU", "SiLUActivation")
#: Hooks that torch calls for every module; with any of them layers are left alone.
_FOR_ALL = (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks)
#: Share of the largest output by which compiled and own forward may differ: sums of thousands of products in another order.
_NEAR = 2e-5


@contextmanager
def fast_decode(model: nn.Module) -> Iterator[None]:
    """Compute new tokens with compiled layers within the block, in ``model.generate`` or another loop over ``model``.

    Outputs are the same up to the rounding error of fp32. A full-precision model, or one of another family, is left alone.
    """
    verifier = Verifier()
    replaced: list[nn.Module] = []
    quantized = has_quantized(model)
    try:
        for module in model.modules() if quantized and bindings.library() is not None else ():
            if is_known_layer(module) and "forward" not in module.__dict__:
                replaced.append(module)
                module.forward = _Quick(module, verifier)
        yield
    finally:
        for module in replaced:
            del module.forward


def is_known_layer(module: Any) -> bool:
    """Whether a module is a decoder layer that the compiled loops implement."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("DecoderLayer"):
        return False
    return kind.__name__.removesuffix("DecoderLayer") in KNOWN and type(module.mlp.act_fn).__name__ in _SILU


class _Quick:
    """Forward of a decoder layer that takes the compiled path for the next token, and its own forward otherwise."""

    def __init__(self, module: Any, verifier: Verifier) -> None:
        self.module, self.own, self.verifier = module, module.forward, verifier
        self.attention, self.mlp = module.self_attn, module.mlp
        in_attention, in_mlp = self.attention._modules, self.mlp._modules
        # nn.Module's attribute lookup is slow, and these are read for every token
        self.linears = [(in_attention, f"{name}_proj") for name in "qkvo"]
        self.linears += [(in_mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        self.norms = [(module._modules, name) for name in ("input_layernorm", "post_attention_layernorm")]
        self.norms += [(in_attention, name) for name in ("q_norm", "k_norm")]
        self.layer: decoder_step.Layer | None = None
        self.where: list[float] = []  # addresses of the weights, and scalings of the adapters

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
        """Compute the layer for x that fits.

        Args:
            x: Hidden states, fp32 [n, 1, hidden].
            mask: Attention mask, bool [n or 1, 1, 1, length]; None: all tokens are visible.
            places: Cosine and sine of the rotary embedding, [n or 1, 1, head_dim] each.
            past: The key-value cache, which receives the new token.
        """
        assert self.layer is not None
        q, k, v = decoder_step.before_attention(self.layer, x, *places)
        keys, values = past.update(k, v, self.attention.layer_idx)
        seen = None if mask is None else mask.expand(x.shape[0], 1, 1, keys.shape[2])[:, 0, 0]
        return decoder_step.after_attention(self.layer, x, q, keys, values, seen)

    def fits(self, x: Tensor, mask: Tensor | None, cosine: Tensor, sine: Tensor) -> bool:
        """Whether the input is the next token of a few texts, in fp32 on the CPU, without gradients.

        Args:
            x: Hidden states [n, T, hidden].
            mask: Attention mask, or None.
            cosine: Cosine of the rotary embedding.
            sine: Sine of the rotary embedding.
        """
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
        """Whether the layer is supported now.

        It must be in eval mode, without hooks, quantized, with at most one plain LoRA per linear layer. This also
        prepares the compiled layer again if a weight or a scaling has changed.
        """
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
        return self.verifier.agrees(kind, self.module, self._tried)

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
        return is_close(own, self.step(x, mask, places, past), _NEAR)


class _Past:
    """Key-value cache of fixed tokens, for the comparison: ``update`` returns them with the new ones, and keeps none."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # [keys and values, n, heads, length, dim]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.tokens[0], keys], 2), torch.cat([self.tokens[1], values], 2)
