"""``Int8Config`` and ``Nf4Config``: quantize a base while `transformers` reads it, one tensor at a time.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=Int8Config())

One weight at a time is in memory in its original dtype, and little of the files stays resident. ``save_pretrained`` writes
the quantized base. Its file shows which layers are quantized and how, and opening it converts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.errors import BaseModelError, ConfigError, did_you_mean
from lorakeet.quant import bitsandbytes_layout
from lorakeet.quant.int8 import BLOCK_ROWS, INT8, plain_layer
from lorakeet.quant.layer_selection import layers_to_quantize, vocabulary_layers
from lorakeet.quant.mmap_release import MappedFiles
from lorakeet.quant.nf4 import NF4, Nf4Linear
from lorakeet.quant.protocol import QuantizedLayer, is_quantized, quantized_layers, weight_shape
from lorakeet.quant.replace import QuantizedFormat, dense_shape, tie_tensors
from lorakeet.quant.resize_vocabulary import enable_resizing
from lorakeet.quant.saved_layers import saved_layers
from lorakeet.runs.process_memory import return_free_memory

#: Names of the methods in a model's ``config.json``.
METHOD, NF4_METHOD = "lorakeet_int8", "lorakeet_nf4"


class _Config(QuantizationConfigMixin):
    """Settings of a quantized base, and the check of their names."""

    method: ClassVar[str]

    def __init__(self, embeddings: bool, kept: Iterable[str] | None, others: dict[str, Any], known: list[str]) -> None:
        if others.pop("quant_method", self.method) != self.method or others:
            names = ", ".join(others) or "quant_method"
            raise ConfigError(f"{type(self).__name__} has no setting {names}", did_you_mean(names, known))
        self.quant_method: Any = self.method
        self.embeddings = embeddings
        self.modules_to_not_convert = list(kept or ())


@register_quantization_config(METHOD)
class Int8Config(_Config):
    """Settings of an 8-bit base; :mod:`lorakeet.kernels.int8.format` describes the rounding.

    Args:
        embeddings: Quantize the input embedding and the head of a language model too.
        modules_to_not_convert: Modules to leave as they are, named as seen from inside the base model.

    Raises:
        ConfigError: a setting is unknown.
    """

    method = METHOD

    def __init__(
        self, embeddings: bool = True, modules_to_not_convert: Iterable[str] | None = None, **others: Any
    ) -> None:
        super().__init__(embeddings, modules_to_not_convert, others, ["embeddings", "modules_to_not_convert"])


@register_quantization_config(NF4_METHOD)
class Nf4Config(_Config):
    """Settings of a 4-bit base; :mod:`lorakeet.kernels.nf4.format` describes the rounding.

    Args:
        embeddings: Quantize the input embedding and the head of a language model too, in 8 bits.
        modules_to_not_convert: Modules to leave as they are, named as seen from inside the base model.
        layout: Names of the tensors in the files: ``lorakeet``, or ``bitsandbytes``, whose users quantize no embedding and no
            head.

    Raises:
        ConfigError: a setting is unknown, or the layout has no 8-bit embeddings.
    """

    method = NF4_METHOD

    def __init__(
        self,
        embeddings: bool | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        layout: str = "lorakeet",
        **others: Any,
    ) -> None:
        foreign = layout == "bitsandbytes"
        embeddings = not foreign if embeddings is None else embeddings
        known = ["embeddings", "modules_to_not_convert", "layout"]
        super().__init__(embeddings, modules_to_not_convert, others, known)
        if layout not in ("lorakeet", "bitsandbytes"):
            raise ConfigError(f"Nf4Config: unknown layout {layout!r}", "name one of: lorakeet, bitsandbytes")
        if foreign and embeddings:
            raise ConfigError("Nf4Config: the layout bitsandbytes has no 8-bit embeddings", "set embeddings=False")
        self.layout = layout

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as ``config.json`` stores them: in the layout of `bitsandbytes`, that package's own."""
        return bitsandbytes_layout.config_dict() if self.layout == "bitsandbytes" else super().to_dict()


#: Name of a quantized format (``config.QUANTIZED_FORMATS``) -> the ``quantization_config`` that loads a base in it.
CONFIGS: dict[str, Callable[..., QuantizationConfigMixin]] = {"int8": Int8Config, "nf4": Nf4Config}
#: The formats by the same names.
FORMATS = {"int8": INT8, "nf4": NF4}


