"""Text of a comparison of two adapters, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Columns of the table of kinds: heading, key and format of the figure.
_COLUMNS = (
    ("layer", "kind", ""),
    ("count", "layers", ""),
    ("cosine", "cosine", "+.3f"),
    ("column overlap", "column_overlap", ".1%"),
    ("row overlap", "row_overlap", ".1%"),
    ("by chance", "chance", ".1%"),
    ("shared energy", "shared_energy", ".1%"),
    ("sign conflicts", "sign_conflicts", ".1%"),
    ("cancelled", "cancelled", ".1%"),
)


def comparison_text(report: Mapping[str, Any]) -> str:
    """Format a report of :func:`lorakeet.api.compare_adapters` as tables and sentences."""
    rows = [[heading for heading, _, _ in _COLUMNS]]
    for kind in report["kinds"]:
        rows.append(["-" if kind[key] is None else format(kind[key], form) for _, key, form in _COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([*lines, "", *_whole(report), *_data(report), *_completions(report)])


def _whole(report: Mapping[str, Any]) -> Iterator[str]:
    (one, other), norms = report["adapters"], report["norms"]
    cosine = "no angle" if report["cosine"] is None else f"cosine {report['cosine']:+.3f}"
    yield f"‖ΔW‖ {norms[0]:.4g} ({one}) and {norms[1]:.4g} ({other}), difference {report['difference_norm']:.4g}, {cosine}"
    for name, layers in zip((one, other), report["only_in"], strict=True):
        if layers:
            yield f"{len(layers)} layers only in {name}, such as {layers[0]}"


def _data(report: Mapping[str, Any]) -> Iterator[str]:
    if not (data := report.get("data")):
        return
    yield ""
    yield f"{data['rows']:,} rows, {data['tokens']:,} tokens in the loss; KL in nats per token"
    for name, loss in data["loss"].items():
        kl = data["kl_to_base"].get(name)
        yield f"  loss {loss:.4f}" + (f"   KL to the base {kl:.4f}" if kl is not None else "         ") + f"   {name}"
    between = data["kl_between"]
    yield f"  KL between the adapters {between[0]:.4f} and {between[1]:.4f} (the other way)"
    for win in data["wins"]:
        low, high = win["interval"]
        share = f"{win['rate']:.1%} of the rows (95 %: {low:.1%} to {high:.1%})"
        yield f"  {win['winner']} has a lower loss than {win['loser']} in {share}"
    low, high = data["loss_difference"]["interval"]
    mean = data["loss_difference"]["mean"]
    yield f"  loss of the second minus the first: {mean:+.4f} (95 %: {low:+.4f} to {high:+.4f})"


def _completions(report: Mapping[str, Any]) -> Iterator[str]:
    for entry in report.get("completions") or ():
        yield ""
        yield f"prompt: {entry['prompt']}"
        for name, text in entry["texts"].items():
            yield f"  [{name}] {' '.join(text.split())}"
