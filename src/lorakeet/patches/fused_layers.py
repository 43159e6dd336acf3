"""Norms, gated feed-forward networks and rotary embeddings that keep less for the backward pass and go over memory less
often.

The modules of a model stay what and where they are; while :func:`fused_layers` holds, those of known classes compute by
:mod:`lorakeet.kernels.rms_norm`, :mod:`lorakeet.kernels.glu` and :mod:`lorakeet.kernels.rotary` when they are in training
mode. One of each kind is first held against its own forward on random numbers, output and gradient; a kind that differs is
left as it is, and that is said. An attention runs the very code that it has, in which ``apply_rotary_pos_emb`` means another
function.
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
from lorakeet.log import warn
from lorakeet.quant.protocol import has_quantized
from lorakeet.rng import same_random_state

# fmt: off
#: Architectures of transformers whose ``…RMSNorm`` is a norm that the kernel knows, and whether its weight is added to 1.
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
#: Architectures whose ``…Attention`` turns queries and keys by an ``apply_rotary_pos_emb`` that the kernel knows.
ROTARY = (
    "Gemma", "Gemma2", "Gemma3", "Granite", "Llama", "Ministral", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3",
    "Qwen3Moe", "SmolLM3",
)
# fmt: on
_TURN = "apply_rotary_pos_emb"
_ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}
#: By how many units of rounding output and gradient may differ from a module's own.
_ROUNDINGS = 8

Forward = Callable[..., Any]


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """While this holds, norms, gated networks and rotary embeddings of known classes in ``model`` compute fused in training
    mode.

    Same outputs and gradients, within the rounding of their dtype. Names, parameters and hooks of the model stay. A norm's
    weight gets a gradient only where it learns.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in _fused_forwards(model):
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in replaced:
            del module.forward
            if own is not None:
                module.forward = own


def _fused_forwards(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Modules and what they shall compute; one of each kind has been tried."""
    found: list[tuple[nn.Module, Forward]] = []
    good: dict[Any, bool] = {}
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}  # computed with their adapters
    for module in model.modules():
        fused = None if id(module) in adapted else _fused(module)
        if fused is None:
            continue
        kind = _kind(module)
        if kind not in good:
            with same_random_state():
                good[kind] = _turns_alike(module) if _turns(module) else _agrees(module, fused)
            if not good[kind]:
                warn(f"{type(module).__name__} computes otherwise than expected and stays as it is")
        if good[kind]:
            found.append((module, _in_training(module, _keeping_less(module, fused))))
    return found


def _fused(module: nn.Module) -> Forward | None:
    """The fused forward of a module of a known class of transformers; None for all others."""
    if type(module) is nn.Linear:
        return functools.partial(_frozen_linear, module) if _frozen(module) else None
    if not type(module).__module__.startswith("transformers.models."):
        return None
    name = type(module).__name__
    if name.endswith("RMSNorm") and name.removesuffix("RMSNorm") in NORMS:
        return functools.partial(_norm, module, NORMS[name.removesuffix("RMSNorm")])
    if name.endswith("MLP") and name.removesuffix("MLP") in GATED:
        activation = _ACTIVATIONS.get(type(module.act_fn).__name__)
        return None if activation is None else functools.partial(_feed_forward, module, activation)
    return _with_fused_turn(module) if _turns(module) else None


def _norm(module: Any, one_more: bool, x: Tensor) -> Tensor:
    eps = module.eps if one_more else module.variance_epsilon
    return rms_norm(x, module.weight, eps, one_more)


def _frozen(module: nn.Module) -> bool:
    """Whether nothing of a module learns, and all of it lies on the CPU."""
    return all(p.is_cpu and not p.requires_grad for p in module.parameters())


def _frozen_linear(module: nn.Linear, x: Tensor) -> Tensor:
    return frozen_linear(x, module.weight, module.bias)


def _feed_forward(module: Any, activation: Activation, x: Tensor, keep: torch.dtype | None = None) -> Tensor:
    output: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), activation, keep))
    return output


def _keeping_less(module: nn.Module, fused: Forward) -> Forward:
    """A feed-forward network on weights in 8 bits need not remember 32 of what they gave: bf16's rounding of a gradient is
    far below what the weights' own did to it."""
    quantized = hasattr(module, "act_fn") and has_quantized(module)
    return functools.partial(fused, keep=torch.bfloat16) if quantized else fused


def _in_training(module: nn.Module, fused: Forward) -> Forward:
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **settings: Any) -> Any:
        return fused(*args, **settings) if module.training else own(*args, **settings)

    forward.__dict__["is_fused"] = True
    return forward


