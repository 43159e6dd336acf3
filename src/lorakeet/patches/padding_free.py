"""Layers that compute nothing for padding.

A batch stays what it is, padded ids [B, T] with an attention mask, so embeddings, heads, losses and metrics see what they
always saw. Between the first layer and the last its real positions lie end to end in one row [1, total, H]: before the
first layer they are gathered, after the last they are put back, with zeros where padding is. Attention runs within each
sample (:mod:`lorakeet.kernels.attention.segment`).

What the layers need to know travels where the attention mask travels: transformers asks a registered function for the
mask, and gets a :class:`Packing`, which every layer hands on to its attention. Nothing else is remembered, so a layer that
is run again for gradient checkpointing, or two forward passes before one backward, find what belongs to them.
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
#: Architectures (``config.model_type`` of what owns the layers) whose outputs and gradients are tested to be those of the
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

#: Settings under which a layer would do something that a packed row does not allow.
_HINDRANCES: dict[str, Callable[[Any], str | None]] = {
    "is_encoder_decoder": lambda on: "it is an encoder-decoder, whose decoder attends to another row" if on else None,
    "add_cross_attention": lambda on: "its layers attend to another row (add_cross_attention)" if on else None,
    "layerdrop": lambda p: f"it leaves out layers at random (layerdrop {p})" if p else None,
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
    """Where the real positions of a padded batch lie in one row: samples end to end, shortest first.

    Attributes:
        shape: (B, T) of the padded batch.
        places: [total] int64, where in the flattened batch each position of the row comes from.
        lengths: Positions of each sample, in the order they lie.
        pattern: Who sees whom within a sample.
    """

    shape: tuple[int, int]
    places: Tensor
    lengths: tuple[int, ...]
    pattern: Pattern
    _packed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, mask: Tensor, pattern: Pattern) -> Packing:
        """The packing of a mask [B, T]: True is real, without gaps in between."""
        lengths = mask.sum(1)
        order = lengths.argsort(stable=True)
        sample, column = mask[order].nonzero(as_tuple=True)
        places = order[sample] * mask.shape[1] + column
        return cls((mask.shape[0], mask.shape[1]), places, tuple(lengths[order].tolist()), pattern)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, total, ...]; [1, T, ...] counts as the same for every sample."""
        places = self.places.to(x.device)
        if x.shape[0] == self.shape[0]:
            return x.flatten(0, 1).index_select(0, places)[None]
        return x[0].index_select(0, places % self.shape[1])[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, total, ...] -> [B, T, ...], zeros at padding."""
        rows, columns = self.shape
        padded = x.new_zeros(rows * columns, *x.shape[2:])
        return padded.index_copy(0, self.places.to(x.device), x[0]).unflatten(0, (rows, columns))

    def pack_like(self, value: Any) -> Any:
        """Packs whatever has a value for each position: tensors, and tuples of them; hands on anything else."""
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


# ---- what transformers asks for -------------------------------------------------------------------------------------


def _packing_or_mask(plain: Callable[..., Any], **asked: Any) -> Any:
    """A mask function as transformers calls it: a packing where we know the pattern, the plain mask elsewhere."""
    mask, pattern = asked.get("attention_mask"), _pattern(**asked)
    if pattern is None or mask is None or mask.shape != (asked["batch_size"], asked["q_length"]):
        return plain(**asked)
    return Packing.of(mask.bool(), pattern)


def _pattern(
    mask_function: Callable[..., Any] = causal_mask_function,
    local_size: int | None = None,
    use_vmap: bool = False,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    **_: Any,
) -> Pattern | None:
    """Who sees whom, if it is one of the patterns that the kernel knows."""
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
    """Names of the functions whose intersection a mask function is."""
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    return {part.__qualname__.partition(".")[0] for part in parts}


def _attention(
    plain: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it: [1, h, total, d] -> [1, total, h, d]."""
    if not isinstance(attention_mask, Packing):
        return plain(module, q, k, v, attention_mask, **settings)
    for name in ("position_bias", "s_aux"):
        if settings.get(name) is not None:
            raise TrainingError(
                f"{type(module).__name__} wants {name}, which a packed row has not", "train.padding_free=false"
            )
    packing = attention_mask
    pattern = replace(packing.pattern, dropout=settings.get("dropout") or 0.0, softcap=settings.get("softcap"))
    return segment_attention(q, k, v, packing.lengths, pattern, settings.get("scaling")), None


