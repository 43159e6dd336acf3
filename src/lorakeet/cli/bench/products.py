"""Rates of the products on this CPU, in billions of multiplications and additions a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakeet.kernels.cpu import build, features, gemm, half
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import linear, registry
from lorakeet.kernels.int8.format import quantize_weight
from lorakeet.kernels.nf4 import format as nf4_format
from lorakeet.kernels.nf4 import linear as nf4

#: Tokens, inputs and outputs of a product: layers of a small base, its vocabulary, and a layer of a large base.
SHAPES = ((640, 576, 576), (640, 576, 1536), (640, 1536, 576))
LONG_SHAPES = ((640, 576, 49152), (512, 4096, 4096))
#: Kind of a loop in registers -> its number in ``peak.c``, and the feature of the processor that it needs.
PEAKS = {
    "fp32": (0, Feature.AVX2),
    "16 bits": (1, Feature.AVX2),
    "8 bits": (2, Feature.VNNI),
    "8 bits in tiles": (3, Feature.AMX),
}
#: Name of the fp32 product with a weight that is stored in 16 bits.
STORED = "fp32, weight in bf16"
#: Product -> the kind of its multiplications, forward and backward.
KINDS = {
    "fp32": ("fp32", "fp32"),
    STORED: ("fp32", "fp32"),
    "fp32 by torch": ("fp32", "fp32"),
    "NF4": ("fp32", "fp32"),
    "int8 pairs": ("16 bits", "16 bits"),
    "int8 vnni": ("16 bits", "8 bits"),
    "int8 amx": ("8 bits in tiles", "8 bits in tiles"),
}
#: Seconds that a product, or a peak, is repeated for; the fastest time counts.
SECONDS = 0.2


def measure_peaks() -> dict[str, float]:
    """Measure the rate of each kind of multiplication in registers alone, with all threads."""
    library, found = build.library(), {}
    for name, (kind, feature) in PEAKS.items():
        if library is not None and feature in features.detected():
            run = partial(library.lk_peak, kind, 100_000)
            found[name] = run() / fastest(run) / 1e9
    return found


def measure_products(short: bool = False) -> list[dict[str, Any]]:
    """Measure every product of this CPU, forward and backward, on a few shapes.

    Returns:
        For each product and shape: ``product``, ``shape``, ``forward``, ``backward``.
    """
    shapes = SHAPES if short else (*SHAPES, *LONG_SHAPES)
    return [row for shape in shapes for row in rates_of(shape)]


def rates_of(shape: tuple[int, int, int], seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Yield the rates of every product on a shape: tokens, inputs, outputs."""
    n, inner, out = shape
    operations = 2 * n * inner * out
    for name, (forward, backward) in contenders(n, inner, out).items():
        times = {way: fastest(run, seconds) for way, run in (("forward", forward), ("backward", backward))}
        rates = {way: operations / each / 1e9 for way, each in times.items()}
        yield {"product": name, "shape": list(shape), **rates}


def contenders(n: int, inner: int, out: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return the products of this CPU, forward and backward, ready to run."""
    draw = torch.Generator().manual_seed(0)
    x, g, weight = (torch.randn(*size, generator=draw) for size in ((n, inner), (n, out), (out, inner)))
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    found["fp32 by torch"] = (lambda: x @ weight.T), (lambda: g @ weight)
    if features.has_bf16():
        narrow = x.bfloat16(), g.bfloat16(), weight.bfloat16()
        found["bf16 by torch"] = (lambda: narrow[0] @ narrow[2].T), (lambda: narrow[1] @ narrow[2])
    if features.has(Feature.AVX2):
        found["fp32"] = (lambda: gemm.gemm_f32(x, weight.T)), (lambda: gemm.gemm_f32(g, weight))
        stored = weight.bfloat16()
        found[STORED] = (lambda: half.gemm_half(x, stored.T)), (lambda: half.gemm_half(g, stored))
    codes, scale = quantize_weight(weight)
    for one in registry.implementations():
        if one.requires <= features.available() and one.unavailable() is None and one.supports(x, codes):
            found[f"int8 {one.name}"] = _of_int8(one.name, x, g, codes, scale)
    if inner % nf4_format.BLOCK == 0:
        packed = nf4_format.quantize(weight)
        found["NF4"] = (lambda: nf4.product(x, packed)), (lambda: nf4.input_gradient(g, packed))
    return found


def _of_int8(
    name: str, x: Tensor, g: Tensor, codes: Tensor, scale: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def forward() -> Tensor:
        with registry.using(name):
            return linear.product(x, codes, scale)

    def backward() -> Tensor:
        with registry.using(name):
            return linear.input_gradient(g, codes, scale)

    return forward, backward


def fastest(run: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Return the shortest time of a call, after one that does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
