"""Checks of a training, before and on its first step, for errors that would otherwise be silent.

Before the first step: number formats that cannot train, FSDP that is not applied, an adapter that cannot be saved. On
the first step: parameters without a gradient, and processes whose gradients differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from lorakeet.adapter.adapter_folders import adapter_folders
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.adapter.tensor_loading import check_tensors
from lorakeet.adapter.unfrozen import unfrozen_names
from lorakeet.errors import TrainingError
from lorakeet.log import info, warn
from lorakeet.lora.interop.wrappers import compiled_in_place
from lorakeet.lora.variants.adalora import AdaLora
from lorakeet.quant.protocol import computing_dtypes

#: Names that a message shows of a longer list.
SHOWN = 8


def prepare(model: nn.Module | None, args: TrainingArguments) -> nn.Module | None:
    """Check a model and set the arguments before a Trainer is made; returns the model inside ``torch.compile``.

    Raises:
        TrainingError: Its number formats cannot train.
    """
    use_one_gpu(args)
    read_in_each_process(args)
    if model is None:
        return None
    model = compiled_in_place(model)
    check_precision(model, args)
    expect_all_gradients(model, args)
    return model


def check_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse number formats that cannot train.

    Raises:
        TrainingError: fp16 on a device without loss scaling (a CPU), or trainable parameters in fp16.
    """
    formats = computing_dtypes(model)
    if args.device.type == "cpu" and (args.fp16 or torch.float16 in formats):
        raise TrainingError(
            "fp16 cannot train on a CPU: gradients vanish without loss scaling, which only GPUs have",
            "use dtype fp32, or bf16 where the CPU computes it fast",
        )
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise TrainingError(
            f"{len(half)} trainable parameters are in fp16, which loses small updates: {_some(half)}",
            "keep trainable parameters in fp32 (the base may stay in fp16)",
        )


def check_gradients(model: nn.Module) -> None:
    """Check on the first step that every trainable parameter has a gradient (zeros count: B starts at zero).

    A model that trains whole gets a warning only: an expert to which no token was routed has no gradient.

    Raises:
        TrainingError: Parameters of an adapter have none; the message names them.
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not without:
        return
    message = f"{len(without)} trainable parameters got no gradient on the first step: {_some(without)}"
    if not isinstance(model, PeftModel):
        warn(message)
        return
    raise TrainingError(
        message,
        "the loss does not depend on them: leave them out (exclude_modules, requires_grad_(False)), "
        "or give inputs that use them",
    )


def nonfinite_parameters(model: nn.Module) -> str | None:
    """Return a clause that names the trainable parameters with NaN or infinity; None if there are none."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    return f"{len(names)} trainable parameters are not finite themselves: {_some(names)}" if names else None


def check_synchronized(model: nn.Module, accelerator: Accelerator) -> None:
    """Check that the gradients are equal in all processes after the backward pass.

    Raises:
        TrainingError: They differ, so each process would train its own model.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if accelerator.num_processes == 1 or any(hasattr(grad, "full_tensor") for grad in grads):  # sharded: no copies
        return
    mine = torch.stack([grad.float().abs().sum() for grad in grads]).to(accelerator.device)
    every = accelerator.gather(mine[None])  # [processes, parameters]
    if not torch.allclose(every, every[:1].expand_as(every), rtol=1e-4, atol=1e-12, equal_nan=True):
        raise TrainingError(
            "gradients differ between processes, so they are not synchronized",
            "call the model that the Trainer wrapped, not the model inside the wrapper",
        )


def check_sharded(model: nn.Module, args: TrainingArguments) -> None:
    """Check that FSDP is applied if it is configured: on some devices it silently becomes plain data parallelism.

    Raises:
        TrainingError: FSDP is configured and the prepared model is not sharded.
    """
    configured = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if configured and not any(
        "FSDP" in kind.__name__ or "FullySharded" in kind.__name__ for kind in type(model).__mro__
    ):
        raise TrainingError(
            f"FSDP is configured, but the model is wrapped as {type(model).__name__} on {args.device.type}",
            "leave FSDP out, or run on devices that support it",
        )


def check_saved_adapters(model: PeftModel, folder: str | Path) -> None:
    """Compare saved adapters with what a resumed run would expect in their files.

    Raises:
        AdapterError: A file would not fit this model.
    """
    for adapter, path in adapter_folders(folder, model.peft_config).items():
        check_tensors(model, adapter, path)


def announce_unfrozen(model: nn.Module) -> None:
    """Warn of parameters of the base that train beside the adapters: they change the base of every adapter."""
    if isinstance(model, PeftModel) and (names := unfrozen_names(model)):
        warn(
            f"{len(names)} tensors of the base are trained and saved with the adapter: {_some(names)}; "
            "other tools may ignore them, and modules_to_save keeps a copy for each adapter instead"
        )


def expect_all_gradients(model: nn.Module, args: TrainingArguments) -> None:
    """Tell DDP not to search for parameters without a gradient, of which it would warn on every rank.

    An adapter has none (:func:`check_gradients`). But in some steps experts see no token, or a vision tower no image.
    """
    config = getattr(model, "config", None)
    towers = any(hasattr(config, name) for name in ("vision_config", "audio_config"))
    if args.ddp_find_unused_parameters is None and isinstance(model, PeftModel) and not towers:
        has_experts = any("expert" in name for name, _ in model.named_modules())
        args.ddp_find_unused_parameters = has_experts


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of a checkpoint: trainable parameters, two moments of each in fp32, and 10 % for the rest.

    AdaLoRA has two averages more.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    layers = model.lora_layers() if isinstance(model, PeftModel) else []
    adaptive = any(isinstance(variant, AdaLora) for layer in layers for variant in layer.variants.values())
    state = 16 if adaptive else 8
    return int(1.1 * sum(p.numel() * (p.element_size() + state) for p in trainable))


def divides_by_count(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the model's own loss divides by ``num_items_in_batch``.

    Many forwards accept any keyword and ignore this one (BERT's heads do). Their loss is a mean over the micro-batch,
    and accumulating it would weight tokens wrongly. So the loss is computed for one count and for twice the count.
    """
    batch = _first_tokens(batch)
    device = next(value.device for value in batch.values() if torch.is_tensor(value))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            one, two = (_loss(model(**batch, num_items_in_batch=torch.tensor(n, device=device))) for n in (8, 16))
    finally:
        model.train(was_training)
    return bool(two < 0.75 * one)


def _first_tokens(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first tokens of the first sample, all of them targets; the whole batch if it is not plainly padded."""
    ids = batch.get("input_ids")
    plain = set(batch) in ({"input_ids", "labels"}, {"input_ids", "attention_mask", "labels"})
    if not plain or not torch.is_tensor(ids) or ids.dim() != 2:
        return batch
    prefix = {name: v[:1, :16] if v.shape == ids.shape else v[:1] for name, v in batch.items()}
    return {**prefix, "labels": prefix["labels"].clamp(min=0)} if batch["labels"].shape == ids.shape else prefix


def _loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    return loss


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def use_one_gpu(args: TrainingArguments) -> None:
    """Use one GPU of several unless started as several processes: copies in one process are slow, and no message says so."""
    if args.n_gpu > 1:
        info(f"{args.n_gpu} GPUs are visible, one is used; start with torchrun or accelerate to use all")
        args._n_gpu = 1


def read_in_each_process(args: TrainingArguments) -> None:
    """Let each process read a stream itself, unless the arguments say otherwise.

    By default the first process reads for all and joins their batches, which fails where these have different lengths.
    """
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
