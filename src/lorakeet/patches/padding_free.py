"""Layers of a model of transformers without computation for padding.

Embeddings, heads, losses and metrics see the padded batch [B, T] as before. Between the first layer and the last, its
real positions lie end to end in one row [1, total, H]. They are gathered before the first layer and scattered after the
last, with zeros at padding. Attention runs within each sample (:mod:`lorakeet.kernels.attention.segment`).

The layout travels in place of the attention mask: transformers calls a registered function for the mask and gets a
:class:`Packing`, which every layer passes on to its attention. No other state is kept. So a layer that runs again for
gradient checkpointing finds its own layout, and so do two forward passes before one backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakeet.errors import TrainingError
from lorakeet.kernels.attention.pattern import Pattern
from lorakeet.kernels.attention.segment import segment_attention

# fmt: off
#: Architectures (``config.model_type`` of the layers' owner) whose outputs and gradients are tested to equal those of the
#: padded model: encoders, then decoders.
PROVEN = frozenset({
    "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "modernbert",
    "nomic_bert", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "granite", "helium", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
    "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
    "starcoder2",
})
# fmt: on

#: Settings under which a layer does something that a packed row does not allow, and the reason.
_HINDRANCES: dict[str, Callable[[Any], str | None]] = {
    "is_encoder_decoder": lambda on: "it is an encoder-decoder, whose decoder attends to another row" if on else None,
    "add_cross_attention": lambda on: "its layers attend to another row (add_cross_attention)" if on else None,
    "layerdrop": lambda p: f"it drops layers at random (layerdrop {p})" if p else None,
    "chunk_size_feed_forward": lambda size: (
        f"it cuts rows into chunks of {size} (chunk_size_feed_forward)" if size else None
    ),
    "use_bidirectional_attention": lambda on: (
        "its windows look both ways (use_bidirectional_attention)" if on else None
    ),
    "position_embedding_type": lambda kind: (
        f"its positions are {kind} (position_embedding_type)" if kind not in (None, "absolute") else None
    ),
    "reorder_and_upcast_attn": lambda on: (
        "it computes attention in its own order (reorder_and_upcast_attn)" if on else None
    ),
}


@dataclass(frozen=True)
class Packing:
    """Layout of the real positions of a padded batch in one row: samples end to end, shortest first.

    Attributes:
        shape: (B, T) of the padded batch.
        positions: [total] int64, index into the flattened batch of each position of the row.
        lengths: Positions of each sample, in the order of the row.
        pattern: Attention pattern within a sample.
    """

    shape: tuple[int, int]
    positions: Tensor
    lengths: tuple[int, ...]
    pattern: Pattern
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, mask: Tensor, pattern: Pattern) -> Packing:
        """Return the packing of a mask [B, T]: True is real, without gaps in between."""
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        sample, column = mask[order].nonzero(as_tuple=True)
        positions = order[sample] * mask.shape[1] + column
        return cls((mask.shape[0], mask.shape[1]), positions, tuple(lengths[order].tolist()), pattern)

    def pack(self, x: Tensor) -> Tensor:
        """Gather [B, T, ...] -> [1, total, ...]; [1, T, ...] is the same for every sample."""
        positions = self.positions.to(x.device)
        if x.shape[0] == self.shape[0]:
            return x.flatten(0, 1).index_select(0, positions)[None]
        return x[0].index_select(0, positions % self.shape[1])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Scatter [1, total, ...] -> [B, T, ...], zeros at padding."""
        rows, columns = self.shape
        padded = x.new_zeros(rows * columns, *x.shape[2:])
        return padded.index_copy(0, self.positions.to(x.device), x[0]).unflatten(0, (rows, columns))

    def pack_like(self, value: Any) -> Any:
        """Pack tensors, and tuples of them, that have a value for each position; return anything else unchanged."""
        if isinstance(value, tuple):
            return tuple(self.pack_like(part) for part in value)
        rows, columns = self.shape
        if not torch.is_tensor(value) or value.ndim < 2 or value.shape[0] not in (1, rows) or value.shape[1] != columns:
            return value
        if value.requires_grad:
            return self.pack(value)
        if id(value) not in self._packed:  # rotary embeddings, position ids: the same tensor for every layer
            self._packed[id(value)] = (value, self.pack(value))
        return self._packed[id(value)][1]


# ---- functions that transformers calls -----------------------------------------------------------------------------------


