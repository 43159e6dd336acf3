"""Tables of a measured machine, for people, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorakeet.cli.bench.products import KINDS
from lorakeet.cli.bench.runs import FORMATS

#: Share by which another choice must be faster than the default to be named: less is noise.
NOISE = 0.03
#: The same for one product. It takes a millisecond, and two runs of the same one differed by 5 %.
PRODUCT_NOISE = 0.1


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Return the fastest settings (``best``), and what the defaults choose worse (``disagreements``).

    Args:
        found: ``products`` and ``runs``, as the command measures them.
    """
    ours = {row["format"]: row for row in found["runs"] if row["format"] in FORMATS}
    best = max((name for name in ours if name != "auto"), key=lambda name: ours[name]["train"], default=None)
    wrong = [*_formats(ours), *_back_ends(found["products"])]
    return {"best": {"base": FORMATS[best]} if best else {}, "disagreements": wrong}


def _formats(ours: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence if the format that ``auto`` is, fp32, is not the faster one for training, or its storage slows it."""
    auto, fp32, bf16 = (ours.get(name) for name in ("auto", "fp32", "bf16"))
    if auto and fp32 and auto.get("stored_bits") and fp32["train"] > (1 + NOISE) * auto["train"]:
        yield f"auto keeps 16 bits, but fp32 trains at {fp32['train']:.0f} tokens/s instead of {auto['train']:.0f}"
    if fp32 and bf16 and bf16["train"] > (1 + NOISE) * fp32["train"]:
        yield f"auto is fp32, but bf16 trains at {bf16['train']:.0f} tokens/s instead of {fp32['train']:.0f}"


def _back_ends(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each shape on which the chosen 8-bit products, the first listed, are not the fastest."""
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        here = [row for row in rows if tuple(row["shape"]) == shape and row["product"].startswith("int8 ")]
        for way in ("forward", "backward"):
            fastest = max(here, key=lambda row: row[way], default=None)
            if fastest is not None and fastest[way] > (1 + PRODUCT_NOISE) * here[0][way]:
                yield (
                    f"{here[0]['product']} is chosen, but {fastest['product']} is faster {way} at {_size(shape)}: "
                    f"{fastest[way]:.0f} instead of {here[0][way]:.0f} GFLOP/s"
                )


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines to print: the machine, its products, training and writing, the best settings."""
    yield from (f"{name:<20}{value}" for name, value in found["machine"].items())
    yield ""
    yield from _product_table(found["peaks"], found["products"])
    yield ""
    yield "| number format | training, tokens/s | writing, tokens/s |"
    yield "| --- | --- | --- |"
    for row in found["runs"]:
        stored = f", weights in {row['stored_bits']} bits" if "stored_bits" in row else ""
        written = "–" if row["write"] is None else format(row["write"], ".0f")
        yield f"| {row['format']}{stored} | {row['train']:.0f} | {written} |"
    yield ""
    best = ", ".join(f"{key}: {value}" for key, value in found["best"].get("base", {}).items())
    yield f"base: {{{best}}}"
    yield from found["disagreements"] or ["the defaults agree with this table"]


def _product_table(peaks: dict[str, float], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| product | tokens × in × out | forward, GFLOP/s | backward, GFLOP/s |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        kinds = KINDS.get(row["product"], (None, None))
        shown = [
            _of_peak(row[way], peaks.get(kind or "")) for way, kind in zip(("forward", "backward"), kinds, strict=True)
        ]
        yield f"| {row['product']} | {_size(row['shape'])} | {shown[0]} | {shown[1]} |"
    for name, rate in peaks.items():
        yield f"| peak of {name}, in registers | | {rate:.0f} | {rate:.0f} |"


def _of_peak(rate: float, peak: float | None) -> str:
    return f"{rate:.0f}" if peak is None else f"{rate:.0f} ({100 * rate / peak:.0f} %)"


def _size(shape: Any) -> str:
    return " × ".join(map(str, shape))
