"""What is in an adapter: settings, layers, size, how much it changes, whether it learned, and who can load it.

Reads the adapter's files only; no base model is needed, and no update matrix is ever formed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import Tensor

from lorakeet.adapter.compatibility import readers
from lorakeet.adapter.serialization import broken, never_learned, read_notes, read_tensors
from lorakeet.adapter.tensor_names import PREFIX
from lorakeet.lora.config import PeftConfig
from lorakeet.lora.targeting import Target, matches, planned

_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)")


def inspect_adapter(name: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> dict[str, Any]:
    """Everything that the files of the adapter ``name`` (folder or hub id) say, as values that JSON can hold.

    Keys: ``adapter``, ``base_model``, ``architecture``, ``settings``, ``parameters``, ``bytes``, ``dtypes`` (parameters
    by dtype), ``layers`` (one entry each), ``kinds`` (the same, summed up by layer kind), ``trained_whole`` (tensors
    beside the pairs), ``learned``, ``dead_layers``, ``finite``, ``problems``, ``readers`` and ``lorakeet`` (our own
    file's content). ``update_norm`` is ‖s·BA‖_F, None where it is not finite.

    Raises:
        AdapterError: no such adapter; a pickle; a damaged file.
        ConfigError: its settings are not understood.
    """
    place = {"revision": revision, "subfolder": subfolder}
    config = PeftConfig.from_pretrained(name, **place)
    tensors = read_tensors(name, **place)
    notes = read_notes(name, **place)
    pairs, others = _pairs(tensors)
    said_of = _settings(pairs, config)
    layers = [_layer(layer, parts, said_of[layer], config) for layer, parts in sorted(pairs.items()) if _whole(parts)]
    problems = [
        said for layer, parts in sorted(pairs.items()) if (said := _problem(layer, parts, said_of[layer], config))
    ]
    problems += [said] if (said := broken(tensors)) else []
    learned = not never_learned(tensors)
    refused = [*problems, *([] if learned else ["it never learned"])]
    architecture = ((notes.get("base") or {}).get("fingerprint") or {}).get("architecture")
    return {
        "adapter": str(name),
        "base_model": config.base_model_name_or_path,
        "architecture": architecture,
        "settings": {key: value for key, value in config.to_dict().items() if key in type(config).model_fields},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": _dtypes(tensors),
        "layers": layers,
        "kinds": _kinds(layers),
        "trained_whole": others,
        "learned": learned,
        "dead_layers": [layer["name"] for layer in layers if layer["dead"]],
        "finite": not broken(tensors),
        "problems": problems,
        "readers": readers(config, tensors, {layer["r"] for layer in layers}, base=architecture, problems=refused),
        "lorakeet": notes,
    }


def update_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """‖s·BA‖_F = s·√tr((BᵀB)(AAᵀ)) of A [r, in] and B [out, r]: two r×r products in fp64, never [out, in]."""
    a, b = lora_A.double(), lora_B.double()
    return scaling * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """(layer -> its tensors ``A``, ``B`` and ``bias``, names of all other tensors)."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        if found := _PART.fullmatch(key.removeprefix(PREFIX)):
            part = found["part"].removeprefix("embedding_").removesuffix(".weight").replace("B.bias", "bias")
            pairs.setdefault(found["layer"], {})[part] = tensor
        else:
            others.append(key.removeprefix(PREFIX))
    return pairs, sorted(others)


def _whole(parts: Mapping[str, Tensor]) -> bool:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or a.ndim != b.ndim or a.ndim < 2 or not a.numel() or not b.numel():
        return False
    return a.shape[0] == b.shape[1] if a.ndim == 2 else a.shape[0] % b.shape[1] == 0  # a convolution may have groups


def _settings(pairs: Mapping[str, Mapping[str, Tensor]], config: PeftConfig) -> dict[str, Target]:
    """What the settings say of each layer.

    The file does not name an adapted parameter, only the module that owns it, once for each of its parameters: they are
    told apart by their ranks, which must leave the same number of experts.
    """
    said: dict[str, Target] = {}
    owners: dict[str, list[str]] = {}
    for name in pairs:
        if not config.target_parameters or matches(name, config.target_modules or []):
            said[name] = planned(name, config)
        else:
            owners.setdefault(name.replace(".base_layer", ""), []).append(name)
    for owner, names in owners.items():
        full = [(f"{owner}.{key.rpartition('.')[2]}", key) for key in config.target_parameters or ()]
        choices = [planned(name, config) for name, key in full if matches(name, [key])]
        rows = [len(pairs[name].get("A", ())) for name in names]
        orders = list(permutations(choices, len(names))) or [tuple(planned(name, config) for name in names)]
        said |= zip(names, next((o for o in orders if _one_count(rows, o)), orders[0]), strict=True)
    return said


def _one_count(rows: list[int], order: tuple[Target, ...]) -> bool:
    whole = all(n % target.r == 0 for n, target in zip(rows, order, strict=True))
    return whole and len({n // target.r for n, target in zip(rows, order, strict=True)}) == 1


def _blocks(a: Tensor, b: Tensor, r: int) -> list[tuple[Tensor, Tensor]]:
    """The pairs [r, in], [out, r] that multiply with one another: one, or one for each group or expert."""
    a, b = a.flatten(1), b.flatten(1)
    if groups := len(a) // b.shape[1] - 1:
        return list(zip(a.chunk(groups + 1), b.chunk(groups + 1), strict=True))
    experts = len(a) // r
    return list(zip(a.chunk(experts), (b[:, e::experts] for e in range(experts)), strict=True))


def _problem(name: str, parts: Mapping[str, Tensor], said: Target, config: PeftConfig) -> str | None:
    """What will keep this layer from being loaded."""
    if missing := [part for part in ("A", "B") if part not in parts]:
        return f"{name} has no {' and no '.join(missing)}"
    shapes = f"A {list(parts['A'].shape)} and B {list(parts['B'].shape)}"
    if not _whole(parts):
        return f"{name} has {shapes}, which do not multiply"
    r = said.r
    several = bool(config.target_parameters) and len(parts["A"]) % r == 0  # the ranks of all experts
    return None if len(parts["A"]) == r or several else f"{name} has {shapes}, but the settings say rank {r}"


def _layer(name: str, parts: Mapping[str, Tensor], said: Target, config: PeftConfig) -> dict[str, Any]:
    a, b = parts["A"], parts["B"]
    r = said.r if config.target_parameters and len(a) % said.r == 0 else len(a)
    scaling = config.scaling(r, said.alpha)
    norm = math.hypot(*(update_norm(*pair, scaling) for pair in _blocks(a, b, r)))
    return {
        "name": name,
        "kind": name.replace(".base_layer", "").rpartition(".")[2],
        "in": a.shape[1],
        "out": b.shape[0],
        "r": r,
        "alpha": said.alpha,
        "scaling": scaling,
        "parameters": sum(tensor.numel() for tensor in parts.values()),
        "update_norm": norm if math.isfinite(norm) else None,
        "dead": not (bool(a.any()) and bool(b.any())),
    }


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        name = str(tensor.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + tensor.numel()
    return counts


def _kinds(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One summary for each kind of layer (the last part of its name), in the order of their names."""
    summaries = []
    for kind in sorted({layer["kind"] for layer in layers}):
        same = [layer for layer in layers if layer["kind"] == kind]
        norms = [layer["update_norm"] for layer in same if layer["update_norm"] is not None]
        summaries.append(
            {
                "kind": kind,
                "layers": len(same),
                "r": sorted({layer["r"] for layer in same}),
                "scaling": sorted({layer["scaling"] for layer in same}),
                "shapes": sorted({f"{layer['in']}→{layer['out']}" for layer in same}),
                "parameters": sum(layer["parameters"] for layer in same),
                "update_norm_mean": sum(norms) / len(norms) if norms else None,
                "update_norm_min": min(norms, default=None),
                "update_norm_max": max(norms, default=None),
                "dead": sum(layer["dead"] for layer in same),
            }
        )
    return summaries


# -- for people -----------------------------------------------------------------------------------------------------

#: Names shown of a longer list.
SHOWN = 5
#: Keys of lorakeet.json that are no notes.
OWN = ("format", "lorakeet", "base")


def inspection_text(info: Mapping[str, Any]) -> str:
    """What :func:`inspect_adapter` found, as a text of several lines."""
    settings, notes = info["settings"], info["lorakeet"]
    targets = settings["target_modules"]
    said = ["r", "lora_alpha", "lora_dropout", "bias"]
    said += [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if settings[key]]
    rows = {
        "adapter": info["adapter"],
        "base": (info["base_model"] or "not named") + (f" ({info['architecture']})" if info["architecture"] else ""),
        "task": settings["task_type"] or "not said",
        "settings": ", ".join(f"{key}={settings[key]}" for key in said),
        "targets": targets if isinstance(targets, str) else ", ".join(targets or ["not said"]),
        "size": f"{info['parameters']:,} parameters, {info['bytes'] / 1e6:,.2f} MB, {', '.join(info['dtypes'])}",
        "also holds": _some(info["trained_whole"]),
        "learned": _learned(info),
        "problems": "; ".join(info["problems"]),
        "made with": f"lorakeet {notes['lorakeet']}" if notes.get("lorakeet") else "",
        "notes": _notes(notes),
    }
    rows = {key: wrap(value, 108, break_long_words=False, break_on_hyphens=False) for key, value in rows.items()}
    lines = [f"{'' if n else key:<12}{line}" for key, parts in rows.items() for n, line in enumerate(parts)]
    if info["kinds"]:
        lines += ["", *_aligned([_HEAD, *(_row(kind) for kind in info["kinds"])])]
    lines += ["", "who can load it"]
    for tool, answer in info["readers"].items():
        why = "; ".join(answer["why"])
        lines.append(f"  {tool:<10}" + ("yes" if answer["can"] else "no") + (f" ({why})" if why else ""))
    return "\n".join(lines)


def _notes(notes: Mapping[str, Any]) -> str:
    """The single values of lorakeet.json, on one line."""
    single = {key: value for key, value in notes.items() if key not in OWN and isinstance(value, str | int | float)}
    return ", ".join(
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in single.items()
    )


def _learned(info: Mapping[str, Any]) -> str:
    if not info["learned"]:
        return "NO: every layer has an A or a B of zeros, so the adapter changes nothing"
    dead = info["dead_layers"]
    return f"yes, but {len(dead)} of {len(info['layers'])} layers are all zero: {_some(dead)}" if dead else "yes"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


_HEAD = ("layer", "count", "rank", "in→out", "parameters", "‖ΔW‖ mean", "smallest", "largest", "all zero")


def _row(kind: Mapping[str, Any]) -> tuple[str, ...]:
    norms = (kind["update_norm_mean"], kind["update_norm_min"], kind["update_norm_max"])
    return (
        kind["kind"],
        str(kind["layers"]),
        ", ".join(map(str, kind["r"])),
        ", ".join(kind["shapes"]),
        f"{kind['parameters']:,}",
        *("not finite" if norm is None else f"{norm:.4g}" for norm in norms),
        str(kind["dead"]),
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
