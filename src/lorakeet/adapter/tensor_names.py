"""Which tensors an adapter is made of, and what each is called in the file and in the model.

In the file every key starts with ``base_model.model.`` and carries no adapter name (PEFT's format); in the model the name
of the adapter stands in the middle. One table serves saving and loading, so the two cannot disagree.
"""

from __future__ import annotations

import re

from torch import nn

from lorakeet.lora.layer import LoraEmbedding, LoraLayer, LoraPair
from lorakeet.lora.model import LoraModel
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.target_parameters import LoraParameter, LoraParameters
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens

PREFIX = "base_model.model."
#: Embeddings that PEFT saves whole as soon as they are adapted.
SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")
#: How the rows of trained tokens are called in the file, after the layer.
ROWS = ".token_adapter.trainable_tokens_delta"


def tensor_names(model: LoraModel, adapter: str) -> dict[str, str]:
    """Key in the file -> key in ``model.state_dict()``, for every tensor of the adapter.

    Per layer ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r] (``lora_B.bias`` [out]), or ``lora_embedding_A``
    [r, vocabulary] and ``lora_embedding_B`` [dim, r]; modules trained whole under their own names; the base's biases as
    the config's ``bias`` says; an adapted ``embed_tokens`` or ``lm_head`` itself. Convolutions have ``lora_A.weight``
    [r, in, *kernel] and ``lora_B.weight`` [out, r / groups, 1, ...], parameters that stack experts [r·experts, in] and
    [out, r·experts]; single rows of an embedding ``token_adapter.trainable_tokens_delta`` [tokens, dim].
    """
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, SavedModule) and adapter in module.modules_to_save:
            copy = module.modules_to_save[adapter]
            names |= {f"{path}.{key}": f"{path}.modules_to_save.{adapter}.{key}" for key in copy.state_dict()}
        elif isinstance(module, LoraParameter):
            continue
        elif isinstance(module, LoraLayer) and adapter in module.r:
            names |= _layer_names(path, module, adapter)
    names |= _bias_names(model, adapter)
    names |= _embedding_names(model, adapter)
    names = _beside_parameters(names, model, adapter)
    return {PREFIX + key: value for key, value in names.items()}


def _beside_parameters(names: dict[str, str], model: LoraModel, adapter: str) -> dict[str, str]:
    """``names`` with the pairs of adapted parameters.

    PEFT wraps the module that owns them once for each, the first one innermost, and the file's keys show it: of two
    parameters of ``experts`` the first is at ``experts.base_layer.lora_A.weight``, the second at ``experts.lora_A.weight``,
    and whatever lies within at ``experts.base_layer.base_layer...``.
    """
    for path, table in [(path, module) for path, module in model.named_modules() if isinstance(module, LoraParameters)]:
        owner = path.removesuffix(".lora_parameters")
        layers = {name: layer for name, layer in table.items() if isinstance(layer, LoraLayer) and adapter in layer.r}
        mine = [name for name in model.get_submodule(owner)._parameters if name in layers]
        inner = owner + ".base_layer" * len(mine)
        names = {re.sub(rf"^{re.escape(owner)}(?=\.)", inner, key): value for key, value in names.items()}
        for depth, name in enumerate(reversed(mine)):
            pair = _layer_names(f"{path}.{name}", layers[name], adapter)
            names |= {key.replace(f"{path}.{name}", owner + ".base_layer" * depth): pair[key] for key in pair}
    return names


def _layer_names(path: str, layer: LoraLayer, adapter: str) -> dict[str, str]:
    if isinstance(layer, TiedLayer):
        return {}
    if isinstance(layer, TrainableTokens):
        return {f"{path}{ROWS}": f"{path}.trainable_tokens_delta.{adapter}"}
    if isinstance(layer, LoraEmbedding):
        return {f"{path}.{part}": f"{path}.{part}.{adapter}" for part in ("lora_embedding_A", "lora_embedding_B")}
    assert isinstance(layer, LoraPair)
    ends = ["lora_A.weight", "lora_B.weight"] + (["lora_B.bias"] if layer.lora_B[adapter].bias is not None else [])
    return {f"{path}.{end}": f"{path}.{end.replace('.', f'.{adapter}.')}" for end in ends}


def _bias_names(model: LoraModel, adapter: str) -> dict[str, str]:
    mode = model.peft_config[adapter].bias
    if mode == "none":
        return {}
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    names = {}
    for name, _ in model.named_parameters():
        if not name.endswith(".bias") or ".lora_" in name or ".modules_to_save." in name or ".original_module." in name:
            continue
        if mode == "all" or name.removesuffix(".base_layer.bias") in adapted:
            names[name] = name
    return names


def mirrored_names(model: LoraModel, adapter: str) -> dict[str, tuple[str, bool]]:
    """Keys of the file that say again what another key says, since their layers share it -> (that key, whether transposed).

    PEFT writes the pair of a head that is tied to an adapted embedding too: its A is the embedding's B transposed. The rows
    of trained tokens it repeats only beside an embedding that is saved whole.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    again: dict[str, tuple[str, bool]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, TiedLayer) or adapter not in module.r:
            continue
        source, here = PREFIX + paths[id(module.source)], PREFIX + path
        if isinstance(module.source, TrainableTokens):
            again[f"{here}{ROWS}"] = (f"{source}{ROWS}", False)
        elif isinstance(module.base_layer, nn.Embedding):
            again |= {
                f"{here}.{part}": (f"{source}.{part}", False) for part in ("lora_embedding_A", "lora_embedding_B")
            }
        else:
            again[f"{here}.lora_A.weight"] = (f"{source}.lora_embedding_B", True)
            again[f"{here}.lora_B.weight"] = (f"{source}.lora_embedding_A", True)
    return again


def vocabulary_names(model: LoraModel) -> dict[str, str]:
    """Key in the file -> key in the state dict of the base's embedding and head, saved where the vocabulary was resized."""
    names: dict[str, str] = {}
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, ask, lambda: None)()
        path = next((path for path, module in model.named_modules() if module is layer), None)
        if path is None or isinstance(layer, SavedModule):
            continue
        own = ".base_layer" if isinstance(layer, LoraLayer) else ""
        rows = layer.source if isinstance(layer, TiedLayer) else layer
        inner = ".token_adapter" if isinstance(rows, TrainableTokens) else ""
        names[f"{PREFIX}{path}{inner}{own}.weight"] = f"{path}{own}.weight"
    return names


def _embedding_names(model: LoraModel, adapter: str) -> dict[str, str]:
    config = model.peft_config[adapter]
    targets = config.target_modules
    if config.trainable_token_indices is not None:
        return {}  # as in PEFT: whoever trains a few rows does not want all of them saved
    wanted = {
        path
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r and path.rpartition(".")[2] in SAVED_EMBEDDINGS
    }
    if isinstance(targets, list) and not any(name in targets for name in SAVED_EMBEDDINGS):
        return {}
    return {f"{path}.base_layer.weight": f"{path}.base_layer.weight" for path in sorted(wanted)}


def owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor ``key`` of the state dict, and its name there."""
    path, _, leaf = key.rpartition(".")
    return model.get_submodule(path), leaf
