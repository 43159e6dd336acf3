"""Text of an inspection, for people."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from lorakeet.lora.variants import variant_settings

#: Names shown of a longer list.
SHOWN = 5
#: Keys of lorakeet.json that are not shown as notes.
OWN = ("format", "lorakeet", "base")
#: Columns of the table of layers.
_COLUMNS = ("layer", "count", "rank", "in→out", "parameters", "‖ΔW‖ mean", "smallest", "largest", "all zero")
#: Characters. Width of the first column, and of a line of the second.
_LABEL, _LINE = 12, 108


def inspection_text(info: Mapping[str, Any]) -> str:
    """Format the result of :func:`~lorakeet.adapter.inspect.inspect_adapter` as several lines."""
    lines = []
    for label, value in _facts(info).items():
        for number, line in enumerate(wrap(value, _LINE, break_long_words=False, break_on_hyphens=False)):
            lines.append(f"{'' if number else label:<{_LABEL}}{line}")
    if info["kinds"]:
        lines += ["", *_aligned([_COLUMNS, *(_row(kind) for kind in info["kinds"])])]
    lines += ["", "tools that can load it", *_answers(info["readers"])]
    return "\n".join([*lines, "", "lorakeet export --for", *_answers(info["exports"])])


def _answers(tools: Mapping[str, Any]) -> list[str]:
    """Return a line for each tool: whether it can, and why."""
    width = max(map(len, tools)) + 1
    reasons = {tool: "; ".join(answer["why"]) for tool, answer in tools.items()}
    return [
        f"  {tool:<{width}}" + ("yes" if answer["can"] else "no") + (f" ({reasons[tool]})" if reasons[tool] else "")
        for tool, answer in tools.items()
    ]


def _facts(info: Mapping[str, Any]) -> dict[str, str]:
    settings, notes = info["settings"], info["lorakeet"]
    return {
        "adapter": info["adapter"],
        "base": (info["base_model"] or "not named") + (f" ({info['architecture']})" if info["architecture"] else ""),
        "task": settings["task_type"] or "not given",
        "settings": _settings(settings),
        "targets": _targets(settings["target_modules"]),
        "size": f"{info['parameters']:,} parameters, {info['bytes'] / 1e6:,.2f} MB, {', '.join(info['dtypes'])}",
        "also holds": _some(info["trained_whole"]),
        "trained": _trained(info),
        "problems": "; ".join(info["problems"]),
        "made with": f"lorakeet {notes['lorakeet']}" if notes.get("lorakeet") else "",
        "notes": _notes(notes),
    }


def _settings(settings: Mapping[str, Any]) -> str:
    always = ("r", "lora_alpha", "lora_dropout", "bias")
    if_set = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if settings[key]]
    if isinstance(settings["init_lora_weights"], str):
        if_set.append("init_lora_weights")
    of_variant = [key for key, neutral in variant_settings().items() if settings.get(key, neutral) != neutral]
    return ", ".join(f"{key}={settings[key]}" for key in (*always, *if_set, *of_variant))


def _targets(targets: str | list[str] | None) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets or ["not given"])


def _notes(notes: Mapping[str, Any]) -> str:
    """Format the single values of lorakeet.json on one line."""
    single = {key: value for key, value in notes.items() if key not in OWN and isinstance(value, str | int | float)}
    return ", ".join(
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in single.items()
    )


def _trained(info: Mapping[str, Any]) -> str:
    if not info["learned"]:
        return "NO: in every layer A or B is all zero, so the adapter changes nothing"
    dead = info["dead_layers"]
    return f"yes, but {len(dead)} of {len(info['layers'])} layers are all zero: {_some(dead)}" if dead else "yes"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
