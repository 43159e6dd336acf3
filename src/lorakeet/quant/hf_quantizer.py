"""``Int8Config``: quantize a base to 8 bits while `transformers` reads it, one tensor at a time.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=Int8Config())

One weight at a time is in memory in its original dtype, and little of the files stays resident. ``save_pretrained`` writes
the quantized base. Its file shows which layers are in 8 bits, and opening it converts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.errors import BaseModelError, ConfigError, did_you_mean
from lorakeet.kernels.int8.format import scale_size
from lorakeet.quant.int8 import (
    BLOCK_ROWS,
    Int8Embedding,
    Int8Linear,
    int8_layer,
    int8_layers,
    plain_layer,
    quantize_dense,
)
from lorakeet.quant.layer_selection import layers_to_quantize, vocabulary_layers
from lorakeet.quant.mmap_release import MappedFiles
from lorakeet.quant.replace import dense_shape, tie_tensors
from lorakeet.quant.resize_vocabulary import enable_resizing
from lorakeet.quant.saved_layers import layers_saved_in_int8
from lorakeet.runs.process_memory import return_free_memory

#: Name of the method in a model's ``config.json``.
METHOD = "lorakeet_int8"


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Settings of an 8-bit base; :mod:`lorakeet.kernels.int8.format` describes the rounding.

    Args:
        embeddings: Quantize the input embedding and the head of a language model too.
        modules_to_not_convert: Modules to leave as they are, named as seen from inside the base model.

    Raises:
        ConfigError: a setting is unknown.
    """

    def __init__(
        self, embeddings: bool = True, modules_to_not_convert: Iterable[str] | None = None, **others: Any
    ) -> None:
        if others.pop("quant_method", METHOD) != METHOD or others:
            names = ", ".join(others) or "quant_method"
            hint = did_you_mean(names, ["embeddings", "modules_to_not_convert"])
            raise ConfigError(f"Int8Config has no setting {names}", hint)
        self.quant_method: Any = METHOD
        self.embeddings = embeddings
        self.modules_to_not_convert = list(modules_to_not_convert or ())


