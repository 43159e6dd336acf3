"""Decoder layers of the Llama family as one operation each, forward and backward, in training on a CPU.

The modules stay unchanged. A layer computes by :mod:`lorakeet.kernels.decoder_layer_training` where that gives the bits of
its modules, on a row of samples without padding. Elsewhere the layer runs its own forward, module by module:
:func:`trained_layer` and :func:`~lorakeet.kernels.decoder_layer_training.why_not` say why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from lorakeet.kernels import fixed_order
from lorakeet.kernels.attention.pattern import Pattern
from lorakeet.kernels.cpu import abi, bindings
from lorakeet.kernels.decoder_layer_training import (
    Buffers,
    TrainedLayer,
    TrainedLinear,
    decoder_layer,
    weights_struct,
    why_not,
    why_not_row,
    why_not_weights,
)
from lorakeet.kernels.decoder_step import Norm
from lorakeet.kernels.glu import LOOPS, Activation
from lorakeet.kernels.half_linear import in_tiles
from lorakeet.patches.gradient_checkpointing import is_recomputing
from lorakeet.patches.padding_free import Packing, is_padding_free
from lorakeet.patches.verify import Verifier, is_close, output_and_gradient
from lorakeet.quant.protocol import frozen_weights, has_rounded

#: Architectures of transformers whose ``…DecoderLayer`` is a = x + attention(norm(x)), a + mlp(norm(a)).
DECODERS = ("Llama", "Ministral", "Mistral", "Qwen2", "SmolLM3")
#: Activations of transformers by the names of their classes.
ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
#: Linear layers of attention and of the feed-forward network, in the order of :class:`TrainedLayer`.
_LINEARS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)
#: Number formats of weights in 16 bits, whose products a setting may choose anew.
HALVES = torch.bfloat16, torch.float16
#: Positions of the samples on which a layer type is compared with its modules.
_LENGTHS = (1, 9, 14)
#: Largest differences of output and gradient, as shares of the largest value. A gradient in 8 bits turns the last bits of
#: other products into steps.
_TOLERANCES = 1e-3, 0.02

Forward = Callable[..., Any]


def is_decoder(module: nn.Module) -> bool:
    """Whether a module is a decoder layer of a known class that runs its own code."""
    name, own = type(module).__name__, module.__dict__.get("forward")
    known = name.endswith("DecoderLayer") and name.removesuffix("DecoderLayer") in DECODERS
    unchanged = own is None or getattr(own, "is_fused", False)
    return known and unchanged and type(module).__module__.startswith("transformers.models.")


@contextmanager
def fused_decoder_layers(model: nn.Module) -> Iterator[None]:
    """Compute decoder layers of known classes as one operation, in training mode and wherever no gradient is computed."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for layer, forward in list(fused_decoders(model)):
            replaced.append((layer, layer.__dict__.get("forward")))
            layer.forward = _where_it_serves(layer, forward)
        yield
    finally:
        for layer, own in replaced:
            del layer.forward
            if own is not None:
                layer.forward = own


def _where_it_serves(layer: nn.Module, fused: Forward) -> Forward:
    """Return a forward that is fused in training mode or without gradients, and the layer's own otherwise."""
    own = layer.forward

    @functools.wraps(own)
    def forward(*args: Any, **settings: Any) -> Any:
        return (fused if layer.training or not torch.is_grad_enabled() else own)(*args, **settings)

    forward.__dict__["is_fused"] = True
    return forward


