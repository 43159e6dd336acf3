"""Models made from a base and saved as plain ones: merged with an adapter, or quantized.

They are stored in the number formats of the base's own files, unless the settings name one. What this machine computes in has
no part in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorakeet.adapter.fingerprint import base_name
from lorakeet.base.architectures import own_class
from lorakeet.base.device_dtype import DTYPE_NAMES, choose_device, choose_dtype
from lorakeet.base.load import inspect_model, load_base
from lorakeet.base.source import find_source, local_folder
from lorakeet.base.storage import (
    StoredFormats,
    bytes_to_store,
    check_generation_config,
    chosen_formats,
    save_model,
    store_in,
    stored_formats,
    widest_format,
)
from lorakeet.config import FLOATING_BITS, QUANTIZED_FORMATS, BaseSettings
from lorakeet.errors import BaseModelError, ConfigError, OutputError
from lorakeet.facts.vocabulary import vocabulary_size
from lorakeet.files import check_room, write_folder, write_json
from lorakeet.loaded_model import open_model, settings_of_base
from lorakeet.log import info
from lorakeet.lora.config import PeftConfig
from lorakeet.quant.hf_quantizer import CONFIGS, Nf4Config
from lorakeet.quant.protocol import quantized_bytes
from lorakeet.security.paths import is_dir, is_file


def merge(
    settings: BaseSettings,
    adapter: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_other_base: bool = False,
    allow_untrained: bool = False,
    accept_loss: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base in fp32, measure what is lost, and save a plain model that any tool loads.

    Args:
        settings: Settings of the base. Its ``dtype`` is the number format to store; ``auto``: that of the base's own files.
        adapter: Folder or hub id.
        out: Folder to write, atomically.
        overwrite: Replace the contents of ``out``.
        allow_other_base: Accept an adapter that was trained on another base.
        allow_untrained: Accept an adapter that changes nothing.
        accept_loss: Accept that the stored number format loses more than half of a layer's update.

    Returns:
        ``{"path", "dtype", "layers", "error", "effect", "scale", "lost"}``, see :class:`lorakeet.lora.merge.MergeReport`.

    Raises:
        MergeError: The stored format would lose the update, the outputs differ, or a layer cannot be merged.
        OutputError: ``out`` is not empty or not writable, or its disk has too little room.
    """
    folder = check_empty(out, overwrite)
    settings = settings_of_base(settings, PeftConfig.from_pretrained(adapter), adapter)
    with write_folder(folder) as aside:  # fails before the expensive part if the folder is not writable
        source, asked, loaded = formats_of(settings)
        check_room(folder, bytes_to_store(source, asked))
        opened = open_model(loaded, [adapter], allow_other_base=allow_other_base, allow_untrained=allow_untrained)
        formats = _stored(opened.model, source, asked)
        names = {id(parameter): base_name(name) for name, parameter in opened.model.named_parameters()}
        report = opened.model.merge_adapter(
            accept_loss=accept_loss, store=lambda parameter: formats.of(names[id(parameter)])
        )
        merged = opened.model.merge_and_unload()
        store_in(merged, formats)
        save_model(merged, opened.base.tokenizer, aside, source)
        figures = {"dtype": formats.describe(), "layers": report.layers, "error": report.error, "effect": report.effect}
        figures |= {"scale": report.scale, "lost": report.lost}
        write_json(aside / "lorakeet.json", {"merged": {"base": opened.base.name, "adapter": str(adapter), **figures}})
    return {"path": str(folder), **figures}


