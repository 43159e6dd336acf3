"""Fused norms, gated feed-forward networks and rotary embeddings: fewer bytes for the backward pass, fewer memory passes.

The modules of a model stay unchanged. While :func:`fused_layers` is active, modules of known classes in training mode
compute by :mod:`lorakeet.kernels.rms_norm`, :mod:`lorakeet.kernels.glu` and :mod:`lorakeet.kernels.rotary`. One module of
each layer type is first compared with its own forward on random numbers (:mod:`lorakeet.patches.verify`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lorakeet.kernels.frozen_linear import frozen_linear
from lorakeet.kernels.glu import Activation, gated
from lorakeet.kernels.rms_norm import rms_norm
from lorakeet.kernels.rotary import rotary
from lorakeet.patches.fused_decoder import ACTIVATIONS, fused_decoder_layers
from lorakeet.patches.verify import Verifier, same_output_and_gradient
from lorakeet.quant.half import HalfLinear
from lorakeet.quant.protocol import has_rounded, quantized_layers

# fmt: off
#: Architectures of transformers whose ``…RMSNorm`` the kernel computes, and whether 1 is added to the weight.
NORMS = {
    **dict.fromkeys([
        "Granite", "Llama", "Ministral", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SmolLM3",
    ], False),
    **dict.fromkeys(["Gemma", "Gemma2", "Gemma3"], True),
}
#: Architectures whose ``…MLP`` is down_proj(act_fn(gate_proj(x))·up_proj(x)).
GATED = (
    "Gemma", "Gemma2", "Gemma3", "Granite", "Llama", "Ministral", "Mistral", "Olmo", "Olmo2", "Olmo3", "Qwen2", "Qwen3",
    "SmolLM3",
)
#: Architectures whose ``…Attention`` rotates queries and keys by an ``apply_rotary_pos_emb`` that the kernel computes.
ROTARY = (
    "Gemma", "Gemma2", "Gemma3", "Granite", "Llama", "Ministral", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3",
    "Qwen3Moe", "SmolLM3",
)
# fmt: on
#: Function of transformers that rotates queries and keys, looked up by name in the module of each architecture.
_ROTATE = "apply_rotary_pos_emb"
#: Units of rounding (``eps`` of the dtype) by which output and gradient may differ from the module's own.
_ROUNDINGS = 8

Forward = Callable[..., Any]


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Fuse norms, gated networks and rotary embeddings of known classes in ``model`` while it is in training mode.

    Decoder layers run as one operation without gradients too (:mod:`lorakeet.patches.fused_decoder`).
    Outputs and gradients are the same within the rounding of their dtype. Names, parameters and hooks do not change.
    The weight of a norm gets a gradient only if it is trainable.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in _fused_forwards(model):
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = forward
        with fused_decoder_layers(model):  # compared with their modules as these compute now
            yield
    finally:
        for module, own in replaced:
            del module.forward
            if own is not None:
                module.forward = own


def _fused_forwards(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Return the modules to patch and their fused forwards; one module of each layer type has been verified."""
    found: list[tuple[nn.Module, Forward]] = []
    verifier = Verifier()
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}  # run inside of their adapters
    for module in model.modules():
        fused = None if id(module) in adapted else _fused(module)
        if fused is None:
            continue
        compare = (
            functools.partial(_same_rotary, module) if _rotates(module) else functools.partial(_same, module, fused)
        )
        if verifier.agrees(_layer_type(module), module, compare):
            found.append((module, _in_training(module, _keep_bf16(module, fused))))
    return found


def _fused(module: nn.Module) -> Forward | None:
    """Return the fused forward of a module of a known class of transformers; None for all others."""
    if type(module) is nn.Linear:
        return functools.partial(_frozen_linear, module) if _is_frozen_on_cpu(module) else None
    if isinstance(module, HalfLinear):
        return module.fused_forward if _is_frozen_on_cpu(module) else None
    if not type(module).__module__.startswith("transformers.models."):
        return None
    name = type(module).__name__
    if name.endswith("RMSNorm") and name.removesuffix("RMSNorm") in NORMS:
        return functools.partial(_norm, module, NORMS[name.removesuffix("RMSNorm")])
    if name.endswith("MLP") and name.removesuffix("MLP") in GATED:
        activation = ACTIVATIONS.get(type(module.act_fn).__name__)
        return None if activation is None else functools.partial(_feed_forward, module, activation)
    return _with_fused_rotary(module) if _rotates(module) else None


def _norm(module: Any, one_more: bool, x: Tensor) -> Tensor:
    eps = module.eps if one_more else module.variance_epsilon
    return rms_norm(x, module.weight, eps, one_more)


