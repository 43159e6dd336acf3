"""Report on the rank of an adapter: singular values, effective ranks, what each rank keeps, and the rank to choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from lorakeet.adapter.inspect import SavedLayer, saved_layers
from lorakeet.adapter.serialization import read_tensors
from lorakeet.adapter.tensor_checks import nonfinite_error
from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.lora.algebra.blocks import split_blocks
from lorakeet.lora.algebra.spectrum import Spectrum, singular_values
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.initialization.requirements import residual_error
from lorakeet.lora.initialization.taken_part import takes_part
from lorakeet.lora.targeting import layer_index

#: Share of the energy ‖ΔW‖² of each layer that an advised rank keeps.
ENERGY = 0.99
#: A layer whose ‖ΔW‖ is below this share of the median layer's learned next to nothing.
LITTLE = 0.01
#: Columns of the table of layers.
_COLUMNS = ("layer", "count", "rank", "rank needed", "median", "effective rank", "‖ΔW‖ mean", "learned nothing")


def read_layers(name: str | Path, **where: Any) -> tuple[PeftConfig, dict[str, Any], list[SavedLayer]]:
    """Read an adapter's settings, its tensors, and the layers that they belong to.

    Args:
        name: Folder or hub id of the adapter.
        where: See :func:`lorakeet.lora.lifecycle.adapter_files.find_adapter_file`.

    Raises:
        AdapterError: There is no such adapter, it is damaged, has NaN or infinite values, or no layer has A and B.
    """
    config = PeftConfig.from_pretrained(name, **where)
    if takes_part(config.init_lora_weights):
        raise AdapterError(
            f"adapter {str(name)!r} {residual_error(config)}", "the adapter of a run is plain LoRA already"
        )
    tensors = read_tensors(name, **where)
    layers, _ = saved_layers(tensors, config)
    if problem := next((error for layer in layers if (error := layer.error())), nonfinite_error(tensors)):
        raise AdapterError(f"adapter {str(name)!r} cannot be used: {problem}", "train or save it again")
    if not layers:
        raise AdapterError(f"adapter {str(name)!r} adapts no layer, so it has no update", "give an adapter of LoRA")
    return config, tensors, layers


def spectrum_of(layer: SavedLayer) -> Spectrum:
    """Compute the singular values of a layer's update."""
    blocks = split_blocks(*layer.pair(), layer.rank)
    return Spectrum(tuple(tuple(singular_values(a, b, layer.scaling)) for a, b in blocks))


def rank_report(name: str | Path, energy: float = ENERGY, **where: Any) -> dict[str, Any]:
    """Return singular values and advice as values for JSON; reads the adapter's files only.

    - ``adapter``, ``base_model``, ``energy``: names, and the share of each layer's energy to keep.
    - ``layers``: one entry each. ``layer`` is its number; ``singular_values`` are those of its largest matrix;
      ``update_norm`` is ‖ΔW‖; ``energy_kept`` is at rank 1, 2, …; ``learned`` is "yes", "little" or "nothing".
    - ``kinds``: the same, summed up by the last part of the layer's name.
    - ``ranks``: smallest, median and largest ``rank_needed``.
    - ``parameters``, ``parameters_needed``: of A and B, now and at the ranks needed.

    Args:
        name: Folder or hub id of the adapter.
        energy: Share of ‖ΔW‖² to keep in each layer, above 0, at most 1.
        where: See :func:`lorakeet.lora.lifecycle.adapter_files.find_adapter_file`.

    Raises:
        AdapterError: See :func:`read_layers`.
    """
    config, _, layers = read_layers(name, **where)
    if config.use_dora:
        warn("this is a DoRA adapter: the ranks are those of s·B·A, to which its magnitudes add a change of any rank")
    found = [_entry(layer, spectrum_of(layer), energy, config) for layer in layers]
    middle = median(entry["update_norm"] for entry in found)
    for entry in found:
        norm = entry["update_norm"]
        entry["learned"] = "nothing" if not norm else "little" if norm < LITTLE * middle else "yes"
    needed = [entry["rank_needed"] for entry in found]
    return {
        "adapter": str(name),
        "base_model": config.base_model_name_or_path,
        "energy": energy,
        "layers": found,
        "kinds": _by_kind(found),
        "ranks": {"smallest": min(needed), "median": median(needed), "largest": max(needed)},
        "parameters": sum(entry["parameters"] for entry in found),
        "parameters_needed": sum(entry["parameters"] * entry["rank_needed"] // entry["r"] for entry in found),
    }


def _entry(layer: SavedLayer, spectrum: Spectrum, energy: float, config: PeftConfig) -> dict[str, Any]:
    a, b = layer.tensors["A"], layer.tensors["B"]
    blocks = len(spectrum.blocks)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "layer": layer_index(layer.name, config),
        "r": layer.rank,
        "in": a.shape[1],
        "out": b.shape[0],
        "parameters": a.numel() + b.numel(),
        "scaling": layer.scaling,
        "singular_values": list(max(spectrum.blocks, key=sum)),
        "update_norm": spectrum.norm,
        "effective_rank": spectrum.effective_rank,
        "energy_kept": spectrum.energy_kept,
        "rank_needed": spectrum.rank_for(energy) * (1 if layer.stacks_experts else blocks),
    }


def _by_kind(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarize the layers by the last part of their names."""
    kinds = []
    for kind in sorted({layer["kind"] for layer in layers}):
        same = [layer for layer in layers if layer["kind"] == kind]
        needed = [layer["rank_needed"] for layer in same]
        kinds.append(
            {
                "kind": kind,
                "layers": len(same),
                "r": sorted({layer["r"] for layer in same}),
                "rank_needed": [min(needed), median(needed), max(needed)],
                "effective_rank_mean": sum(layer["effective_rank"] for layer in same) / len(same),
                "update_norm_mean": sum(layer["update_norm"] for layer in same) / len(same),
                "learned_nothing": sum(layer["learned"] == "nothing" for layer in same),
            }
        )
    return kinds


def rank_text(report: Mapping[str, Any]) -> str:
    """Format a report of :func:`rank_report` as a table and the advice."""
    rows = [_COLUMNS, *(_row(kind) for kind in report["kinds"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([*lines, "", *_advice(report)])


def _row(kind: Mapping[str, Any]) -> tuple[str, ...]:
    low, middle, high = kind["rank_needed"]
    return (
        kind["kind"],
        str(kind["layers"]),
        _span(kind["r"]),
        _span([low, high]),
        f"{middle:g}",
        f"{kind['effective_rank_mean']:.1f}",
        f"{kind['update_norm_mean']:.3g}",
        str(kind["learned_nothing"] or ""),
    )


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _advice(report: Mapping[str, Any]) -> Iterator[str]:
    ranks, energy = report["ranks"], report["energy"]
    before, after = report["parameters"], report["parameters_needed"]
    yield (
        f"{energy:.4g} of each layer's energy: rank {_span([ranks['smallest'], ranks['largest']])}, "
        f"median {ranks['median']:g}"
    )
    yield f"parameters of A and B: {before:,} now, {after:,} then ({1 - after / before:.0%} saved)"
    for degree in ("nothing", "little"):
        if names := [layer["name"] for layer in report["layers"] if layer["learned"] == degree]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"{len(names)} layers learned {degree}: {', '.join(names[:3])}{more}"
    if after < before:
        yield f"shrink it: lorakeet rank {report['adapter']} --energy {energy:g} --out FOLDER"