def quantize(
    settings: BaseSettings, out: str | Path, *, bits: int = 8, layout: str = "lorakeet", overwrite: bool = False
) -> dict[str, Any]:
    """Quantize a base and save it. The folder loads in seconds; its weights are read from disk on demand.

    Args:
        settings: Settings of the base. Its ``dtype`` is the number format of what stays unquantized; ``auto``: that of the
            base's own files.
        out: Folder to write, atomically.
        bits: Bits of a weight, 8 or 4.
        layout: Names of the tensors in the files: ``lorakeet``, or ``bitsandbytes`` with 4 bits.
        overwrite: Replace the contents of ``out``.

    Returns:
        ``{"path", "base", "layers", "bytes", "full_bytes"}``: quantized layers, bytes of all weights after and before.

    Raises:
        BaseModelError: The base is quantized already, incomplete, or has weights that are not finite.
        ConfigError: There is no such format or layout.
        OutputError: ``out`` is not empty or not writable, or its disk has too little room.
    """
    quantization = _quantization(bits, layout)
    folder = check_empty(out, overwrite)
    config = inspect_model(settings).config
    if method := getattr(config, "quantization_config", None):
        name = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise BaseModelError(f"{settings.model} is quantized already ({name})", "give the full-precision model")
    with write_folder(folder) as aside:  # fails before the expensive part if the folder is not writable
        source, asked, loaded = formats_of(settings)
        check_room(folder, bytes_to_store(source, asked, bits, vocabulary_size(config)))
        loaded = loaded.model_copy(update={"bits": bits})
        base = load_base(loaded, auto_class=own_class(config), model_options={"quantization_config": quantization})
        if base.fresh:
            raise BaseModelError(
                f"weights are missing and would be random: {', '.join(base.fresh[:5])}", "download its files again"
            )
        formats = _stored(base.model, source, asked)
        store_in(base.model, formats)
        info(base.describe())
        save_model(base.model, base.tokenizer, aside, source)
        sizes = quantized_bytes(base.model, formats.common)
        write_json(aside / "lorakeet.json", {"quantised": {"base": base.name, **sizes}})
    return {"path": str(folder), "base": base.name, **sizes}


def _quantization(bits: int, layout: str) -> Any:
    """Return the ``quantization_config`` of a format in a layout.

    Raises:
        ConfigError: There is no such format, or the layout is not its own.
    """
    if bits not in QUANTIZED_FORMATS:
        raise ConfigError(f"--bits {bits}: expected {' or '.join(map(str, sorted(QUANTIZED_FORMATS)))}", "use --bits 8")
    if layout == "lorakeet":
        return CONFIGS[QUANTIZED_FORMATS[bits]]()
    if layout != "bitsandbytes" or bits != 4:
        raise ConfigError(
            f"--layout {layout!r} with --bits {bits}: expected lorakeet, or bitsandbytes with 4 bits",
            "leave --layout out, or add --bits 4",
        )
    return Nf4Config(layout=layout)


def formats_of(settings: BaseSettings) -> tuple[Path, str | None, BaseSettings]:
    """Return the folder of a base, the number format that is asked for, and the settings to load the base with.

    On a CPU the base is loaded in fp32, which every processor computes in alike; on a GPU in the widest format of its files.
    """
    device = choose_device(settings.device)
    halves = settings.dtype == "auto" and settings.bits in FLOATING_BITS
    asked = DTYPE_NAMES[choose_dtype(settings, device)] if halves else settings.dtype
    source = local_folder(find_source(settings.model, settings.revision), settings.trust_remote_code)
    check_generation_config(source)
    widest = torch.float32 if device.type == "cpu" else widest_format(source)
    bits = None if settings.bits in FLOATING_BITS else settings.bits
    loaded = settings.model_copy(update={"dtype": DTYPE_NAMES[widest], "bits": bits})
    return source, None if asked == "auto" else asked, loaded


def _stored(model: Any, source: Path, asked: str | None) -> StoredFormats:
    """Return the number formats to store a model in, and tell them."""
    own = stored_formats(source, model)
    formats = own if asked is None else chosen_formats(asked, model)
    if asked is None:
        info(f"computed in fp32, stored in {own.describe()}, the number format of the base (--dtype chooses another)")
    else:
        info(f"computed in fp32, stored in {asked}, as --dtype says (the base has {own.describe()})")
    return formats


def check_empty(out: str | Path, overwrite: bool) -> Path:
    """Check that an output folder is missing or empty, unless it may be replaced; return its path.

    Raises:
        OutputError: It is not empty, or a file, or its name is empty.
    """
    folder = Path(out)
    if not str(out).strip():
        raise OutputError("the output folder has no name, expected a path", "choose another --out")
    if is_file(folder):
        raise OutputError(f"{folder} is a file, expected a folder", "choose another --out")
    if is_dir(folder) and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} is not empty", "choose another --out, or --overwrite to replace it")
    return folder