def _eager(module: nn.Module, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """The attention in plain torch that a modelling file brings along."""
    return cast(Any, inspect.getmodule(type(module))).eager_attention_forward(module, *args, **settings)


#: By the attention that a model was loaded with: what it is called while no padding is computed.
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
    """Why :func:`padding_free` would not help a model, in half a sentence; None if it would."""
    stacks = _stacks(model)
    if len(stacks) != 1:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        count = "no stack of layers" if not stacks else f"{len(stacks)} stacks of layers"
        return f"{kind} has {count} that transformers describes, expected one"
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
        return "sdpa leaves out the soft-capping of its scores; load it with attn_implementation='eager'"
    return None


def is_padding_free(model: nn.Module) -> bool:
    """Whether :func:`padding_free` holds for a model at this moment."""
    return any(stack.owner.config._attn_implementation in _NAMES.values() for stack in _stacks(model))


def _plain_attention(config: Any) -> str:
    """The attention that a model was loaded with, also while no padding is computed."""
    known = {name: plain for plain, name in _NAMES.items()}
    return known.get(config._attn_implementation, config._attn_implementation)


@contextmanager
def padding_free(model: nn.Module) -> Iterator[None]:
    """While this holds, the layers of ``model`` compute real positions alone; outputs at these are as before.

    ``model`` is an encoder or decoder of transformers, or anything around one (an adapter, a wrapper). Outputs at
    padding are no longer anything a layer has computed. The backward pass belongs inside too, where layers may be run again
    for gradient checkpointing. A forward pass that asks for hidden states, attentions or a cache, or that has no padding and
    is not on a CPU, runs as it always does. No cache is kept unless one is asked for.

    Raises:
        TrainingError: the model cannot (see :func:`why_padded`).
    """
    if reason := why_padded(model):
        raise TrainingError(f"padding has to be computed: {reason}", "train.padding_free=false")
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
    """Lets a forward pass run as the model was loaded if it wants what a packed row cannot give."""

    config: Any
    plain: str
    names: tuple[str, ...]  # of the arguments of forward, in order

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self._wants_padding(given):
            self.config._attn_implementation = self.plain
        elif (
            "use_cache" in self.names and given.get("use_cache") is None and "use_cache" not in self.names[: len(args)]
        ):
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.config._attn_implementation = _NAMES[self.plain]

    def _wants_padding(self, given: dict[str, Any]) -> bool:
        mask = given.get("attention_mask")
        if not torch.is_tensor(mask) or mask.ndim != 2 or not _gains(mask.bool()):
            return True
        wanted = ("output_hidden_states", "output_attentions", "output_router_logits")
        if any(getattr(self.config, name, None) if given.get(name) is None else given[name] for name in wanted):
            return True
        cached = ("past_key_values", "encoder_hidden_states", "use_cache")
        return any(given.get(name) is not None and given.get(name) is not False for name in cached)


def _gains(mask: Tensor) -> bool:
    """Whether a mask [B, T] has padding, or lies on a CPU, where attention in a row is faster than torch's of a batch; and no
    row has padding between its real positions, which a window would count."""
    starts = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return bool(mask.any()) and (mask.is_cpu or not bool(mask.all())) and int(starts.max()) == 1


def _packing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packing | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Packing)), None)


def _before_layer(
    first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Packs what a layer is given; all but the first get hidden states that are packed already."""
    packing = _packing(args, kwargs)
    if packing is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if first:
        hidden = packing.pack(hidden)
    elif hidden.shape[:2] != (1, len(packing.places)):
        raise TrainingError(f"{type(layer).__name__} mixes packed and padded rows", "train.padding_free=false")
    named = {name: hidden if name == "hidden_states" else packing.pack_like(x) for name, x in kwargs.items()}
    return (*[hidden][: len(args)], *(packing.pack_like(x) for x in args[1:])), named


def _after_layers(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Puts what the last layer returns back into a padded batch."""
    packing = _packing(args, kwargs)
    if packing is None:
        return None
    if isinstance(output, tuple):
        return (packing.unpack(output[0]), *output[1:])
    return packing.unpack(output)
