"""Modules that read the weight of a child themselves, so that LoRA on the child does not act.

A LoRA layer acts when it is called. A parent that computes with ``self.child.weight`` passes it by, in some calls or in all:
the adapter learns nothing, or what it learned is missing in evaluation, without an error. :data:`READS` lists the known
ones. :func:`watched_calls` finds others: it warns of a layer that its parent did not call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lorakeet.log import warn
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.target_parameters import LoraOutProjection, LoraParameter
from lorakeet.lora.trainable_tokens import TiedLayer

_SCAN = ("out_proj", "conv1d")  # outer products of a state space model in one kernel; steps of a cached convolution

#: Class of a parent -> children whose weight it reads in some call (torch 2.13, transformers 5.18). By name, since importing
#: the classes of transformers takes long; ``test_every_direct_read_of_transformers_is_known`` fails if one is missing.
READS: Mapping[str, tuple[str, ...]] = {
    "MultiheadAttention": ("out_proj",),
    "LinearCrossEntropyLoss": ("linear",),
    "MambaMixer": ("x_proj", "dt_proj", *_SCAN),
    "FalconMambaMixer": ("x_proj", "dt_proj", *_SCAN),
    "JambaMambaMixer": ("dt_proj", "conv1d"),
    "ZambaMambaMixer": ("conv1d",),
    **dict.fromkeys(
        ["Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"], _SCAN
    ),
    "Zamba2MambaMixer": _SCAN,
    **dict.fromkeys(
        ["Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "Qwen4ExpTextGatedDeltaNet"],
        ("conv1d",),
    ),
    **dict.fromkeys(
        ["OlmoHybridGatedDeltaNet", "Glm5NextTextLinearAttention", "KimiLinearDeltaAttention"], ("conv1d",)
    ),
    "InklingShortConvolution": ("conv1d",),
    **dict.fromkeys(["Lfm2ShortConv", "Lfm2MoeShortConv"], ("conv",)),
    "RecurrentGemmaRecurrentBlock": ("conv_1d",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "TDNNLayer": ("kernel",),
    **dict.fromkeys(
        ["DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"], ("k_proj",)
    ),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    **dict.fromkeys(["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"], ("lm_head",)),
    "LSHSelfAttention": ("query_key", "value"),
}

#: Modules without a forward of their own: the module around them calls their children.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_UNCALLED = (LoraParameter, LoraOutProjection)


def direct_read(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why LoRA on the layer ``name`` would be passed by; None if its parent calls it, as far as is known.

    Args:
        modules: The modules of the model, by name.
        name: Full name of the layer.
    """
    path, _, leaf = name.rpartition(".")
    for parent in type(modules[path]).__mro__ if path in modules else ():
        if leaf in READS.get(parent.__name__, ()):
            return f"belongs to {parent.__name__}, which reads its weight directly and would bypass LoRA"
    return None


def left_out_text(names: Iterable[str], reasons: Mapping[str, str]) -> str:
    """Return one clause that names layers by the reason for which they are left out."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        by_reason.setdefault(reasons[name], []).append(name)
    return "; ".join(f"{', '.join(found[:5])} ({reason})" for reason, found in by_reason.items())


# -- the fast path of torch's encoder -----------------------------------------------------------------------------------


def leave_fast_path(model: nn.Module, name: str, layer: nn.Module | None = None) -> None:
    """Make the parent of a layer call it, if that is an encoder layer of torch.

    In evaluation ``nn.TransformerEncoderLayer`` computes with the weights of its children in one function, unless one of them
    has a hook. ``nn.TransformerEncoder`` hands it nested tensors, which only that function takes.

    Args:
        model: The model.
        name: The layer's name in it.
        layer: The layer that was put there; None if it has hooks already.
    """
    above = [model.get_submodule(path) for path in _ancestors(name)]
    if not above or not isinstance(above[-1], nn.TransformerEncoderLayer):
        return
    if layer is not None:
        layer.register_forward_pre_hook(_called)
    for encoder in above:
        if isinstance(encoder, nn.TransformerEncoder) and "_nested_tensors" not in encoder.__dict__:
            encoder.__dict__["_nested_tensors"] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False


def return_to_fast_path(model: nn.Module) -> None:
    """Undo :func:`leave_fast_path` in a model without adapters."""
    for module in model.modules():
        if (before := module.__dict__.pop("_nested_tensors", None)) is not None:
            module.use_nested_tensor = before


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules around ``name``, the model itself first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _called(module: nn.Module, args: Any) -> None:
    """Return nothing: the hook alone makes the parent call its children."""


# -- layers that are never called ---------------------------------------------------------------------------------------


def was_watched(model: Any) -> bool:
    """Whether :func:`watched_calls` has seen a call in this mode (training, evaluation) with these layers; or need not."""
    return torch.compiler.is_compiling() or _mode(model) in model.__dict__.get("_watched", ())


def _mode(model: Any) -> tuple[bool, int]:
    return model.training, len(model.lora_parts())


@contextmanager
def watched_calls(model: Any) -> Iterator[None]:
    """Warn after the block, a call of the model, of adapted layers that their parent did not call.

    A layer inside a module that did not run itself, such as an expert that got no token, is no finding.

    Args:
        model: A :class:`~lorakeet.lora.model.LoraModel`.
    """
    called: set[int] = set()

    def note(module: nn.Module, _: Any) -> None:
        called.add(id(module))

    note.__dict__["counts_calls"] = (
        True  # and reads no input: a layer that computes its modules as one may call it for each
    )
    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()
    model.__dict__.setdefault("_watched", set()).add(_mode(model))
    if names := _passed_by(model, called):
        when = "training" if model.training else "evaluation"
        warn(
            f"{len(names)} adapted layers are not called in {when}, so the adapter does not act there: "
            f"{', '.join(names[:5])}; does the module around them read their weight itself? "
            "leave them out with exclude_modules"
        )


def _passed_by(model: nn.Module, called: Iterable[int]) -> list[str]:
    modules, seen = dict(model.named_modules()), set(called)
    shared = {id(module.source) for module in modules.values() if isinstance(module, TiedLayer)}
    found = []
    for name, module in modules.items():
        # a bare parameter and an attention's output projection have no call of their own; a shared weight is called
        # through other layers
        expected = isinstance(module, (LoraLayer, SavedModule)) and not isinstance(module, _UNCALLED)
        if not expected or id(module) in seen or id(module) in shared:
            continue
        around = [modules[path] for path in _ancestors(name)]
        owner = next((parent for parent in reversed(around) if not isinstance(parent, _CONTAINERS)), None)
        if id(owner) in seen:
            found.append(name)
    return found
