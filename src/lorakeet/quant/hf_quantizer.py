"""``Int8Config``: a base that is rounded to 8 bits while `transformers` reads it, one tensor at a time.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=Int8Config())

Only one weight at a time is there in its own number format, and little of the files stays resident. ``save_pretrained``
writes the rounded base; which layers are rounded there is told by the file itself, and opening it converts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightRenaming, rename_source_key
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorakeet.errors import BaseModelError, ConfigError, did_you_mean
from lorakeet.kernels.int8.format import scale_size
from lorakeet.quant.int8 import (
    Int8Embedding,
    Int8Linear,
    layers_to_round,
    out_in,
    plain_layer,
    round_weight,
    rounded_layers,
    rounded_like,
    vocabulary_layers,
)
from lorakeet.quant.mmap_release import MappedFiles
from lorakeet.quant.resize_vocabulary import resizable, round_in_place, tie_scales

METHOD = "lorakeet_int8"


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """How a base is rounded: each output channel to int8 by its largest value, after the input channels of layers inside the
    model are evened out; two columns of a weight that narrows are kept (see :mod:`lorakeet.kernels.int8.format`).

    Args:
        embeddings: round the input embedding and the head of a language model too.
        modules_to_not_convert: modules that stay as they are, named as seen from inside the base model.

    Raises:
        ConfigError: an unknown setting.
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


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What `transformers` asks while it loads: which tensors are rounded, how, and whether all is well afterwards."""

    def __init__(self, quantization_config: Int8Config, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.shapes: dict[
            str, torch.Size
        ] = {}  # of what the architecture wants; transformers checks none of a quantised base
        self.odd: dict[str, tuple[torch.Size, torch.Size]] = {}
        self.broken: list[str] = []
        self.pages = MappedFiles(())

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # what learns beside the frozen weights is ours to say

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in places and not self.pre_quantized:
            raise BaseModelError(
                "a base cannot be rounded to 8 bits and offloaded to disk in one go",
                "write it once with `lorakeet quantize`, and load that",
            )

    # -- before: the skeleton -----------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **_: Any
    ) -> None:
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        config = self.quantization_config
        chosen = layers_to_round(model, config.embeddings, config.modules_to_not_convert)
        if self.pre_quantized:
            chosen = _as_the_files_have_it(model, checkpoint_files or ())
        else:
            self.pages = MappedFiles(checkpoint_files or ())
        # Empty weights: of fp32 where they are to be rounded, or the file's would be cast to int8 as they are.
        kind = torch.int8 if self.pre_quantized else torch.float32
        vocabulary = vocabulary_layers(model)
        for name, layer in chosen.items():
            rows, columns = out_in(layer)
            weight = torch.empty(rows, columns, dtype=kind, device="meta")
            scales = rows if name in vocabulary else scale_size(rows, columns)
            scale = torch.empty(scales, dtype=torch.float32, device="meta")
            model.set_submodule(name, rounded_like(layer, weight, scale, layer.weight.dtype))  # type: ignore[arg-type]
        tie_scales(model, chosen)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return True  # every tensor's shape is looked at

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        owner, _, leaf = param_name.rpartition(".")
        rounded = leaf == "weight" and isinstance(model.get_submodule(owner), (Int8Linear, Int8Embedding))
        return 1 if rounded else super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return _Round(self)

    # -- after: is everything there? ----------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if self.broken:
            raise not_finite(self.broken)
        odd = dict(self.odd)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            wanted = self.shapes.get(name)
            module = model.get_submodule(name.rpartition(".")[0])
            turned = getattr(module, "transposed", False) and name.endswith(".weight")
            found = parameter.shape[::-1] if turned else parameter.shape
            if wanted is not None and found != wanted:
                odd[name] = (found, wanted)
        prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or " ") else ""
        heads = [name for name in odd if prefix and not name.startswith(prefix) and name in self.odd]
        if len(heads) < len(odd):
            told = [f"{key} is {list(f)}, its config says {list(w)}" for key, (f, w) in odd.items() if key not in heads]
            raise BaseModelError(f"the weights do not fit: {'; '.join(sorted(told)[:5])}", "get the base's files again")
        for name, layer in list(rounded_layers(model)):
            if layer.weight.is_floating_point() and not layer.weight.is_meta:
                model.set_submodule(name, _fresh(model, layer))  # the files have none: a new layer, which is to learn
            else:
                layer.weight.requires_grad_(False)
                layer.scale.requires_grad_(False)
        resizable(model)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for name, layer in list(rounded_layers(model)):
            model.set_submodule(name, layer.unrounded().to(dtype or layer.dtype))
        model.tie_weights()
        return model


class _Round(ConversionOps):
    """A tensor of the files -> what the model holds of it."""

    def __init__(self, quantizer: Int8Quantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: PreTrainedModel | None = None, **_: Any) -> dict[str, Tensor]:
        assert model is not None
        made: dict[str, Tensor] = {}
        for name, given in input_dict.items():
            tensor = given[0] if isinstance(given, list) else given
            self.quantizer.pages.count(tensor.nbytes)
            wanted = self.quantizer.shapes.get(name)
            if wanted is not None and tensor.shape != wanted:
                self.quantizer.odd[name] = (tensor.shape, wanted)
                continue  # it is missing, then
            owner, leaf = name.rpartition(".")[::2]
            layer = model.get_submodule(owner)
            if leaf != "weight" or not isinstance(layer, (Int8Linear, Int8Embedding)):
                made[name] = tensor
                continue
            if not torch.isfinite(tensor).all():
                self.quantizer.broken.append(owner)
            vocabulary = len(layer.scale) == len(layer.weight)
            made[name], made[f"{owner}.scale"] = round_weight(tensor, layer.transposed, vocabulary)
        return made


def _as_the_files_have_it(model: PreTrainedModel, files: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that are rounded in the files of a base that was saved in 8 bits.

    Raises:
        BaseModelError: a rounded weight of the files has no scales, or belongs to no layer of this model.
    """
    rounded: set[str] = set()
    scales: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                owner, _, leaf = name.rpartition(".")
                if leaf == "scale":
                    scales.add(owner)
                elif leaf == "weight" and file.get_slice(name).get_dtype() == "I8":
                    rounded.add(owner)
    if halves := sorted(rounded ^ scales):
        raise BaseModelError(
            f"{len(halves)} weights in 8 bits lack their numbers or their scales in the files: {', '.join(halves[:5])}",
            "get the base's files again, or write them again with `lorakeet quantize`",
        )
    # as transformers will call them: some architectures have other names in their files
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    skeleton = model.state_dict()
    names = (
        rename_source_key(f"{owner}.weight", renamings, [], model.base_model_prefix, skeleton)[0] for owner in rounded
    )
    named = {name.removesuffix(".weight") for name in names}
    tied = {
        key.removesuffix(".weight"): value.removesuffix(".weight") for key, value in model.all_tied_weights_keys.items()
    }
    chosen = {name: module for name, module in layers_to_round(model).items() if tied.get(name, name) in named}
    stray = sorted(name for name in named - set(chosen) if f"{name}.weight" in skeleton or not _is_head(name))
    if stray:
        raise BaseModelError(
            f"{len(stray)} weights in 8 bits belong to no layer of {type(model).__name__}: {', '.join(stray[:5])}",
            "write the base again with `lorakeet quantize`",
        )
    return chosen