def fused_decoders(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Yield the decoder layers that compute as one operation now, and the forwards that do so; each type is verified."""
    if not is_padding_free(model):
        return
    verifier, buffers = Verifier(), Buffers()
    for module in model.modules():
        if is_decoder(module) and why_apart(module) is None:
            fused = functools.partial(_forward, KnownLayer(), buffers, module)
            if verifier.agrees((type(module), has_rounded(module)), module, functools.partial(_same, module, fused)):
                yield module, fused


def why_unfused(model: nn.Module) -> str | None:
    """Return why decoder layers of a known class on a CPU run module by module, in half a sentence; None if they do not."""
    layers: list[Any] = [module for module in model.modules() if is_decoder(module)]
    on_cpu = [layer for layer in layers if layer.input_layernorm.weight.is_cpu]
    return next((reason for layer in on_cpu if (reason := why_apart(layer))), None)


def why_apart(layer: nn.Module) -> str | None:
    """Return why a decoder layer runs module by module on a usual row of samples, in half a sentence; None if it does not."""
    mask, x, angles = _sample(layer)
    made = trained_layer(layer, mask)
    return made if isinstance(made, str) else why_not(made, x, *angles)


def trained_layer(layer: Any, mask: Any, past_key_values: Any = None, **settings: Any) -> TrainedLayer | str:
    """Return a layer as one operation reads it, or why it must run module by module, in half a sentence.

    Args:
        layer: A decoder layer of a known class.
        mask: The attention mask of a call.
        past_key_values: Cache of a call.
        **settings: Further arguments of the call.
    """
    if not isinstance(mask, Packing):
        return "padding is computed"
    if not (inner := _inner(layer)):
        return "another module stands in it for attention or network, such as one of modules_to_save"
    attention, _, activation, *others = inner
    if past_key_values is not None or any(settings.get(name) is not None for name in ("position_bias", "s_aux")):
        return "its attention has a cache or a bias"
    if attention.attention_dropout or mask.pattern.softcap is not None or mask.pattern.dropout:
        return "its attention drops or caps scores"
    if not attention.__dict__.get("use_rope", True):
        return "its attention does not rotate"
    kind = LOOPS.get(ACTIVATIONS.get(type(activation).__name__, "gelu"))
    if kind is None:
        return f"its activation is {type(activation).__name__}"
    if any(map(_is_watched, inner)) or _is_all_watched():
        return "a module inside of it has hooks, or another forward"
    linears = [_linear(module) for module in others[2:]]
    if any(linear is None for linear in linears):
        return "a linear layer or its adapters compute something else"
    before, after = (Norm(norm.weight, norm.variance_epsilon) for norm in others[:2])
    pattern, narrow = mask.pattern, any(linear.scale is not None for linear in linears[4:])  # type: ignore[union-attr]
    return TrainedLayer(
        tuple(linears),  # type: ignore[arg-type]
        *(before, after, attention.head_dim, attention.scaling, pattern.causal, pattern.window, kind, narrow),
    )


def _linear(module: Any) -> TrainedLinear | None:
    return module.training_weights() if hasattr(type(module), "training_weights") else frozen_weights(module)


def _inner(layer: Any) -> list[Any]:
    """Return the modules that a layer calls: attention, network, activation, both norms, and the linear layers.

    The list is empty where another module stands for attention or network, whatever attributes it passes on.
    """
    own = layer._modules  # nn.Module's attribute look-up is slow, and every layer is asked in every pass
    wanted = ("mlp", "act_fn"), *_LINEARS
    parts = [own[part]._modules.get(name) for part, name in wanted]
    if any(part is None for part in parts):
        return []
    norms = own["input_layernorm"], own["post_attention_layernorm"]
    return [own["self_attn"], own["mlp"], parts[0], *norms, *parts[1:]]


def _is_all_watched() -> bool:
    """Whether hooks of all modules must see their inputs or outputs; those that only count calls need not."""
    before = global_hooks._global_forward_pre_hooks.values()
    if any(not getattr(hook, "counts_calls", False) for hook in before):
        return True
    others = global_hooks._global_forward_hooks, global_hooks._global_backward_hooks
    return any(others) or bool(global_hooks._global_backward_pre_hooks)


def _is_watched(module: nn.Module) -> bool:
    """Whether a module must be called: it has hooks, or a forward that is not of this package."""
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooked) or ("forward" in own and not getattr(own["forward"], "is_fused", False))


def _forward(
    known: KnownLayer,
    buffers: Buffers,
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_embeddings: Any = None,
    **settings: Any,
) -> Any:
    """Compute a layer as one operation, or run its own forward where that is not possible."""
    made = trained_layer(layer, attention_mask, **settings)
    cosine, sine = position_embeddings
    if isinstance(made, str) or known.why_not(made, hidden_states, cosine, sine):
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return type(layer).forward(layer, hidden_states, **given, **settings)
    lengths = tuple(length for length in attention_mask.lengths if length)
    for hook in global_hooks._global_forward_pre_hooks.values():
        for module in _inner(layer):
            hook(module, ())
    struct = known.struct(made, hidden_states)
    output = not is_recomputing() or bool(layer._forward_hooks)  # a hook reads it; autograd does not
    return decoder_layer(made, hidden_states, cosine, sine, lengths, struct, buffers, output)


# ---- findings of earlier passes ----------------------------------------------------------------------------------


class KnownLayer:
    """Findings of the last call of a layer, which hold while its numbers and tensors are the same.

    Checking around thirty tensors and writing them into a struct takes as much Python as all else of a layer.
    """

    def __init__(self) -> None:
        self._state: list[Any] | None = None
        self._reason: str | None = None
        self._struct: abi.TrainingLayer | None = None

    def why_not(self, layer: TrainedLayer, x: Tensor, cosine: Tensor, sine: Tensor) -> str | None:
        """Return the answer of :func:`~lorakeet.kernels.decoder_layer_training.why_not`.

        Args:
            layer: The layer as it is now.
            x: Hidden states [1, n, hidden].
            cosine: Of the positions, [1, n, head_width].
            sine: Likewise.
        """
        if reason := why_not_row(layer, x, (cosine, sine)):
            return reason
        state = _state(layer, x)
        if state is None or state != self._state:
            self._state, self._reason, self._struct = state, why_not_weights(layer, x), None
        return self._reason

    def struct(self, layer: TrainedLayer, x: Tensor) -> abi.TrainingLayer:
        """Return the struct of a layer for which :meth:`why_not` has answered None."""
        if self._struct is None:
            self._struct = weights_struct(layer, x, layer.tensors())
        return self._struct


def _state(layer: TrainedLayer, x: Tensor) -> list[Any] | None:
    """Return all that is checked of a layer and written for C, in values; None where a tensor has no plain memory."""
    tensors = layer.tensors()
    if any(t is not None and type(t) not in bindings.PLAIN for t in tensors):
        return None
    numbers = [(linear.scaling, linear.p) for linear in layer.linears]
    norms = layer.before.eps, layer.after.eps
    tiles = any(linear.weight.dtype in HALVES for linear in layer.linears) and in_tiles()
    products = *layer.products(x), fixed_order.is_active(), tiles
    return [x.shape[2], *layer[3:], *norms, *numbers, *products, *map(_state_of_tensor, tensors)]


def _state_of_tensor(t: Tensor | None) -> Any:
    return None if t is None else (t.data_ptr(), t.dtype, t.shape, t.is_contiguous(), t.is_cpu, t.requires_grad)


# ---- verification -----------------------------------------------------------------------------------------------


def _sample(layer: Any) -> tuple[Packing, Tensor, tuple[Tensor, Tensor]]:
    """Return the layout of a row of samples, and its hidden states and angles at random."""
    weight, total = layer.input_layernorm.weight, sum(_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, total, len(weight), generator=generator).to(weight.device, weight.dtype)
    angles = torch.randn(1, total, layer.self_attn.head_dim, generator=generator).to(weight.device, weight.dtype)
    packing = Packing((1, total), torch.arange(total), _LENGTHS, Pattern(causal=True, window=5))
    return packing, x, (angles.cos(), angles.sin())


def _same(layer: Any, fused: Forward) -> bool:
    """Whether output and gradient of a layer as one operation are those of its own forward, on random rows."""
    mask, x, angles = _sample(layer)
    own = functools.partial(type(layer).forward, layer, attention_mask=mask, position_embeddings=angles)
    patched = functools.partial(fused, attention_mask=mask, position_embeddings=angles)
    results = zip(output_and_gradient(own, x), output_and_gradient(patched, x), _TOLERANCES, strict=True)
    return all(bool(expected.isfinite().all()) and is_close(expected, found, near) for expected, found, near in results)
