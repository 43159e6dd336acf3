"""The export of an adapter: what its consumer can read is checked first, and then the consumer's files are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakeet.adapter.compatibility import Consumer, exports, is_plain, is_read_by_peft
from lorakeet.adapter.serialization import read_notes, read_tensors
from lorakeet.base.meta_device import read_config
from lorakeet.config import BaseSettings
from lorakeet.errors import AdapterError, MergeError
from lorakeet.export.adapters import peft_tensors, plain_config, write_mlx, write_peft
from lorakeet.export.gguf.files import write_adapter
from lorakeet.export.merged_gguf import merge_to_gguf
from lorakeet.export.models import check_empty, merge
from lorakeet.export.plain import PlainLayer, layers_by_svd, plain_layers
from lorakeet.files import write_folder
from lorakeet.loaded_model import adapter_task, settings_of_base
from lorakeet.log import info
from lorakeet.lora.algebra.singular_values import fold_singular_values
from lorakeet.lora.checks.merge_loss import ACCEPTED_LOSS
from lorakeet.lora.config import PeftConfig

#: Name of the file of an adapter in GGUF.
GGUF_ADAPTER = "adapter.gguf"


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        form: Number format of a merged GGUF model, a key of :data:`lorakeet.export.gguf.files.FORMATS`.
        rank: Rank of the plain LoRA that a variant becomes; None: that of the adapter.
        overwrite: Whether to replace the contents of the output folder.
        accepted: Checks that are switched off: ``allow_other_base``, ``allow_untrained``, ``accept_loss``.
    """

    form: str = "f16"
    rank: int | None = None
    overwrite: bool = False
    accepted: Mapping[str, bool] = field(default_factory=dict)


def export(
    adapter: str, consumer: Consumer, out: str | Path, settings: BaseSettings, options: ExportOptions | None = None
) -> dict[str, Any]:
    """Write an adapter, or the model that it makes of its base, for another tool.

    Args:
        adapter: Folder or hub id.
        consumer: The tool, or ``merged`` or ``merged-gguf`` for a whole model.
        out: Folder to write, whole or not at all.
        settings: Settings of the base. Its ``dtype`` is the number format of ``merged``.
        options: The options.

    Returns:
        ``{"path", "for", "changes", "layers", "rank", "lost"}``. ``changes`` were made for the consumer, ``layers`` is the
        number of layers and ``rank`` their largest. ``lost`` is the largest share of an update that an SVD or rounding took.

    Raises:
        AdapterError: The consumer cannot read such an adapter; nothing is written.
        BaseModelError: The base's architecture or tokenizer has no form in GGUF.
        MergeError: Rounding, or a decomposition, would take more than half of a layer's update.
        OutputError: ``out`` is not empty or not writable.
    """
    options = options or ExportOptions()
    folder = check_empty(out, options.overwrite)
    config = PeftConfig.from_pretrained(adapter)
    settings = settings_of_base(settings, config, adapter)
    if consumer == "merged":
        figures = merge(settings, adapter, out, overwrite=options.overwrite, **options.accepted)
        return {
            "path": figures["path"],
            "for": consumer,
            "changes": [],
            "layers": figures["layers"],
            "lost": figures["lost"],
        }
    tensors = read_tensors(adapter)
    needs_base = consumer in ("gguf", "mlx", "merged-gguf")
    base = read_config(settings.model) if needs_base else None
    changes = _check(adapter, consumer, config, tensors, base)
    for change in changes:
        info(f"for {consumer}: {change}")
    with write_folder(folder) as aside:  # fails before the expensive part if the folder is not writable
        if consumer == "merged-gguf":
            figures = merge_to_gguf(settings, adapter, aside, options.form, **options.accepted)
        else:
            figures = _write(aside, adapter, consumer, settings, options, base)
    return {"path": str(folder), "for": consumer, "changes": changes, **figures}


def _check(adapter: str, consumer: str, config: PeftConfig, tensors: Mapping[str, Tensor], base: Any) -> list[str]:
    """Return what has to be changed for a consumer.

    Raises:
        AdapterError: The consumer cannot read such an adapter.
    """
    task = adapter_task(adapter, config).name
    if consumer in ("gguf", "mlx", "merged-gguf") and task != "CAUSAL_LM":
        raise AdapterError(
            f"adapter {adapter!r} is for {task}, and {consumer} holds language models", "choose --for merged"
        )
    architecture = base.model_type if base is not None else None
    answer = exports(config, tensors, _ranks(tensors), base=architecture)[consumer]
    if not answer["can"]:
        instead = "merged-gguf" if consumer == "gguf" else "merged"
        raise AdapterError(
            f"adapter {adapter!r} cannot be written for {consumer}: {'; '.join(answer['why'])}",
            f"export the merged model: --for {instead}",
        )
    return list(answer["why"])


def _ranks(tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the ranks of an adapter's layers."""
    return [len(tensor) for key, tensor in tensors.items() if key.endswith(("lora_A.weight", "lora_embedding_A"))]


def _write(
    folder: Path, adapter: str, consumer: str, settings: BaseSettings, options: ExportOptions, base: Any
) -> dict[str, Any]:
    """Write the files of an adapter for a consumer; return its figures."""
    notes = read_notes(adapter)
    config, tensors = fold_singular_values(PeftConfig.from_pretrained(adapter), read_tensors(adapter))
    if consumer == "peft" and is_read_by_peft(config):
        write_peft(folder, adapter, config, tensors, notes)
        return {"layers": len(_ranks(tensors)), "rank": max(_ranks(tensors), default=config.r), "lost": 0.0}
    if is_plain(config):
        layers = plain_layers(adapter, config, tensors)
    else:
        allow = options.accepted.get("allow_other_base", False)
        layers = layers_by_svd(settings, adapter, options.rank, allow_other_base=allow)
        _check_loss(layers, options.accepted.get("accept_loss", False))
    rank, lost = max(layer.rank for layer in layers), max(layer.lost for layer in layers)
    same = [layer.padded(rank) for layer in layers]
    if consumer == "gguf":
        write_adapter(folder / GGUF_ADAPTER, layers, base.get_text_config(), Path(adapter).resolve().name)
    elif consumer == "mlx":
        write_mlx(folder, adapter, same, base, config.base_model_name_or_path)
    else:
        variant = config.variant
        replaced = (*variant.tensor_names(""), *variant.shared_names("", config))
        made = peft_tensors(same, tensors, replaced)
        write_peft(
            folder, adapter, plain_config(config, rank), made, {**notes, "exported": {"for": consumer, "lost": lost}}
        )
    return {"layers": len(layers), "rank": rank, "lost": lost}


def _check_loss(layers: Sequence[PlainLayer], accept: bool) -> None:
    """Tell what a decomposition loses.

    Raises:
        MergeError: It is more than half of a layer's update, and that is not accepted.
    """
    worst = max(layers, key=lambda layer: layer.lost)
    message = f"plain LoRA of rank {worst.rank} has {1 - worst.lost:.1%} of the update of {worst.name}, the worst layer"
    if worst.lost > ACCEPTED_LOSS and not accept:
        raise MergeError(
            f"{message}, expected {1 - ACCEPTED_LOSS:.0%} or more", "choose a higher --rank, or --accept-loss"
        )
    info(message)
