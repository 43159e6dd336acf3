"""Preparation of a frozen base for stable training of adapters, as in peft's function of the same name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakeet.errors import BaseModelError

#: Half-precision dtypes, whose norms are computed in fp32.
HALF = (torch.float16, torch.bfloat16)
#: Heads of models without output embeddings: sequence and token classification, question answering.
TASK_HEADS = ("score", "classifier", "qa_outputs")


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> PreTrainedModel:
    """Prepare ``model`` in place for stable training of adapters; a second call changes nothing.

    All parameters are frozen. Norms (layers with only one-dimensional parameters) compute in fp32 and return the dtype of
    their input. The head returns fp32.

    Args:
        model: The base.
        use_gradient_checkpointing: Recompute activations in the backward pass. The embeddings' output then requires a
            gradient, so that gradients reach the adapters through checkpointed frozen layers.
        gradient_checkpointing_kwargs: Arguments of torch's checkpoint; ``use_reentrant=False`` by default.
        auto_clear_cache: Release GPU memory that is no longer used.

    Returns:
        The same model.

    Raises:
        BaseModelError: The architecture has no gradient checkpointing.
    """
    model.requires_grad_(False)
    for module in model.modules():
        _norm_in_fp32(module)
    for head in _heads(model):
        if _output_in_fp32 not in head._forward_hooks.values():
            head.register_forward_hook(_output_in_fp32)
    if use_gradient_checkpointing:
        _checkpoint(model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _norm_in_fp32(module: nn.Module) -> None:
    """Convert a half-precision norm to fp32. A layer that also has a matrix is left alone: its parameters must agree."""
    parameters = list(module.parameters(recurse=False))
    half = [parameter for parameter in parameters if parameter.dtype in HALF]
    if not half or any(parameter.dim() != 1 for parameter in parameters) or next(module.children(), None) is not None:
        return
    for parameter in half:
        parameter.data = parameter.data.float()
    module.register_forward_pre_hook(_input_to_fp32, with_kwargs=True)
    module.register_forward_hook(_output_as_input)


# The hooks are plain functions with their state on the module, so the model can still be copied and pickled.


def _input_to_fp32(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    norm.input_dtype = next(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return tuple(map(_fp32, args)), {name: _fp32(value) for name, value in kwargs.items()}


def _fp32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def _output_as_input(norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(norm.input_dtype)


def _output_in_fp32(head: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    head = model.get_output_embeddings()
    if head is not None:
        return [head]
    return [getattr(model, name) for name in TASK_HEADS if isinstance(getattr(model, name, None), nn.Module)]


def _checkpoint(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    if not model.supports_gradient_checkpointing:
        raise BaseModelError(
            f"{type(model).__name__} has no gradient checkpointing", "pass use_gradient_checkpointing=False"
        )
    model.disable_input_require_grads()  # a second call must not hook the embeddings twice
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if not getattr(model, "_require_grads_hooks", None):
        model.enable_input_require_grads()