#: Name of a quantized format (``config.QUANTIZED_FORMATS``) -> the ``quantization_config`` that loads a base in it.
CONFIGS: dict[str, Callable[[], QuantizationConfigMixin]] = {"int8": Int8Config}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Hook of transformers' loader: chooses the tensors to quantize, converts them, and checks the loaded model."""

    def __init__(self, quantization_config: Int8Config, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        # Shapes that the architecture expects; transformers checks none of a quantized base.
        self.shapes: dict[str, torch.Size] = {}
        self.misshapen: dict[str, tuple[torch.Size, torch.Size]] = {}
        self.not_finite: list[str] = []
        self.files = MappedFiles(())

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # adapters train beside the frozen weights

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in devices and not self.pre_quantized:
            raise BaseModelError(
                "cannot quantize a base to 8 bits and offload it to disk in one go",
                "write it once with `lorakeet quantize`, and load that",
            )

    # -- before: the skeleton -----------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        config = self.quantization_config
        chosen = layers_to_quantize(model, config.embeddings, config.modules_to_not_convert)
        if self.pre_quantized:
            chosen = layers_saved_in_int8(model, checkpoint_files or ())
        else:
            self.files = MappedFiles(checkpoint_files or ())
        # Placeholders of weights yet to be quantized are fp32: the loader would cast a file's weight to int8 unrounded.
        stored_dtype = torch.int8 if self.pre_quantized else torch.float32
        vocabulary = vocabulary_layers(model)
        for name, layer in chosen.items():
            out_features, in_features = dense_shape(layer)
            weight = torch.empty(out_features, in_features, dtype=stored_dtype, device="meta")
            scales = out_features if name in vocabulary else scale_size(out_features, in_features)
            scale = torch.empty(scales, dtype=torch.float32, device="meta")
            model.set_submodule(name, int8_layer(layer, weight, scale, layer.weight.dtype))  # type: ignore[arg-type]
        tie_tensors(model, chosen)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return True  # so that each tensor's shape is checked

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        owner, _, leaf = param_name.rpartition(".")
        quantized = leaf == "weight" and isinstance(model.get_submodule(owner), (Int8Linear, Int8Embedding))
        return 1 if quantized else super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    # -- after: is everything there? ----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.not_finite:
            raise not_finite_error(self.not_finite)
        self._check_shapes(model)
        for name, layer in list(int8_layers(model)):
            if layer.weight.is_floating_point() and not layer.weight.is_meta:
                model.set_submodule(name, _fresh(model, layer))  # missing from the files: a new layer, to be trained
            else:
                layer.weight.requires_grad_(False)
                layer.scale.requires_grad_(False)
        enable_resizing(model)
        self.files.release()
        return_free_memory()

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Check all weights against the architecture; a task's head of another shape is left to the caller.

        Raises:
            BaseModelError: weights of the base have other shapes.
        """
        misshapen = dict(self.misshapen)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            expected = self.shapes.get(name)
            module = model.get_submodule(name.rpartition(".")[0])
            transposed = getattr(module, "transposed", False) and name.endswith(".weight")
            found = parameter.shape[::-1] if transposed else parameter.shape
            if expected is not None and found != expected:
                misshapen[name] = (found, expected)
        prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or " ") else ""
        heads = [name for name in misshapen if prefix and not name.startswith(prefix) and name in self.misshapen]
        if len(heads) < len(misshapen):
            lines = [
                f"{key} is {list(found)}, its config says {list(expected)}"
                for key, (found, expected) in misshapen.items()
                if key not in heads
            ]
            raise BaseModelError(
                f"the weights do not fit: {'; '.join(sorted(lines)[:5])}", "get the base's files again"
            )

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for name, layer in list(int8_layers(model)):
            model.set_submodule(name, layer.dequantized().to(dtype or layer.dtype))
        model.tie_weights()
        return model


class _Quantize(ConversionOps):
    """Conversion of one tensor of the files into the tensors that the model holds of it."""

    def __init__(self, quantizer: Int8Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **_: Any) -> dict[str, Tensor]:
        assert model is not None
        made: dict[str, Tensor] = {}
        for name, given in input_dict.items():
            tensor = given[0] if isinstance(given, list) else given
            self.quantizer.files.count(tensor.nbytes)
            expected = self.quantizer.shapes.get(name)
            if expected is not None and tensor.shape != expected:
                self.quantizer.misshapen[name] = (tensor.shape, expected)
                continue  # transformers then lists it as missing
            owner, leaf = name.rpartition(".")[::2]
            layer = model.get_submodule(owner)
            if leaf != "weight" or not isinstance(layer, (Int8Linear, Int8Embedding)):
                made[name] = tensor
                continue
            if not all(torch.isfinite(block).all() for block in tensor.split(BLOCK_ROWS)):
                self.quantizer.not_finite.append(owner)
            vocabulary = len(layer.scale) == len(layer.weight)
            weight = quantize_dense(tensor.T.contiguous() if layer.transposed else tensor, vocabulary)
            made[name], made[f"{owner}.scale"] = weight
        return made


def _fresh(model: PreTrainedModel, layer: Int8Linear | Int8Embedding) -> nn.Module:
    """Build a plain layer of this shape, initialized as the architecture initializes its own."""
    made = plain_layer(layer)
    model._init_weights(made)
    return made


def foreign_method(config: Any) -> str | None:
    """Return the name of the quantization method in a model's configuration; None if there is none, or it is ours."""
    if config is None or isinstance(config, Int8Config):
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method == METHOD else str(getattr(method, "value", method) or "unknown")


def foreign_method_error(name: str, method: str) -> BaseModelError:
    """Build the error for a base that another method has quantized already."""
    return BaseModelError(
        f"{name} is quantized already ({method})", "load it as it is, or give the full-precision model"
    )


def not_finite_error(names: list[str]) -> BaseModelError:
    """Build the error for weights that cannot be quantized."""
    return BaseModelError(
        f"{len(names)} weights have NaN or infinite values: {', '.join(names[:5])}", "get the base's files again"
    )
