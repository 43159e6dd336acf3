"""A frozen base whose layers are sharded over processes (FSDP2), with adapters that are whole in each of them.

Each process holds its part of every layer's frozen weights, quantized ones as they are: weight and scales are
plain parameters, both cut along dimension 0. A layer is gathered when it runs, forward or backward, and freed after
it. Adapters, their gradients and their optimizer state are small, so each process has all of them, and DDP averages the
gradients. A checkpoint or an adapter is thus written whole by one process, as without sharding.

Whole too stay the embedding, the head and the norms. A step needs the first two from its beginning to its end, so
sharding them would not lower the peak.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakeet.errors import TrainingError
from lorakeet.log import info
from lorakeet.patches.gradient_checkpointing import checkpointable_layers
from lorakeet.quant.protocol import quantized_layers
from lorakeet.train.processes.agreement import check_same_weights


def check_can_shard(model: nn.Module, processes: int, size: int | None = None) -> None:
    """Check that a base can be sharded over this many processes.

    Args:
        model: A model with adapters.
        processes: Number of processes.
        size: Processes that share a copy of the base; None: all.

    Raises:
        TrainingError: There is one process, or copies of unequal size, or no layers that transformers marks as such.
    """
    if processes == 1:
        raise TrainingError(
            "train.fsdp shards the base over processes, and there is only one",
            "start several: torchrun --nproc-per-node 2 -m lorakeet train ..., or leave --fsdp out",
        )
    if size is not None and (size < 2 or processes % size):
        raise TrainingError(
            f"train.fsdp_size={size} does not divide {processes} processes into equal groups of two or more",
            "give the number of processes of a node, or leave it out",
        )
    if not sharded_parameters(model):
        raise TrainingError(
            f"{type(model).__name__} has no frozen layers that can be sharded, expected a stack of layers of transformers",
            "leave --fsdp out",
        )


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to shard, by name: frozen matrices in layers, and all that belongs to quantized ones."""
    quantized = {id(p) for _, layer in quantized_layers(model) for p in layer.quantized_weight().tensors().values()}
    inside = {id(p) for layer in checkpointable_layers(model) for p in layer.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in inside
        and not parameter.requires_grad
        and (parameter.ndim > 1 or id(parameter) in quantized)
    }


def shard_base(model: nn.Module, device: torch.device, processes: int, size: int | None = None) -> None:
    """Shard the frozen layers of ``model`` over all processes or each group of ``size``, in place.

    Patches of the model's layers must be applied before: they are verified with whole weights.

    Args:
        model: A model with adapters, the same in all processes.
        device: Device of the training; layers are moved to it one at a time.
        processes: Number of processes.
        size: Processes that share a copy of the base; None: all.

    Raises:
        TrainingError: See :func:`check_can_shard`; weights differ between processes, or stay whole in them.
    """
    check_can_shard(model, processes, size)
    size = size or processes
    check_same_weights(model)  # afterwards each process has other ones
    warnings.filterwarnings("ignore", message=r".*returned a view tensor")  # no layer changes its input in place
    mesh = init_device_mesh(device.type, (processes // size, size), mesh_dim_names=("copies", "shards"))["shards"]
    chosen = set(sharded_parameters(model).values())
    whole = sum(p.nbytes for p in chosen)
    others = set(model.parameters()) - chosen
    for layer in checkpointable_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    for owner in _owners(model):  # so that layers share one queue of gathers, each ahead of the layer that runs
        fully_shard(owner, mesh=mesh, ignored_params=others)
    _check_shards(model, whole, size)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard_base` has sharded layers of ``model``."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def data_parallel(model: nn.Module, device: torch.device, **settings: Any) -> DistributedDataParallel:
    """Wrap a model with a sharded base in DDP, which sees what is trained alone.

    Args:
        model: The model after :func:`shard_base`.
        device: Device of the training.
        settings: Further arguments of DDP.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    devices = None if device.type == "cpu" else [device.index or 0]
    return DistributedDataParallel(model, device_ids=devices, **settings)


def _owners(model: nn.Module) -> list[nn.Module]:
    """Return the innermost models of transformers that own sharded layers."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: list[nn.Module] = []
    for layer in checkpointable_layers(model):
        inside = [owner for owner in models if any(module is layer for module in owner.modules())]
        if inside and inside[-1] is not model and inside[-1] not in found:
            found.append(inside[-1])
    return found


def _check_shards(model: nn.Module, whole: int, processes: int) -> None:
    """Check that this process holds only its part, and log the bytes.

    Raises:
        TrainingError: It holds much more: FSDP has not sharded the base.
    """
    shards = [p for p in model.parameters() if isinstance(p, DTensor)]
    here = sum(shard.to_local().nbytes for shard in shards)
    most_rows = sum(shard.to_local().nbytes // max(shard.to_local().shape[0], 1) for shard in shards)
    if not shards or here > whole / processes + most_rows:  # rows that do not divide evenly
        raise TrainingError(
            f"FSDP left {here:,} of {whole:,} bytes of the layers in one of {processes} processes",
            "leave --fsdp out, or use a release of torch with FSDP2",
        )
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    info(f"sharding   {layers} layers over {processes} processes: {here / 1e6:,.1f} of {whole / 1e6:,.1f} MB in each")
