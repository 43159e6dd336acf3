"""Fingerprint of a run: settings, data, base, trainable parameters and processes, which decide the bits of its result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from lorakeet._version import __version__
from lorakeet.adapter.fingerprint import base_name
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import TrainingError
from lorakeet.kernels.cpu.build import library_version
from lorakeet.log import warn
from lorakeet.quant.protocol import QuantizedLayer, dense_weight, quantized_layers
from lorakeet.rng import same_random_state
from lorakeet.train.checkpoints.manifest import read_manifest

#: TrainingArguments that the result depends on. Logging, saving and evaluating may change freely.
SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "torch_compile",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "length_column_name",
    "dataloader_drop_last",
    "average_tokens_across_devices",
)

#: Rows of a data set that are read for its hash; a larger data set is sampled evenly.
HASHED_ROWS = 50_000
#: Samples at the beginning of a stream that are read for its hash.
HASHED_OF_STREAM = 32


def data_hash(dataset: Any) -> str:
    """Return a hash of the samples and their order; of a stream, of the first ones; of other types, of type and length."""
    digest = hashlib.sha256(type(dataset).__name__.encode())
    rows = len(dataset) if hasattr(dataset, "__len__") else -1
    digest.update(str(rows).encode())
    if isinstance(dataset, datasets.Dataset):
        if rows > HASHED_ROWS:
            dataset = dataset.select([i * rows // HASHED_ROWS for i in range(HASHED_ROWS)])
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            digest.update(json.dumps(table.to_pydict(), default=str).encode())
    elif isinstance(dataset, datasets.IterableDataset):
        with same_random_state():
            for row in islice(dataset, HASHED_OF_STREAM):
                digest.update(repr(sorted(row.items())).encode())
    elif isinstance(dataset, (list, tuple)):
        for row in dataset:
            digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def trainable_hash(model: nn.Module) -> str:
    """Return a hash of names and shapes of all trainable parameters, and of the adapter's settings if there is one."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    adapters = (
        {name: model.peft_config[name].to_dict() for name in model.active_adapters}
        if isinstance(model, PeftModel)
        else {}
    )
    return hashlib.sha256(json.dumps([sorted(shapes), adapters], sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def base_hash(model: nn.Module) -> str:
    """Return a hash of the frozen parameters: names, number formats, shapes, and the sum of all their bits.

    Unlike :func:`lorakeet.adapter.fingerprint.fingerprint` it tolerates no rounding: the base in another format trains
    to other bits. Only names and shapes count of a sharded parameter, since each process has other values of it.
    """
    digest = hashlib.sha256()
    exact = {id(layer.weight): layer for _, layer in quantized_layers(model) if layer.exact}
    for name, own in model.named_parameters():
        if not own.requires_grad:
            parameter = _as_computed(own, exact.get(id(own)))
            digest.update(f"{base_name(name)} {parameter.dtype} {tuple(parameter.shape)}".encode())
            if type(parameter) is nn.Parameter and not isinstance(parameter.data, DTensor) and not parameter.is_meta:
                digest.update(f" {bit_sum(parameter)}".encode())
    return digest.hexdigest()[:16]


def _as_computed(parameter: nn.Parameter, layer: QuantizedLayer | None) -> nn.Parameter:
    """Return a weight that only saves memory in the numbers that its layer computes with; any other parameter as it is."""
    if layer is None or parameter.is_meta or isinstance(parameter.data, DTensor):
        return parameter
    return nn.Parameter(dense_weight(layer), requires_grad=False)


def bit_sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits as whole numbers of 8 bytes, which reads memory at its full speed."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(data) // 8 * 8
    words = data[:whole] if data.storage_offset() % 8 == 0 else data[:whole].clone()
    return int(words.view(torch.int64).sum()) + int(data[whole:].sum())


def run_fingerprint(args: TrainingArguments, model: nn.Module, dataset: Any) -> dict[str, Any]:
    """Return what must be equal for a run to resume exactly."""
    settings = {name: str(getattr(args, name)) for name in SETTINGS if hasattr(args, name)}
    return {
        **settings,
        "processes": str(args.world_size),
        "data": data_hash(dataset),
        "base": base_hash(model),
        "trainable parameters": trainable_hash(model),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, Lorakeet, torch, transformers and the compiled loops."""
    return {
        "python": platform.python_version(),
        "lorakeet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "C loops": library_version(),
    }


def refuse_other_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Compare the run that wrote ``folder`` with the run that resumes; other versions of programs only warn.

    Raises:
        TrainingError: The runs differ; the message names every difference.
    """
    manifest = read_manifest(folder)
    if other := _differences(manifest["versions"], versions()):
        warn(f"the resumed run may not equal an uninterrupted one: {'; '.join(other)}")
    if differences := _differences(manifest["fingerprint"], now):
        raise TrainingError(
            f"checkpoint {folder} comes from another run: {'; '.join(differences)}",
            "resume with the run's own settings and data, or go on all the same: --resume-anyway, in Python "
            "Trainer(..., any_checkpoint=True)",
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {then.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
