"""An adapter out of a model that was trained whole and its base: the nearest update of low rank to the change of each layer.

The files of both models are read side by side, one tensor at a time, so neither model is ever in memory. What is no matrix is
not adapted: norms that changed are saved whole, and the log names what the adapter cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakeet._version import __version__
from lorakeet.adapter.fingerprint import fingerprint, sampled_names
from lorakeet.adapter.model_card import write_card
from lorakeet.adapter.serialization import OWN_NAME, WEIGHTS_NAME
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.base.architectures import own_class
from lorakeet.base.meta_device import meta_model, read_config
from lorakeet.base.source import find_source
from lorakeet.errors import AdapterError, BaseModelError
from lorakeet.files import write_folder, write_json
from lorakeet.log import info, warn
from lorakeet.lora.algebra.approximation import nearest, nearest_for_energy
from lorakeet.lora.algebra.settings import with_ranks
from lorakeet.lora.config import LoraConfig, PeftConfig, TaskType
from lorakeet.rank.weights import StoredWeights, stored_weights

#: End of a model's class name -> its task.
_TASKS = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
}
#: Function of the tensors done and their number.
Progress = Callable[[int, int | None], None]


@dataclass
class Extracted:
    """The parts of an adapter that is extracted.

    Attributes:
        tensors: Its tensors, by PEFT's keys.
        ranks: The rank of each adapted layer.
        kept: Share of the change's energy that each adapted layer keeps.
        whole: Names of the modules that are saved whole.
        lost: Names of the tensors that changed and are not in the adapter.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)