def _is_frozen_on_cpu(module: nn.Module) -> bool:
    return all(p.is_cpu and not p.requires_grad for p in module.parameters())


def _frozen_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return frozen_linear(x, module.weight, module.bias)


def _feed_forward(module: Any, activation: Activation, x: Tensor, keep: torch.dtype | None = None) -> Tensor:
    output: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation, keep))
    return output


def _keep_bf16(module: nn.Module, fused: Forward) -> Forward:
    """Let a feed-forward network on quantized weights keep its gates in bf16 for the backward pass.

    The rounding error of bf16 is far below the error that the weights' rounding causes in the gradient.
    """
    is_quantized = hasattr(module, "act_fn") and has_rounded(module)
    return functools.partial(fused, keep=torch.bfloat16) if is_quantized else fused


def _in_training(module: nn.Module, fused: Forward) -> Forward:
    """Return a forward that is fused in training mode, and the module's own otherwise."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **settings: Any) -> Any:
        return fused(*args, **settings) if module.training else own(*args, **settings)

    forward.__dict__["is_fused"] = True
    return forward


# ---- rotary embeddings ------------------------------------------------------------------------------------------
#
# An attention of transformers calls ``apply_rotary_pos_emb``, a global function of its model's file. It is no method and
# no argument, so it can be replaced in two ways only. Replacing it in the file changes every model of the process, also
# those outside of :func:`fused_layers`. So the attention runs a copy of its own forward: the same code object, with
# globals in which that one name is another function. Nothing is copied by hand, so it follows each new version.
# Seen in transformers 5.18; tests/patches/test_transformers_internals.py fails by name if the function moves.


def _rotates(module: nn.Module) -> bool:
    """Whether a module is an attention of a known class that runs its own code and calls the rotary function."""
    name, forward, given = type(module).__name__, type(module).forward, module.__dict__.get("forward")
    if given is not None and not getattr(given, "is_fused", False):
        return False
    code = getattr(forward, "__code__", None)
    is_known = name.endswith("Attention") and name.removesuffix("Attention") in ROTARY
    return is_known and code is not None and _ROTATE in code.co_names and _ROTATE in forward.__globals__


def _with_fused_rotary(module: nn.Module) -> Forward:
    """Return the own forward of an attention, the same code, with the fused function in place of its rotary function."""
    own: Any = type(module).forward
    globals_ = {**own.__globals__, _ROTATE: _rotate}
    forward = FunctionType(own.__code__, globals_, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return functools.partial(forward, module)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q and k [B, heads, T, d] by cos and sin [B, T, d], as ``apply_rotary_pos_emb`` does."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _same_rotary(module: nn.Module) -> bool:
    """Whether the rotary function of a module's file has the arguments and the results of the fused one."""
    own = type(module).forward.__globals__[_ROTATE]
    if list(inspect.signature(own).parameters) != list(inspect.signature(_rotate).parameters):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    cos, sin = torch.randn(2, 2, 5, 8, generator=generator)

    def both(rotate: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda leaf: torch.cat(rotate(leaf[:, :2], leaf[:, 2:], cos, sin), dim=1)

    return same_output_and_gradient(both(own), both(_rotate), x, _ROUNDINGS)


# ---- verification -----------------------------------------------------------------------------------------------


def _layer_type(module: Any) -> tuple[Any, ...]:
    """Return what decides how a module computes; modules that share it are verified once."""
    if _rotates(module):
        return (type(module),)
    if hasattr(module, "act_fn"):
        return type(module), type(module.act_fn)
    if type(module) is nn.Linear:
        return nn.Linear, module.weight.dtype, module.bias is None
    return type(module), module.weight.dtype, getattr(module, "eps", None), getattr(module, "variance_epsilon", None)


def _same(module: nn.Module, fused: Forward) -> bool:
    """Whether output and gradient of a fused forward are those of the module's own, on random rows."""
    parameters = sorted(module.parameters(), key=lambda p: (not p.is_floating_point(), p.requires_grad))
    like = parameters[0]  # not an adapter's, which may be wider than the dtype that the module computes in
    if hasattr(module, "hidden_size"):
        width: Any = module.hidden_size
    else:
        width = like.shape[1] if isinstance(module, (nn.Linear, HalfLinear)) else like.shape[0]
    own = like.dtype if like.is_floating_point() else torch.float32
    dtype = next((layer.dtype for _, layer in quantized_layers(module) if layer.exact), own)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(like.device, dtype)
    try:
        return same_output_and_gradient(module.forward, fused, x, _ROUNDINGS)
    except RuntimeError:  # weights on another device, or of another dtype
        return False