def _turns(module: nn.Module) -> bool:
    """Whether a module is an attention of a known class, whose code asks for the function that turns and is what runs."""
    name, forward, given = type(module).__name__, type(module).forward, module.__dict__.get("forward")
    if given is not None and not getattr(given, "is_fused", False):
        return False
    code = getattr(forward, "__code__", None)
    is_known = name.endswith("Attention") and name.removesuffix("Attention") in ROTARY
    return is_known and code is not None and _TURN in code.co_names and _TURN in forward.__globals__


def _with_fused_turn(module: nn.Module) -> Forward:
    """The forward of an attention, the same code, with the fused function in place of the one that turns."""
    own: Any = type(module).forward
    meant = {**own.__globals__, _TURN: _turn}
    made = FunctionType(own.__code__, meant, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return functools.partial(made, module)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """As ``apply_rotary_pos_emb``: q and k [B, heads, T, d], cos and sin [B, T, d]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _turns_alike(module: nn.Module) -> bool:
    """Whether the function that a module's code asks for turns as ours does, and takes the same arguments."""
    own = type(module).forward.__globals__[_TURN]
    if list(inspect.signature(own).parameters) != list(inspect.signature(_turn).parameters):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    cos, sin = torch.randn(2, 2, 5, 8, generator=generator)

    def both(turn: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda leaf: torch.cat(turn(leaf[:, :2], leaf[:, 2:], cos, sin), dim=1)

    return _same([_outcome(both(turn), x) for turn in (own, _turn)])


def _kind(module: Any) -> tuple[Any, ...]:
    """Modules of one kind need to be tried once."""
    if _turns(module):
        return (type(module),)
    if hasattr(module, "act_fn"):
        return type(module), type(module.act_fn)
    if type(module) is nn.Linear:
        return nn.Linear, module.weight.dtype, module.bias is None
    return type(module), module.weight.dtype, getattr(module, "eps", None), getattr(module, "variance_epsilon", None)


def _agrees(module: nn.Module, fused: Forward) -> bool:
    """Whether output and gradient of a module are those of its own forward, on random rows."""
    parameters = sorted(module.parameters(), key=lambda p: (not p.is_floating_point(), p.requires_grad))
    like = parameters[0]  # what an adapter adds may be wider than what the module computes in
    if hasattr(module, "hidden_size"):
        width: Any = module.hidden_size
    else:
        width = like.shape[1] if type(module) is nn.Linear else like.shape[0]
    dtype = like.dtype if like.is_floating_point() else torch.float32
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(like.device, dtype)
    try:
        outcomes = [_outcome(forward, x) for forward in (module.forward, fused)]
    except RuntimeError:  # weights that are elsewhere, or that want another dtype
        return False
    return _same(outcomes)


def _same(outcomes: list[tuple[Tensor, Tensor]]) -> bool:
    near = [_ROUNDINGS * torch.finfo(own.dtype).eps for own in outcomes[0]]
    return all(
        own.dtype == new.dtype and torch.allclose(own, new, rtol=eps, atol=eps * float(own.abs().max()))
        for own, new, eps in zip(*outcomes, near, strict=True)
    )


@torch.enable_grad()
def _outcome(forward: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)  # dropout of an adapter inside
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
    return y.detach(), gradient