def _packing_or_mask(plain: Callable[..., Any], **arguments: Any) -> Any:
    """Return a packing where the attention pattern is known, the plain mask elsewhere; transformers calls it."""
    mask, pattern = arguments.get("attention_mask"), _pattern(**arguments)
    if pattern is None or mask is None or mask.shape != (arguments["batch_size"], arguments["q_length"]):
        return plain(**arguments)
    return Packing.of(mask.bool(), pattern)


def _pattern(
    mask_function: Callable[..., Any] = causal_mask_function,
    local_size: int | None = None,
    use_vmap: bool = False,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    **_: Any,
) -> Pattern | None:
    """Return the attention pattern, if it is one that the kernel computes."""
    if use_vmap or not (isinstance(q_offset, int) and q_offset == kv_offset == 0):
        return None
    if local_size is not None:
        overlay = _overlays(mask_function)
        if overlay == {"sliding_window_overlay", "causal_mask_function"}:
            return Pattern(causal=True, window=local_size)
        if overlay == {"sliding_window_bidirectional_overlay", "bidirectional_mask_function"}:
            return Pattern(causal=False, window=local_size)
        return None
    known = {causal_mask_function: True, bidirectional_mask_function: False}
    return Pattern(causal=known[mask_function]) if mask_function in known else None


def _overlays(mask_function: Callable[..., Any]) -> set[str]:
    """Return the names of the functions whose intersection a mask function is."""
    # Why the closure is read: transformers builds the mask of a sliding window as a closure over a causal mask and an
    # overlay (`and_masks`), and passes only that closure. The pattern is in no argument: `local_size` tells the window, but
    # not whether it looks back only or both ways. Evaluating the closure position by position would tell it too, but
    # builds the dense [T, T] mask that a packed row saves. An unknown closure means the plain mask, so a change costs
    # speed, not correctness. Seen in transformers 5.18; tests/patches/test_transformers_internals.py fails by name.
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return {part.__qualname__.partition(".")[0] for part in parts}


def _attention(
    plain: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of a packed row, [1, h, total, d] -> [1, total, h, d]; transformers calls it."""
    if not isinstance(attention_mask, Packing):
        return plain(module, q, k, v, attention_mask, **settings)
    for name in ("position_bias", "s_aux"):
        if settings.get(name) is not None:
            raise TrainingError(
                f"{type(module).__name__} uses {name}, which a packed row does not have", "train.padding_free=false"
            )
    packing = attention_mask
    pattern = replace(packing.pattern, dropout=settings.get("dropout") or 0.0, softcap=settings.get("softcap"))
    return segment_attention(q, k, v, packing.lengths, pattern, settings.get("scaling")), None


def _eager(module: nn.Module, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Compute attention by the plain torch function in the model's own file."""
    return cast(Any, inspect.getmodule(type(module))).eager_attention_forward(module, *args, **settings)


#: Name of the attention while no padding is computed, by the attention that a model was loaded with.
_NAMES = {"sdpa": "lorakeet_padding_free", "eager": "lorakeet_padding_free_eager"}
for _plain, _forward, _mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(_NAMES[_plain], functools.partial(_attention, _forward))
    AttentionMaskInterface.register(_NAMES[_plain], functools.partial(_packing_or_mask, _mask))


# ---- the layers of a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """The layers of a model and the innermost model that owns them."""

    owner: PreTrainedModel
    layers: nn.ModuleList


def _stacks(model: nn.Module) -> list[_Stack]:
    found: list[_Stack] = []
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer):
            inside = [owner for prefix, owner in owners if not prefix or name.startswith(prefix + ".")]
            if inside:
                found.append(_Stack(inside[-1], module))
    return found


def why_padded(model: nn.Module) -> str | None:
    """Return why :func:`padding_free` does not apply to a model, in half a sentence; None if it does."""
    stacks = _stacks(model)
    if len(stacks) != 1:
        name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        count = "no stack of layers" if not stacks else f"{len(stacks)} stacks of layers"
        return f"{name} has {count} that transformers marks as such, expected one"
    config = stacks[0].owner.config
    for name, hindrance in _HINDRANCES.items():
        if reason := hindrance(getattr(config, name, None)):
            return f"{config.model_type}: {reason}"
    if config.model_type not in PROVEN:
        return f"{config.model_type} is not among the architectures it is proven for"
    plain = _plain_attention(config)
    if plain not in _NAMES:
        return f"attention is {plain}, expected sdpa or eager"
    if plain == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        return "sdpa ignores the soft-cap of its scores; load the model with attn_implementation='eager'"
    return None