def _is_head(name: str) -> bool:
    """Whether a layer of the files is a language model's head, which another task's model leaves out."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out", "decoder", "output_projection", "vocab_projector")


def _fresh(model: PreTrainedModel, layer: Int8Linear | Int8Embedding) -> nn.Module:
    """A plain layer of this shape, as the architecture begins its own."""
    made = plain_layer(layer)
    model._init_weights(made)
    return made


def other_method(config: Any) -> str | None:
    """How a base is quantised, by its configuration, if in another way than this one."""
    if config is None or isinstance(config, Int8Config):
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method == METHOD else str(getattr(method, "value", method) or "unknown")


def quantised_otherwise(name: str, method: str) -> BaseModelError:
    """The error for a base that cannot be rounded, since it is quantised in another way."""
    return BaseModelError(
        f"{name} is quantised already ({method})", "load it as it is, or give the full-precision model"
    )


def not_finite(names: list[str]) -> BaseModelError:
    """The error for weights that cannot be rounded."""
    return BaseModelError(
        f"{len(names)} weights have NaN or infinite values: {', '.join(names[:5])}", "get the base's files again"
    )


@torch.no_grad()
def quantize_(model: PreTrainedModel, keep: Iterable[str] = (), embeddings: bool = True) -> int:
    """Put a model that is in memory into 8 bits, in place, one layer after the other; returns how many layers.

    Left as they are: what learns, what lies outside of the base model (a task's head), and the modules inside of it that
    ``keep`` names.

    Raises:
        BaseModelError: a weight has NaN or infinite values, or the model is quantised in another way already.
    """
    if other := other_method(getattr(model.config, "quantization_config", None)):
        raise quantised_otherwise("this base", other)
    config = Int8Config(embeddings, keep)
    chosen = {
        name: layer
        for name, layer in layers_to_round(model, embeddings, config.modules_to_not_convert).items()
        if not layer.weight.requires_grad and not isinstance(layer, Int8Embedding)  # type: ignore[operator]
    }
    broken = [name for name, layer in chosen.items() if not torch.isfinite(layer.weight).all()]  # type: ignore[arg-type]
    if broken:
        raise not_finite(broken)
    round_in_place(model, chosen)
    if chosen:
        model.hf_quantizer = quantizer = Int8Quantizer(config, pre_quantized=False)
        quantizer.postprocess_model(model)
        model.is_quantized, model.quantization_method = True, METHOD
        tie_scales(model, chosen)
    return len(chosen)
