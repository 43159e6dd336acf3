"""Fast decoding on the CPU: in a quantized model of the Llama family, a new token takes two compiled calls per layer.

The model's modules stay in place, with `transformers` around them. Within :func:`fast_decode`, decoder layers of known
classes hand the next token of a few texts to :mod:`~lorakeet.kernels.decoder_step`. Conditions are checked for each token.
A layer falls back to its own forward in training mode, with hooks, in full precision, or with more than one LoRA or DoRA.
A layer of each class is first compared with its own forward on random numbers. A class that differs is
left alone, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers.cache_utils import DynamicCache

from lorakeet.inference.paged_layer import PagedLayer, QuickHead, QuickNorm, Shared, cache_of, has_pages
from lorakeet.kernels import decoder_step
from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.cpu.gemm import GEMV_TOKENS
from lorakeet.lora.checks.direct_reads import was_watched
from lorakeet.lora.model import LoraModel
from lorakeet.patches.verify import Verifier, is_close
from lorakeet.quant.protocol import has_rounded, is_hooked

#: Architectures of transformers whose ``…DecoderLayer`` the compiled loops implement.
KNOWN = ("Llama", "Mistral", "Qwen2", "Qwen3")
_SILU = ("SiLU", "SiLUActivation")
#: Hooks that torch calls for every module; with any of them layers are left alone.
_FOR_ALL = (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks)
#: Share of the largest output by which compiled and own forward may differ: sums of thousands of products in another order.
_NEAR = 2e-5
#: The same where both round activations to 15 bits.
_NEAR_ROUNDED = 2e-3


@contextmanager
def fast_decode(model: nn.Module) -> Iterator[None]:
    """Compute new tokens with compiled layers within the block, in ``model.generate`` or another loop over ``model``.

    An 8-bit model whose heads are a multiple of 16 wide takes the loops of the server, prompts included
    (:mod:`~lorakeet.inference.paged_layer`). They round activations and adapters to 16 bits. Other outputs are the
    same up to the rounding error of fp32. A full-precision model, or one of another family, is left alone.
    """
    verifier, shared = Verifier(), Shared()
    replaced: list[nn.Module] = []
    quantized = has_rounded(model)
    try:
        for module in model.modules() if quantized and bindings.library() is not None else ():
            if is_known_layer(module) and "forward" not in module.__dict__:
                replaced.append(module)
                module.forward = _Quick(module, verifier, shared)
        for module, quick in _around(model) if replaced else ():
            replaced.append(module)
            module.forward = quick(module, shared)
        if replaced and isinstance(model, LoraModel) and not was_watched(model):
            with torch.no_grad():  # the first pass is watched through hooks, which no compiled layer calls
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        yield
    finally:
        for module in replaced:
            del module.forward


def _around(model: Any) -> Iterator[tuple[Any, Callable[[Any, Shared], Any]]]:
    """Yield the last norm and the LM head of a model with layers of known classes, and what stands in for their forwards."""
    inner = model._modules.get("model")
    for module, quick in (
        (inner and inner._modules.get("norm"), QuickNorm),
        (model._modules.get("lm_head"), QuickHead),
    ):
        if isinstance(module, nn.Module) and "forward" not in module.__dict__:
            yield module, quick


def is_known_layer(module: Any) -> bool:
    """Whether a module is a decoder layer that the compiled loops implement."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("DecoderLayer"):
        return False
    return kind.__name__.removesuffix("DecoderLayer") in KNOWN and type(module.mlp.act_fn).__name__ in _SILU