def extract(
    model: str,
    base: str,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the adapter that makes the nearest model of its rank to ``model`` out of ``base``.

    Args:
        model: Folder or hub id of the model that was trained whole.
        base: Folder, hub id or GGUF file of the model that it was trained from.
        out: Folder to write, whole or not at all.
        rank: The rank of every layer.
        energy: Instead of ``rank``: the share of ‖ΔW‖² that each layer keeps; ranks differ then.
        embeddings: Whether to adapt the embedding and the head too.
        progress: Function of the tensors done and their number.

    Returns:
        ``{"path", "ranks", "energy_kept", "whole", "lost", "parameters"}``. ``energy_kept`` is the smallest share that a
        layer keeps. ``whole`` is saved whole, ``lost`` is not in the adapter. ``parameters`` are those of A and B.

    Raises:
        AdapterError: No layer changed.
        BaseModelError: One of the models cannot be read, or they are of different architectures or shapes.
        OutputError: ``out`` cannot be written.
    """
    config = read_config(base)
    skeleton = meta_model(config, auto_class=own_class(config))
    tuned, own = stored_weights(model, skeleton), stored_weights(base, skeleton)
    _check_alike(model, base, tuned, own)
    with write_folder(out) as aside:  # fails before the expensive part if the folder is not writable
        layers = _layers(skeleton, embeddings)
        found = _decomposed(tuned, own, layers, rank, energy, progress)
        _keep_norms(found, tuned, own, skeleton)
        settings = _settings(found, layers, config, base)
        notes = {
            "format": 1,
            "lorakeet": __version__,
            "base": {"name": settings.base_model_name_or_path, "fingerprint": _fingerprint(skeleton, own)},
            "extracted": {"from": model, "energy_kept": min(found.kept.values())},
        }
        save_file(found.tensors, aside / WEIGHTS_NAME, {"format": "pt"})
        settings.save_pretrained(aside)
        write_json(aside / OWN_NAME, notes)
        write_card(aside, settings, notes)
    _tell(found)
    return {
        "path": str(out),
        "ranks": found.ranks,
        "energy_kept": min(found.kept.values()),
        "whole": sorted(found.whole),
        "lost": found.lost,
        "parameters": sum(tensor.numel() for key, tensor in found.tensors.items() if ".lora_" in key),
    }


def _check_alike(model: str, base: str, tuned: StoredWeights, own: StoredWeights) -> None:
    """Raise a :class:`BaseModelError` if the models are not of one architecture, or a tensor has another shape."""
    kinds = read_config(model).model_type, own.skeleton.config.model_type
    if kinds[0] != kinds[1]:
        raise BaseModelError(
            f"{model} is a {kinds[0]} model, its base {base} a {kinds[1]} model", "give its own base: --model"
        )
    common = [name for name in own if name in tuned.shapes]
    other = [name for name in common if tuned.shapes[name] != own.shapes[name]]
    if other or not common:
        shapes = (
            f"{list(tuned.shapes[other[0]])}, expected {list(own.shapes[other[0]])}" if other else "no tensor in common"
        )
        name = f"{other[0]} of " if other else ""
        raise BaseModelError(f"{name}{model} has {shapes} as in {base}", "give its own base: --model")


def _layers(skeleton: Any, embeddings: bool) -> dict[str, nn.Module]:
    """Return the layers that can be adapted, by name; the head and the embedding only if they are asked for."""
    ends = {id(skeleton.get_input_embeddings()), id(skeleton.get_output_embeddings())}
    tied = getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False)
    found = {}
    for name, module in skeleton.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D)
        is_end = id(module) in ends
        if (linear and not is_end) or (embeddings and is_end and not (tied and linear)):
            found[name] = module
    return found


def _decomposed(
    tuned: StoredWeights,
    own: StoredWeights,
    layers: dict[str, nn.Module],
    rank: int | None,
    energy: float | None,
    progress: Progress | None,
) -> Extracted:
    """Compute the nearest update to the change of each layer's weight.

    Raises:
        AdapterError: None changed.
    """
    found, unchanged = Extracted(), []
    for number, name in enumerate(own, 1):
        if progress is not None:
            progress(number, len(own.places))
        if name not in tuned.places:
            continue
        before, after = own.read(name), tuned.read(name)
        layer = name.removesuffix(".weight")
        if torch.equal(before.float(), after.float()):
            unchanged += [layer] if layer in layers else []
        elif layer in layers and name.endswith(".weight"):
            _add_layer(found, layer, layers[layer], after.float() - before.float(), rank, energy)
        else:
            found.lost.append(name)
    if not found.ranks:
        raise AdapterError(
            "no layer of the two models differs, so there is nothing to extract", "give the trained model first"
        )
    kinds = {name.rpartition(".")[2] for name in found.ranks}
    for name in unchanged:  # a file must have every layer of the kinds that it adapts
        if name.rpartition(".")[2] in kinds:
            shape = own.shapes[f"{name}.weight"]
            _add_layer(found, name, layers[name], torch.zeros(shape), rank or 1, None)
    return found


def _add_layer(
    found: Extracted, name: str, layer: nn.Module, change: Tensor, rank: int | None, energy: float | None
) -> None:
    """Add the nearest update of low rank to a change of a layer's weight.

    Args:
        found: The parts so far.
        name: The layer's name.
        layer: The layer.
        change: ΔW in the layout of the layer's weight.
        rank: The rank.
        energy: Instead of ``rank``: the share of ‖ΔW‖² to keep.
    """
    embedding = isinstance(layer, nn.Embedding)
    matrix = change.T if embedding or isinstance(layer, Conv1D) else change
    parts, r = nearest_for_energy(matrix, energy) if energy is not None else (nearest(matrix, rank or 1), rank or 1)
    a, b = parts.truncated(r)
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for end, tensor in zip(ends, (a, b), strict=True):
        found.tensors[f"{PREFIX}{name}.{end}"] = tensor.float().contiguous()
    whole = float(change.double().square().sum())
    found.ranks[name] = r
    found.kept[name] = float(parts.values[:r].square().sum()) / whole if whole else 1.0


def _keep_norms(found: Extracted, tuned: StoredWeights, own: StoredWeights, skeleton: Any) -> None:
    """Save the modules whole that changed and have nothing but vectors."""
    modules = dict(skeleton.named_modules())
    vectors = {name.rpartition(".")[0] for name in own if len(own.shapes[name]) == 1}
    small = {name for name in vectors if all(p.ndim == 1 for p in modules[name].parameters())}
    found.whole = {name.rpartition(".")[0] for name in found.lost} & small
    for name in found.whole:
        for key in modules[name].state_dict():
            found.tensors[f"{PREFIX}{name}.{key}"] = tuned.read(f"{name}.{key}").float().contiguous()
    found.lost = [name for name in found.lost if name.rpartition(".")[0] not in found.whole]


def _settings(found: Extracted, layers: dict[str, nn.Module], config: Any, base: str) -> PeftConfig:
    """Return the settings of the adapter: its kinds of layers, or single names where only some of a kind are adapted."""
    kinds = {name.rpartition(".")[2] for name in found.ranks}
    missing = [name for name in layers if name.rpartition(".")[2] in kinds and name not in found.ranks]
    source = find_source(base)
    tied = any(isinstance(layers[name], nn.Embedding) for name in found.ranks) and getattr(
        config.get_text_config(), "tie_word_embeddings", False
    )
    settings = LoraConfig(
        r=max(found.ranks.values()),
        target_modules=sorted(found.ranks) if missing else sorted(kinds),
        modules_to_save=sorted(found.whole) or None,  # by their full names: a short one means all that end so
        ensure_weight_tying=bool(tied),
        task_type=_task(config),
        base_model_name_or_path=source.name,
        inference_mode=True,
    )
    return with_ranks(settings, found.ranks)


def _task(config: Any) -> TaskType | None:
    """Return the task of a model by the end of its class's name; None for a model without a head."""
    name = (config.architectures or [""])[0]
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _fingerprint(skeleton: Any, own: StoredWeights) -> dict[str, Any] | None:
    """Return the fingerprint of the base, for which the sampled weights are read."""
    for name in sampled_names(skeleton):
        if name in own.places:
            layer, _, parameter = name.rpartition(".")
            setattr(skeleton.get_submodule(layer), parameter, nn.Parameter(own.read(name), requires_grad=False))
    return fingerprint(skeleton)


def _tell(found: Extracted) -> None:
    """Log what the adapter holds, and warn of what it cannot hold."""
    worst = min(found.kept, key=lambda name: found.kept[name])
    ranks = sorted(set(found.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    info(f"{len(found.ranks)} layers of rank {span}; the worst, {worst}, keeps {found.kept[worst]:.2%} of the energy")
    if found.whole:
        info(f"saved whole, since they are no matrices: {_some(sorted(found.whole))}")
    if found.lost:
        warn(f"changed, but not in the adapter: {_some(found.lost)}; --embeddings adds the embedding and the head")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
