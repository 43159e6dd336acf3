"""GGUF files: a whole model in f16, bf16 or q8_0, and an adapter of LoRA in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lorakeet.errors import AdapterError, BaseModelError
from lorakeet.export.gguf.architecture import TensorLayout, add_model_keys, tensor_layout
from lorakeet.export.gguf.vocabulary import add_vocabulary
from lorakeet.export.plain import PlainLayer

#: Name of a format -> the kind of its matrices, and llama.cpp's number of the file's type.
FORMATS = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def stored_kind(tensor: Tensor, kind: Kind) -> Kind:
    """Return the format of one tensor: vectors stay in fp32, and rows that blocks do not divide in f16."""
    if tensor.ndim < 2:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else Kind.F16


def write_model(path: Path, model: Any, tokenizer: Any, name: str, form: str = "f16", rule: str | None = None) -> None:
    """Write a model with its tokenizer as one GGUF file.

    Args:
        path: File to write.
        model: A plain causal language model.
        tokenizer: Its tokenizer.
        name: Its name in the file.
        form: Format of the matrices, a key of :data:`FORMATS`.
        rule: See :func:`lorakeet.export.gguf.vocabulary.add_vocabulary`.

    Raises:
        BaseModelError: The architecture, a setting of it or the tokenizer is not supported.
    """
    config = model.config.get_text_config()
    layout, (kind, file_type) = tensor_layout(config), FORMATS[form]
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_model_keys(writer, config)
    add_vocabulary(writer, tokenizer, len(model.get_input_embeddings().weight), rule)
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    _write(writer, list(layout.tensors(model.state_dict(), tied)), kind)


def write_adapter(path: Path, layers: Iterable[PlainLayer], config: Any, name: str) -> None:
    """Write an adapter as a GGUF file in fp32, for llama.cpp's ``--lora``.

    Args:
        path: File to write.
        layers: Its layers, with s = 1.
        config: The configuration of the base.
        name: Its name in the file.

    Raises:
        AdapterError: A layer has no name in GGUF, or llama.cpp would apply it to another one too.
        BaseModelError: The base's architecture is not supported.
    """
    layers = list(layers)
    layout = tensor_layout(config)
    alpha = max(layer.rank for layer in layers)
    tensors: list[tuple[str, Tensor]] = []
    for layer in layers:
        key = f"{layer.name}.weight"
        target = gguf_target(layout, layer)
        a = layer.A.T if layer.embedding else layer.A
        b = layout.rows(key, layer.B) * (layer.rank / alpha)  # llama.cpp multiplies by α / the tensor's own rank
        tensors += [(f"{target}.lora_a", a), (f"{target}.lora_b", b)]
    writer = gguf.GGUFWriter(path, layout.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _write(writer, tensors, Kind.F32)


def gguf_target(layout: TensorLayout, layer: PlainLayer) -> str:
    """Return the name in GGUF of the matrix that a layer's update is added to.

    Raises:
        AdapterError: There is none, or the head is the embedding, so that llama.cpp would change both.
    """
    target = layout.name(f"{layer.name}.weight")
    hint = "export the merged model: --for merged-gguf"
    if target is None:
        raise AdapterError(f"llama.cpp has no name for {layer.name} of a {layout.config.model_type} model", hint)
    if target in ("token_embd.weight", "output.weight") and layout.config.tie_word_embeddings:
        raise AdapterError(f"{layer.name} is tied to the other end of the model, which llama.cpp cannot part", hint)
    return target


def _write(writer: Any, tensors: list[tuple[str, Tensor]], kind: Kind) -> None:
    """Write the file: keys, then the tensors one by one, so that only one is converted at a time."""
    for name, tensor in tensors:
        own = stored_kind(tensor, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, own)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        if not np.isfinite(stored := gguf.quants.quantize(values, stored_kind(tensor, kind))).all():
            raise BaseModelError(
                f"{name} has values that the format cannot hold", "choose another --format, such as bf16"
            )
        writer.write_tensor_data(np.ascontiguousarray(stored).view(np.uint8))
    writer.close()
