"""Resize an adapter: the nearest update of a lower rank in each layer, saved as an adapter of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorakeet.adapter.inspect import SavedLayer
from lorakeet.adapter.model_card import CARD_NAME, write_card
from lorakeet.adapter.serialization import OWN_NAME, WEIGHTS_NAME, read_notes
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.errors import AdapterError
from lorakeet.files import write_folder, write_json
from lorakeet.lora.algebra.blocks import join_blocks, split_blocks
from lorakeet.lora.algebra.decomposition import decompose
from lorakeet.lora.algebra.settings import with_ranks
from lorakeet.lora.config import CONFIG_NAME, PeftConfig
from lorakeet.lora.lifecycle.adapter_files import adapter_folder, find_adapter_file
from lorakeet.rank.report import read_layers, spectrum_of
from lorakeet.security.paths import file_problem, is_dir, is_file

#: Ends of the keys of A and B in an adapter's file: of linear layers and convolutions, of embeddings.
_ENDS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def resize(
    name: str | Path, out: Path, *, rank: int | None = None, energy: float | None = None, **where: Any
) -> dict[str, Any]:
    """Write the nearest adapter of lower rank into ``out``; other files of the adapter (tokenizer, template) come along.

    ΔW of each layer is replaced by its truncated singular value decomposition. No other matrix of that rank is nearer, in
    the Frobenius and the spectral norm (Eckart and Young 1936). The new s is 1. No layer gets a higher rank than it has.

    Args:
        name: Folder or hub id of the adapter.
        out: Folder to write, whole or not at all.
        rank: The rank of every layer.
        energy: Instead of ``rank``: the share of ‖ΔW‖² that each layer keeps; ranks differ then (``rank_pattern``).
        where: See :func:`lorakeet.lora.lifecycle.adapter_files.find_adapter_file`.

    Returns:
        ``{"path", "ranks", "parameters_before", "parameters_after", "energy_kept"}``: the rank of each layer, parameters of
        A and B, and the smallest share of the energy that a layer keeps.

    Raises:
        AdapterError: The adapter cannot be read, is no plain LoRA, or ties the adapters of layers.
        OutputError: ``out`` cannot be written.
    """
    config, tensors, layers = read_layers(name, **where)
    _check_plain(name, config)
    ranks, kept = {}, []
    resized = dict(tensors)
    for layer in layers:
        spectrum = spectrum_of(layer)
        groups = 1 if layer.stacks_experts else len(spectrum.blocks)
        wanted = spectrum.rank_for(energy) * groups if energy is not None else rank or layer.rank
        r = ranks[layer.target.name] = max(groups, min(wanted, layer.rank) // groups * groups)
        kept.append(spectrum.energy_kept[r // groups - 1])
        resized |= _truncated(layer, r, tensors)
    new = with_ranks(config, ranks)
    notes = {**read_notes(name, **where), "resized": {"from": config.r, "energy_kept": min(kept)}}
    write_made(out, name, new, resized, notes)
    return {
        "path": str(out),
        "ranks": ranks,
        "parameters_before": sum(t.numel() for layer in layers for t in factors(layer, tensors).values()),
        "parameters_after": sum(t.numel() for layer in layers for t in factors(layer, resized).values()),
        "energy_kept": min(kept),
    }


def write_made(
    out: Path, first: str | Path, config: PeftConfig, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write an adapter that was made from others, whole or not at all.

    Args:
        out: Folder to write.
        first: The adapter whose further files (tokenizer, template) come along.
        config: Its settings.
        tensors: Its tensors by their keys in the file.
        notes: Contents of ``lorakeet.json``.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    with write_folder(out) as aside:
        copy_others(first, aside)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(aside)
        write_json(aside / OWN_NAME, notes)
        write_card(aside, config, notes)


def _check_plain(name: str | Path, config: PeftConfig) -> None:
    """Refuse what a lower rank would break.

    Raises:
        AdapterError: The adapter is no plain LoRA, or ties layers.
    """
    if config.variant_settings:
        raise AdapterError(f"adapter {str(name)!r} is {config.variant.name}, expected plain LoRA", "merge it instead")
    if config.ensure_weight_tying:
        raise AdapterError(
            f"adapter {str(name)!r} ties the adapters of embedding and head, which a truncation would part",
            "train it with a lower r",
        )


def factors(layer: SavedLayer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return A and B of a layer by their keys in the file."""
    prefix = next(
        key
        for key in (f"{PREFIX}{layer.name}.", f"{layer.name}.")
        if f"{key}{_ENDS[0][0]}" in tensors or f"{key}{_ENDS[1][0]}" in tensors
    )
    ends = _ENDS[0] if prefix + _ENDS[0][0] in tensors else _ENDS[1]
    return {prefix + end: tensors[prefix + end] for end in ends}


def _truncated(layer: SavedLayer, r: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer at rank r, by their keys in the file."""
    (key_a, a), (key_b, b) = factors(layer, tensors).items()
    blocks = [decompose(*block, layer.scaling) for block in split_blocks(a, b, layer.rank)]
    each = r if layer.stacks_experts else r // len(blocks)
    changed = dict(zip((key_a, key_b), join_blocks([block.truncated(each) for block in blocks], a, b), strict=True))
    bias = key_b.replace("lora_B.weight", "lora_B.bias")
    if bias in tensors and bias != key_b:  # scaled by s as B·A is
        changed[bias] = tensors[bias] * layer.scaling
    return changed


def copy_others(name: str | Path, aside: Path) -> None:
    """Copy the further files of an adapter, such as its tokenizer; of a hub id those that Lorakeet wrote.

    Raises:
        AdapterError: One of them is a link that leads out of the folder.
    """
    folder = adapter_folder(name)
    written = (WEIGHTS_NAME, CONFIG_NAME, OWN_NAME, CARD_NAME)
    for path in folder.iterdir() if is_dir(folder) else ():
        if is_file(path) and path.name not in written and path.suffix in (".json", ".jinja", ".txt", ".model"):
            if problem := file_problem(folder, path.name):
                raise AdapterError(f"{folder} is refused: {problem}", "copy the file itself into the folder")
            (aside / path.name).write_bytes(path.read_bytes())
    for own in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if not is_dir(folder) and (file := find_adapter_file(name, own)) is not None:
            (aside / own).write_bytes(file.read_bytes())
