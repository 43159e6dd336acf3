"""Choice and check of the device and the number format of a base."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorakeet.base.checkpoint_files import weight_files
from lorakeet.config import FLOATING_BITS, QUANTIZED_FORMATS, BaseSettings
from lorakeet.errors import BaseModelError
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.log import warn
from lorakeet.quant.half_loading import has_halves
from lorakeet.quant.protocol import quantized_layers

#: Name in the settings -> torch dtype, and the reverse.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA (under torchrun that of ``LOCAL_RANK``), else MPS, else the CPU.

    Raises:
        BaseModelError: This machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BaseModelError(
            f"unknown device {name!r}, expected auto, cpu, cuda, cuda:0, cuda:1 ... or mps", "use --device auto"
        ) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        found = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise BaseModelError(f"device {name!r} is not available, torch finds {found} here", "use --device auto")
    return device


def choose_dtype(settings: BaseSettings, device: torch.device, for_training: bool = False) -> torch.dtype:
    """Return the floating-point format of the base, from ``dtype``, ``bits`` and the speed of the device.

    ``auto`` is fp32 on every CPU: the compiled loops are fp32, and a step in bf16 is slower without them, with AMX too
    (docs/lab.md). Weights may be stored in 16 bits all the same (:func:`keeps_halves`). Elsewhere it is bf16 on GPUs that
    have it, else fp16 on CUDA and fp32 on MPS.

    Args:
        settings: Settings of the base.
        device: Device of the base.
        for_training: Refuse a format that cannot be trained in.

    Raises:
        BaseModelError: ``bits`` and ``dtype`` contradict each other, or the format is fp16 for training on a CPU.
    """
    fast_bf16 = has_bf16(device)
    half = torch.float16 if device.type == "cuda" and not fast_bf16 else torch.bfloat16
    natural = half if device.type == "cuda" else torch.float32
    by_bits: dict[int | None, torch.dtype] = {None: natural, 16: half, 32: torch.float32}
    by_bits.update(dict.fromkeys(QUANTIZED_FORMATS, natural))
    dtype = DTYPES.get(settings.dtype, by_bits[settings.bits])
    if settings.bits in FLOATING_BITS and dtype.itemsize * 8 != settings.bits:
        raise BaseModelError(
            f"bits={settings.bits} contradicts dtype={settings.dtype}", "give only one of the two, or matching ones"
        )
    if device.type == "cpu" and dtype == torch.float16 and for_training:
        raise BaseModelError(
            "fp16 cannot train on a CPU: its range is too small without loss scaling, which needs a GPU",
            "use --dtype bf16 or fp32",
        )
    if device.type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not fast_bf16)):
        warn(
            f"{dtype_name(dtype)} is much slower than fp32 on this CPU, which has no instructions for it "
            "(fp32 takes twice the memory)"
        )
    return dtype


def keeps_halves(settings: BaseSettings, device: torch.device, folder: Path) -> bool:
    """Whether weights that files have in 16 bits stay so, while the base computes in fp32.

    Nothing is lost, and nothing is slower, where compiled loops widen a weight as they read it: on a CPU with AVX2.

    Args:
        settings: Settings of the base; naming a format or its bits asks for that one.
        device: Device of the base.
        folder: Folder of its files.
    """
    free = settings.dtype == "auto" and settings.bits is None and device.type == "cpu"
    return free and has_halves(weight_files(folder)) and features.has(Feature.AVX2)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (on a CPU: AVX512_BF16, which all processors with AMX have)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and features.has_bf16()


def check_dtypes(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Check that every floating-point weight has ``dtype``, except those that the architecture keeps in fp32.

    Raises:
        BaseModelError: Weights have another number format; the message names some.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    stored = {id(t) for _, layer in quantized_layers(model) for t in layer.quantized_weight().tensors().values()}
    wrong = [
        f"{key} is {dtype_name(weight.dtype)}"
        for key, weight in model.named_parameters()
        if weight.is_floating_point()
        and weight.dtype != dtype
        and id(weight) not in stored
        and not (weight.dtype == torch.float32 and any(part in key for part in kept))
    ]
    if wrong:
        raise BaseModelError(
            f"{name} was not loaded in {dtype_name(dtype)}: {some(wrong)}",
            "try another --dtype, or update transformers",
        )


def bytes_by_dtype(model: torch.nn.Module) -> dict[torch.dtype, int]:
    """Count the bytes of parameters and buffers by number format, the largest first; tied weights count once."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.dtype] += tensor.numel() * tensor.element_size()
    return dict(sizes.most_common())


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name in the settings, such as ``bf16``, or else the name in torch."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def some(items: list[str], most: int = 5) -> str:
    """Join the first few items, and count the others."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