class _Quick:
    """Forward of a decoder layer that takes the compiled path for the next token, and its own forward otherwise."""

    def __init__(self, module: Any, verifier: Verifier, shared: Shared) -> None:
        self.module, self.own, self.verifier, self.shared = module, module.forward, verifier, shared
        self.attention, self.mlp = module.self_attn, module.mlp
        in_attention, in_mlp = self.attention._modules, self.mlp._modules
        # nn.Module's attribute lookup is slow, and these are read for every token
        self.linears = [(in_attention, f"{name}_proj") for name in "qkvo"]
        self.linears += [(in_mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        self.norms = [(module._modules, name) for name in ("input_layernorm", "post_attention_layernorm")]
        self.norms += [(in_attention, name) for name in ("q_norm", "k_norm")]
        self.layer: decoder_step.Layer | None = None
        self.paged: PagedLayer | None = None
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
        made = self.step_over_pages(x, mask, places, past_key_values) if simple else None  # type: ignore[arg-type]
        self.shared.rounded = made is not None
        if made is not None:
            return made
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

    def step_over_pages(
        self, x: Tensor, mask: Tensor | None, places: tuple[Tensor, Tensor], past: Any
    ) -> Tensor | None:
        """Compute the layer for new tokens of texts or for their prompts; None where the loops over pages cannot.

        Args:
            x: Hidden states [n, count, hidden].
            mask: Attention mask, or None.
            places: Cosine and sine of the rotary embedding, [n or 1, count, head_dim] each.
            past: The key-value cache, which receives the new tokens.
        """
        index = self.attention.layer_idx
        cached = cache_of(past, index)
        if cached is None or not has_pages(self.attention.head_dim) or not self.is_plain(x, *places):
            return None
        if not self.look() or self.paged is None:
            return None
        n, count, _ = x.shape
        pads = self.shared.pads(mask, n, count, cached.get_seq_length() + count)
        return None if pads is None else self.paged.step(x, places, pads, past, index)

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
        return (
            self.is_plain(x, cosine, sine)
            and x.shape[1] == 1
            and x.shape[0] <= GEMV_TOKENS
            and (mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1)))
        )

    def is_plain(self, x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
        """Whether the input is fp32 on the CPU, without gradients; arguments as for :meth:`fits`."""
        dim = self.attention.head_dim
        return (
            x.ndim == 3
            and x.numel() > 0
            and x.dtype == cosine.dtype == sine.dtype == torch.float32
            and cosine.shape == sine.shape
            and cosine.shape in ((1, x.shape[1], dim), (x.shape[0], x.shape[1], dim))
            and bindings.is_cpu_contiguous(x, cosine, sine)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def look(self) -> bool:
        """Whether the layer is supported now.

        It must be in eval mode, without hooks, quantized, with at most one LoRA or DoRA per linear layer. This also
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
        tensors = [tensor for one in factors for tensor in (*one[:5], one.output) if tensor is not None]
        tensors += [norm._parameters["weight"] for norm in given]
        where = [*[tensor.data_ptr() for tensor in tensors], *[one.scaling for one in factors]]
        where += [_version(tensor) for one in factors for tensor in (one.a, one.b) if tensor is not None]
        if where != self.where:
            self.layer, self.paged, self.where = self._laid_out(factors, norms), None, where
            kind = tuple(map(type, (self.module, *inside)))
            if self.layer is not None and not self._agrees(
                (*kind, self.layer.heads, self.layer.narrow, self.layer.dim)
            ):
                self.layer = None
            if self.layer is not None and has_pages(self.layer.dim) and not self.layer.is_packed:
                self.paged = PagedLayer(factors, self.layer)
                if not self.verifier.agrees(
                    ("pages", *kind, self.layer.heads, self.layer.dim), self.module, self._tried_pages
                ):
                    self.paged = None
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

    def _tried_pages(self) -> bool:
        """Whether a prompt through the loops over pages is near the layer's own forward, which rounds activations too."""
        assert self.layer is not None and self.paged is not None
        source, index = torch.Generator().manual_seed(0), self.attention.layer_idx
        x = torch.randn(2, GEMV_TOKENS + 1, self.layer.hidden, generator=source)
        angle = 6 * torch.rand(1, x.shape[1], self.layer.dim // 2, generator=source).repeat(1, 1, 2)
        places = (angle.cos(), angle.sin())
        own = self.own(x, attention_mask=None, past_key_values=DynamicCache(), position_embeddings=places)
        if not isinstance(own, Tensor):
            return False
        return is_close(own, self.paged.step(x, places, [0, 0], DynamicCache(), index), _NEAR_ROUNDED)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Past:
    """Key-value cache of fixed tokens, for the comparison: ``update`` returns them with the new ones, and keeps none."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # [keys and values, n, heads, length, dim]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.tokens[0], keys], 2), torch.cat([self.tokens[1], values], 2)