class _Quantizer(HfQuantizer):
    """Hook of transformers' loader: chooses the tensors to quantize, converts them, and checks the loaded model."""

    form: QuantizedFormat
    bits: int

    def __init__(self, quantization_config: Any, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        # Shapes that the architecture expects, and of stored tensors; transformers checks none of a quantized base.
        self.shapes: dict[str, torch.Size] = {}
        self.stored: dict[str, torch.Size] = {}
        self.misshapen: dict[str, tuple[torch.Size, torch.Size]] = {}
        self.not_finite: list[str] = []
        self.vocabulary: dict[str, str] = {}
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
                f"cannot quantize a base to {self.bits} bits and offload it to disk in one go",
                "write it once with `lorakeet quantize`, and load that",
            )

    # -- before: the skeleton -----------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        self.vocabulary = vocabulary_layers(model)
        config = self.quantization_config
        if self.pre_quantized:
            placeholders = saved_layers(model, checkpoint_files or ())
        else:
            chosen = layers_to_quantize(model, config.embeddings, config.modules_to_not_convert)
            placeholders = {
                name: self.form.placeholder(dense_shape(layer), name in self.vocabulary)
                for name, layer in chosen.items()
            }
            self.files = MappedFiles(checkpoint_files or ())
        for name, weight in placeholders.items():
            made: Any = self.form.layer(model.get_submodule(name), weight)
            if not self.pre_quantized:  # in fp32: the loader would cast a file's weight to integers unrounded
                shape = weight.out_features, weight.in_features
                made.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)
            elif isinstance(made, Nf4Linear):
                self.stored |= {f"{name}.{leaf}": tensor.shape for leaf, tensor in weight.tensors().items()}
            model.set_submodule(name, made)
        tie_tensors(model, placeholders)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return True  # so that each tensor's shape is checked

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        owner, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(owner)
        if leaf != "weight" or not is_quantized(layer):
            return super().param_element_size(model, param_name, param)
        return 0.5 if isinstance(layer, Nf4Linear) else 1

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    # -- after: is everything there? ----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.not_finite:
            raise not_finite_error(self.not_finite)
        self._check_shapes(model)
        for name, layer in list(quantized_layers(model)):
            stored = layer._parameters["weight"]
            assert stored is not None
            if stored.is_floating_point() and not stored.is_meta:
                model.set_submodule(name, _fresh(model, layer))  # missing from the files: a new layer, to be trained
            else:
                for tensor in layer.quantized_weight().tensors().values():
                    tensor.requires_grad_(False)
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
            expected = self.stored.get(name, self.shapes.get(name))
            module = model.get_submodule(name.rpartition(".")[0])
            found = parameter.shape
            if name.endswith(".weight") and name not in self.stored and is_quantized(module):
                found = torch.Size(weight_shape(module)[:: -1 if module.transposed else 1])
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
        for name, layer in list(quantized_layers(model)):
            model.set_submodule(name, layer.dequantized().to(dtype or layer.dtype))
        model.tie_weights()
        return model


@register_quantizer(METHOD)
class Int8Quantizer(_Quantizer):
    """Hook of transformers' loader for a base in 8 bits."""

    form, bits = INT8, 8


@register_quantizer(NF4_METHOD)
class Nf4Quantizer(_Quantizer):
    """Hook of transformers' loader for a base in 4 bits."""

    form, bits = NF4, 4

    def __init__(self, quantization_config: Any, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.refused: list[str] = []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **settings: Any) -> None:
        if self.refused:
            raise bitsandbytes_layout.refused_error(self.refused)
        bitsandbytes_layout.without_conversions(model)
        super()._process_model_after_weight_loading(model, **settings)

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversions of files in the layout of `bitsandbytes`."""
        foreign = self.pre_quantized and self.quantization_config.layout == "bitsandbytes"
        return bitsandbytes_layout.conversions(self.refused) if foreign else []

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Return the tensors to save, under the names of the layout."""
        foreign = self.quantization_config.layout == "bitsandbytes"
        return (bitsandbytes_layout.state_dict(model) if foreign else None), {}


#: The hooks of the loader by the names of their formats.
QUANTIZERS: dict[str, type[_Quantizer]] = {"int8": Int8Quantizer, "nf4": Nf4Quantizer}


class _Quantize(ConversionOps):
    """Conversion of one tensor of the files into the tensors that the model holds of it."""

    def __init__(self, quantizer: _Quantizer) -> None:
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
            layer: Any = model.get_submodule(owner)
            if leaf != "weight" or not is_quantized(layer):
                made[name] = tensor
                continue
            if not all(torch.isfinite(block).all() for block in tensor.split(BLOCK_ROWS)):
                self.quantizer.not_finite.append(owner)
            dense = tensor.T.contiguous() if layer.transposed else tensor
            weight = self.quantizer.form.quantize(dense, owner in self.quantizer.vocabulary)
            made |= {f"{owner}.{leaf}": part for leaf, part in weight.tensors().items()}
        return made


def _fresh(model: PreTrainedModel, layer: QuantizedLayer) -> nn.Module:
    """Build a plain layer of this shape, initialized as the architecture initializes its own."""
    made = plain_layer(layer)
    model._init_weights(made)
    return made


def own_bits(config: Any) -> int | None:
    """Return the bits of a base that Lorakeet quantized, from its configuration of quantization; None for any other."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return {METHOD: 8, NF4_METHOD: 4}.get(str(getattr(method, "value", method)))


def foreign_method(config: Any) -> str | None:
    """Return the name of the quantization method in a model's configuration; None if there is none, or it is ours."""
    if config is None or own_bits(config) is not None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown")


def reads_layout(config: Any) -> bool:
    """Whether a model's configuration of quantization is that of `bitsandbytes` for NF4, which is read."""
    return foreign_method(config) == bitsandbytes_layout.METHOD and bitsandbytes_layout.is_readable(config)


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
