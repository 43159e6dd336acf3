"""Names of an adapter's tensors, in its file and in the model.

In the file every key begins with ``base_model.model.`` and does not contain the adapter's name (PEFT's format). In the model
the adapter's name is a part of the key. One table serves saving and loading, so the two cannot disagree.
"""

from __future__ import annotations

import re

from torch import nn

from lorakeet.lora.interop.wrappers import canonical
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.model import LoraModel
from lorakeet.lora.modules_to_save import SavedModule
from lorakeet.lora.target_parameters import LoraParameter, LoraParameters
from lorakeet.lora.trainable_tokens import FILE_NAME as TOKENS
from lorakeet.lora.trainable_tokens import TiedLayer, TrainableTokens

PREFIX = "base_model.model."
#: Beginning of the keys of tensors that all layers share.
SHARED = "base_model."
#: Last parts of the names of embeddings and heads that PEFT saves whole as soon as they are adapted.
SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")


def tensor_names(model: LoraModel, adapter: str) -> dict[str, str]:
    """Map keys of the file to keys of ``model.state_dict()``, for every tensor of the adapter.

    The tensors of a layer are named by the layer and its variant. They are, for each type:

    - linear layer: ``lora_A.weight`` [r, in], ``lora_B.weight`` [out, r], ``lora_B.bias`` [out]
    - convolution: ``lora_A.weight`` [r, in, *kernel], ``lora_B.weight`` [out, r / groups, 1, ...]
    - embedding: ``lora_embedding_A`` [r, vocabulary], ``lora_embedding_B`` [dim, r]
    - stacked experts: ``lora_A.weight`` [r·experts, in], ``lora_B.weight`` [out, r·experts]
    - VeRA: ``vera_lambda_b`` [out], ``vera_lambda_d`` [r]; beside the layers ``vera_A`` [r, in] and ``vera_B`` [out, r]
    - trained rows of an embedding: ``token_adapter.trainable_tokens_delta`` [tokens, dim]

    Modules trained whole keep their own names, as do the base's biases that the setting ``bias`` trains. An adapted
    ``embed_tokens`` or ``lm_head`` is saved too.
    """
    names: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, SavedModule) and adapter in module.modules_to_save:
            copy = module.modules_to_save[adapter]
            names |= {f"{path}.{key}": f"{path}.modules_to_save.{adapter}.{key}" for key in copy.state_dict()}
        elif isinstance(module, LoraLayer) and not isinstance(module, LoraParameter) and adapter in module.r:
            names |= _layer_names(path, path, module, adapter)
    names |= _bias_names(model, adapter)
    names |= _embedding_names(model, adapter)
    names = _with_parameters(names, model, adapter)
    if any(canonical(name) != name for name in names.values()):  # some wrappers hide themselves in a state dict
        own = {canonical(key): key for key in model.state_dict()}
        names = {key: own[canonical(name)] for key, name in names.items()}
    return {PREFIX + canonical(key): value for key, value in names.items()} | _shared_names(model, adapter)


def _shared_names(model: LoraModel, adapter: str) -> dict[str, str]:
    """Map keys of the file to keys of the state dict, for the tensors that all layers of the adapter share."""
    config = model.peft_config[adapter]
    if not (names := config.variant.shared_names(adapter, config)):
        return {}
    layers = (path for path, each in model.named_modules() if isinstance(each, LoraLayer) and adapter in each.r)
    first = next(layers, None)
    return {} if first is None else {f"{SHARED}{key}": f"{first}.{own}" for key, own in names.items()}


def _layer_names(file_path: str, path: str, layer: LoraLayer, adapter: str) -> dict[str, str]:
    return {f"{file_path}.{key}": f"{path}.{own}" for key, own in layer.tensor_names(adapter).items()}


def _with_parameters(names: dict[str, str], model: LoraModel, adapter: str) -> dict[str, str]:
    """Add the tensors of adapted parameters to ``names``.

    PEFT wraps the module that owns them once for each, the first one innermost, and the file's keys show it. Of two
    parameters of ``experts`` the first is at ``experts.base_layer.lora_A.weight``, the second at
    ``experts.lora_A.weight``. The other tensors inside are at ``experts.base_layer.base_layer...``.
    """
    for path, table in [(path, module) for path, module in model.named_modules() if isinstance(module, LoraParameters)]:
        owner = path.removesuffix(".lora_parameters")
        layers = {name: layer for name, layer in table.items() if isinstance(layer, LoraLayer) and adapter in layer.r}
        adapted = [name for name in model.get_submodule(owner)._parameters if name in layers]
        inner = owner + ".base_layer" * len(adapted)
        names = {re.sub(rf"^{re.escape(owner)}(?=\.)", inner, key): value for key, value in names.items()}
        for depth, name in enumerate(reversed(adapted)):
            names |= _layer_names(owner + ".base_layer" * depth, f"{path}.{name}", layers[name], adapter)
    return names


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


def _embedding_names(model: LoraModel, adapter: str) -> dict[str, str]:
    config = model.peft_config[adapter]
    targets = config.target_modules
    if config.trainable_token_indices is not None:
        return {}  # as in PEFT: an adapter that trains a few rows does not save all of them
    if isinstance(targets, list) and not any(name in targets for name in SAVED_EMBEDDINGS):
        return {}
    adapted = sorted(
        path
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r and path.rpartition(".")[2] in SAVED_EMBEDDINGS
    )
    return {f"{path}.base_layer.weight": f"{path}.base_layer.weight" for path in adapted}


def mirrored_names(model: LoraModel, adapter: str) -> dict[str, tuple[str, bool]]:
    """Map keys of the file that repeat another key's tensor to (that key, whether transposed): their layers share it.

    PEFT also writes A and B of a head that is tied to an adapted embedding: the head's A is the embedding's B transposed. It
    repeats the rows of trained tokens only beside an embedding that is saved whole.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    names: dict[str, tuple[str, bool]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, TiedLayer) or adapter not in module.r:
            continue
        source, here = PREFIX + canonical(paths[id(module.source)]), PREFIX + canonical(path)
        if isinstance(module.source, TrainableTokens):
            names[f"{here}.{TOKENS}"] = (f"{source}.{TOKENS}", False)
        elif isinstance(module.base_layer, nn.Embedding):
            for matrix in ("lora_embedding_A", "lora_embedding_B"):
                names[f"{here}.{matrix}"] = (f"{source}.{matrix}", False)
        else:
            names[f"{here}.lora_A.weight"] = (f"{source}.lora_embedding_B", True)
            names[f"{here}.lora_B.weight"] = (f"{source}.lora_embedding_A", True)
    return names


def is_token_rows(key: str) -> bool:
    """Whether a key of the file names the rows of trained tokens."""
    return key.endswith(f".{TOKENS}")


def vocabulary_names(model: LoraModel) -> dict[str, str]:
    """Map keys of the file to keys of the state dict for the base's embedding and head, saved with a resized vocabulary."""
    names: dict[str, str] = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, method, lambda: None)()
        path = next((path for path, module in model.named_modules() if module is layer), None)
        if path is None or isinstance(layer, SavedModule):
            continue
        own = ".base_layer" if isinstance(layer, LoraLayer) else ""
        rows = layer.source if isinstance(layer, TiedLayer) else layer
        inner = ".token_adapter" if isinstance(rows, TrainableTokens) else ""
        names[f"{PREFIX}{canonical(path)}{inner}{own}.weight"] = f"{path}{own}.weight"
    return names