def is_padding_free(model: nn.Module) -> bool:
    """Whether a model is inside of :func:`padding_free`."""
    return any(stack.owner.config._attn_implementation in _NAMES.values() for stack in _stacks(model))


def _plain_attention(config: Any) -> str:
    """Return the attention that a model was loaded with, also while no padding is computed."""
    known = {name: plain for plain, name in _NAMES.items()}
    return known.get(config._attn_implementation, config._attn_implementation)


@contextmanager
def padding_free(model: nn.Module) -> Iterator[None]:
    """Make the layers of ``model`` compute real positions alone; outputs at these positions do not change.

    ``model`` is an encoder or decoder of transformers, or a wrapper of one (such as an adapter). Outputs at padding are
    undefined. The backward pass belongs inside too, since gradient checkpointing runs layers again. A forward pass that
    returns hidden states, attentions or a cache runs unchanged, and so does one without padding that is not on a CPU. No
    cache is kept unless the caller asks for one.

    Raises:
        TrainingError: The model does not support it (see :func:`why_padded`).
    """
    if reason := why_padded(model):
        raise TrainingError(f"padding must be computed: {reason}", "train.padding_free=false")
    (stack,) = _stacks(model)
    config: Any = stack.owner.config
    before = config._attn_implementation
    plain = _plain_attention(config)
    with ExitStack() as undo:
        gate = _Gate(config, plain, tuple(inspect.signature(stack.owner.forward).parameters))
        handles = [
            stack.owner.register_forward_pre_hook(gate.enter, with_kwargs=True),
            stack.owner.register_forward_hook(gate.leave, always_call=True),
        ]
        for index, layer in enumerate(stack.layers):
            handles.append(
                layer.register_forward_pre_hook(functools.partial(_before_layer, index == 0), with_kwargs=True)
            )
        handles.append(stack.layers[-1].register_forward_hook(_after_layers, with_kwargs=True))
        for handle in handles:
            undo.callback(handle.remove)
        undo.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = _NAMES[plain]
        yield


@dataclass(frozen=True)
class _Gate:
    """Hooks that run a forward pass unpacked if it returns values that a packed row does not have."""

    config: Any
    plain: str
    names: tuple[str, ...]  # of the arguments of forward, in order

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Choose the attention of this pass, and keep no cache unless the caller asks for one."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self._needs_padding(given):
            self.config._attn_implementation = self.plain
        elif (
            "use_cache" in self.names and given.get("use_cache") is None and "use_cache" not in self.names[: len(args)]
        ):
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Return to packed attention."""
        self.config._attn_implementation = _NAMES[self.plain]

    def _needs_padding(self, given: dict[str, Any]) -> bool:
        mask = given.get("attention_mask")
        if not torch.is_tensor(mask) or mask.ndim != 2 or not _gains(mask.bool()):
            return True
        returned = ("output_hidden_states", "output_attentions", "output_router_logits")
        if any(getattr(self.config, name, None) if given.get(name) is None else given[name] for name in returned):
            return True
        cached = ("past_key_values", "encoder_hidden_states", "use_cache")
        return any(given.get(name) is not None and given.get(name) is not False for name in cached)


def _gains(mask: Tensor) -> bool:
    """Whether packing a mask [B, T] is faster: it has padding, or is on a CPU, where attention of a row is faster anyway.

    A row with padding between its real positions is excluded, since a window would count it.
    """
    starts = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return bool(mask.any()) and (mask.is_cpu or not bool(mask.all())) and int(starts.max()) == 1


def _packing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packing | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Packing)), None)


def _before_layer(
    first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pack the inputs of a layer; hidden states are already packed after the first layer."""
    packing = _packing(args, kwargs)
    if packing is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if first:
        hidden = packing.pack(hidden)
    elif hidden.shape[:2] != (1, len(packing.positions)):
        raise TrainingError(f"{type(layer).__name__} mixes packed and padded rows", "train.padding_free=false")
    named = {name: hidden if name == "hidden_states" else packing.pack_like(x) for name, x in kwargs.items()}
    return (*[hidden][: len(args)], *(packing.pack_like(x) for x in args[1:])), named


def _after_layers(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Unpack the output of the last layer into a padded batch."""
    packing = _packing(args, kwargs)
    if packing is None:
        return None
    if isinstance(output, tuple):
        return (packing.unpack(output[0]), *output[1:])
    return packing.unpack(output)
