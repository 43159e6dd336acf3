"""Benchmarks on an NVIDIA GPU: the 8-bit layer beside bf16 and bitsandbytes, and training beside PEFT and TRL.

Usage::

    python benchmarks/gpu.py                                      # both parts
    python benchmarks/gpu.py --parts layer --peak 1979            # the card's dense int8 peak in TOP/s, for the share of it
    python benchmarks/gpu.py --parts training --shapes llama-8b   # one shape; see gpu_training.py
    python benchmarks/gpu.py --parts training --tiny --device cpu # does the script run?

The layer has 4096 tokens × 4096 × 4096 and × 11008, forward and backward with LoRA, r=16. Equal for all: the bf16 weight
before quantization, x with a few outlier columns, the incoming gradient, A and B in bf16, no dropout. One layer's output,
∂x, ∂A and ∂B are timed.

- "ms": median of CUDA events around many turns after a warm-up, over inputs that together exceed the L2 cache.
- "graph": the same work replayed from a CUDA graph, without launch overhead ("-" if it cannot be captured).
- "first s": the first call, with compilation and choice of tiles.
- Errors: ‖got − exact‖/‖exact‖ against fp64 with the bf16 weight.

It needs an idle GPU; without a GPU, the exit code is 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_training
from lorakeet.kernels.int8 import triton
from lorakeet.kernels.int8.format import quantize_rows
from lorakeet.kernels.int8.registry import best_on
from lorakeet.kernels.lora_linear import lora_linear
from lorakeet.quant.int8 import Int8Weight

#: Dense int8 TOP/s by the vendor's datasheet.
PEAKS = {"NVIDIA H200": 1979.0}
SCALING = 2.0
SETS = 4  # of inputs, used in turn
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(
    tokens: int, inner: int, out: int, rank: int, outliers: int
) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    """Draw the weight, and sets of (x, A, B) and of g.

    Args:
        tokens: Rows of x.
        inner: Input channels.
        out: Output channels.
        rank: Rank of A and B.
        outliers: Columns of x that are 30 times as large.

    Returns:
        The weight [out, in], the sets of leaves, and the sets of incoming gradients.
    """
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(out, inner, **kind) / inner**0.5
    a, b = torch.randn(rank, inner, **kind) / inner**0.5, torch.randn(out, rank, **kind) / rank**0.5
    columns, leaves, grads = torch.randperm(inner)[:outliers], [], []
    for _ in range(SETS):
        x = torch.randn(tokens, inner, **kind)
        x[:, columns] *= 30
        leaves.append([t.requires_grad_() for t in (x, a.clone(), b.clone())])
        grads.append(torch.randn(tokens, out, **kind))
    return weight, leaves, grads


def contenders(weight: Tensor) -> Iterator[tuple[str, Callable[[], Layer]]]:
    """Yield each name with a factory of its layer (x, A, B) -> h."""

    def with_lora(base: Callable[[Tensor], Tensor]) -> Layer:
        return lambda x, a, b: base(x) + F.linear(F.linear(x, a), b) * SCALING

    yield "bf16, cuBLAS", lambda: with_lora(lambda x: F.linear(x, weight))
    if importlib.util.find_spec("bitsandbytes"):
        for threshold in (6.0, 0.0):
            yield (
                f"bitsandbytes, threshold {threshold:.0f}",
                lambda t=threshold: with_lora(bitsandbytes_layer(weight, t)),
            )
    quantised, scale = quantize_rows(weight)
    yield "lorakeet", lambda: lambda x, a, b: lora_linear(x, Int8Weight(quantised, scale), None, a, b, SCALING)


def bitsandbytes_layer(weight: Tensor, threshold: float) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns at every call about a cast from bf16 to fp16
    out, inner = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(inner, out, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(weight.cpu().half(), has_fp16_weights=False, requires_grad=False)
    return layer.cuda()


def step(layer: Layer, leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    h = layer(*leaves)
    return h, *torch.autograd.grad(h, leaves, g)


def median_ms(work: Callable[[int], Any], turns: int) -> float:
    """Return the median milliseconds of ``work(turn)`` by CUDA events, after a fifth as many turns to warm up."""
    for turn in range(max(turns // 5, SETS)):
        work(turn)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(turns)]
    for turn, (begin, end) in enumerate(marks):
        begin.record()
        work(turn)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def graph_ms(work: Callable[[int], Any], turns: int) -> float | None:
    """Return the same from CUDA graphs, one for each set of inputs; None if capture fails, such as on a synchronization."""
    graphs = [torch.cuda.CUDAGraph() for _ in range(SETS)]
    try:
        for turn, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                work(turn)
        return median_ms(lambda turn: graphs[turn % SETS].replay(), turns)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def truth(weight: Tensor, leaves: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
    """Compute h, ∂x, ∂A, ∂B in fp64."""
    x, a, b, wide, g = (t.detach().double() for t in (*leaves, weight, g))
    u, gb = x @ a.T * SCALING, g @ b * SCALING
    return x @ wide.T + u @ b.T, g @ wide + gb @ a, gb.T @ x, g.T @ u


def measure(shape: tuple[int, int, int], options: argparse.Namespace, peak: float | None) -> None:
    """Print one table: the whole layer by each contender, then Lorakeet's parts."""
    tokens, inner, out = shape
    weight, leaves, grads = draw(tokens, inner, out, options.rank, options.outliers)
    right = truth(weight, leaves[0], grads[0])
    work = 2 * 2 * tokens * inner * out  # two products of the base; LoRA's own are not counted
    print(f"\n{tokens} tokens x {inner} x {out}, forward and backward with LoRA, r={options.rank}, bf16")
    print(
        f"{'':26} {'first s':>8} {'ms':>8} {'graph':>8} {'ratio':>6} {'TOP/s':>7} {'of peak':>8}  error of h, dx, dA, dB"
    )
    slowest = None
    for name, make in contenders(weight):
        began = time.perf_counter()
        layer = make()
        got = step(layer, leaves[0], grads[0])
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        errors = [
            float((mine.detach().double() - exact).norm() / exact.norm())
            for mine, exact in zip(got, right, strict=True)
        ]
        run = lambda turn, layer=layer: step(layer, leaves[turn % SETS], grads[turn % SETS])  # noqa: E731
        ms, graph = median_ms(run, options.turns), graph_ms(run, options.turns)
        slowest = slowest or ms
        rate = work / ms / 1e9
        share = f"{rate / peak:8.1%}" if peak and name == "lorakeet" else f"{'-':>8}"
        replayed = f"{graph:8.3f}" if graph else f"{'-':>8}"
        print(
            f"{name:26} {first:8.2f} {ms:8.3f} {replayed} {slowest / ms:6.2f} {rate:7.0f} {share}  "
            + " ".join(f"{error:.1e}" for error in errors)
        )
    print_parts(weight, leaves, grads, options.turns, peak)


def print_parts(
    weight: Tensor, leaves: list[list[Tensor]], grads: list[Tensor], turns: int, peak: float | None
) -> None:
    """Print the time of each part of Lorakeet's layer, from CUDA graphs.

    Args:
        weight: [out, in], bf16.
        leaves: Sets of x, A, B.
        grads: Sets of incoming gradients.
        turns: Timed turns.
        peak: Dense int8 TOP/s of the card, or None.
    """
    quantised, scale = quantize_rows(weight)
    xs = [x.detach() for x, _, _ in leaves]
    splits = [triton.split_columns(x) for x in xs]
    parts: dict[str, tuple[Callable[[int], Any], int]] = {
        "choice of columns": (lambda turn: triton.split_columns(xs[turn % SETS]), 0),
        "rounding x": (lambda turn: triton.quantize_(xs[turn % SETS], split=splits[turn % SETS]), 0),
        "rounding g": (lambda turn: triton.quantize_(grads[turn % SETS], factor=scale), 0),
        "product, all of it": (lambda turn: triton.product(xs[turn % SETS], quantised, scale), 1),
        "input gradient": (lambda turn: triton.input_gradient(grads[turn % SETS], quantised, scale), 1),
        "the weight turned for it": (lambda turn: triton.turn(quantised), 0),
    }
    for name, (work, products) in parts.items():
        work(0)  # compiles
        ms = graph_ms(work, turns) or median_ms(work, turns)
        line = f"  {name:24} {'':8} {'':8} {ms:8.3f}"
        if products:
            rate = 2 * len(xs[0]) * weight.numel() / ms / 1e9
            line += f" {'':6} {rate:7.0f} " + (f"{rate / peak:8.1%}" if peak else "")
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("layer", "training"), default=("layer", "training"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--out", type=int, nargs="+", default=[4096, 11008])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--outliers", type=int, default=6, help="columns of x that are 30 times as large")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--peak", type=float, help="dense int8 TOP/s of the card; known for " + ", ".join(PEAKS))
    gpu_training.add_options(parser.add_argument_group("training"))
    options = parser.parse_args()
    if "layer" in options.parts or options.device == "cuda":
        can, how = triton.available(torch.device("cuda"))
        if not can or triton.kernels.INTERPRETED:
            print(f"this benchmark needs an NVIDIA GPU and Triton: {how}", file=sys.stderr)
            return 2
    if "layer" in options.parts:
        layers(options, how)
    if "training" in options.parts:
        gpu_training.print_tables(options)
    return 0


def layers(options: argparse.Namespace, how: str) -> None:
    """Run the part ``layer``: a table for each number of output channels."""
    name = torch.cuda.get_device_name()
    peak = options.peak or PEAKS.get(name)
    packages = [p for p in ("lorakeet", "torch", "triton", "bitsandbytes") if importlib.util.find_spec(p)]
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages), f"CUDA {torch.version.cuda}", sep=", ")
    print(
        f"{how}; int8 peak " + (f"{peak:.0f} TOP/s" if peak else "not known: name it with --peak for the share of it")
    )
    print(f"back end of the layer: {best_on('cuda').name}")
    for out in options.out:
        measure((options.tokens, options.inner, out), options, peak)
    torch.cuda.empty_cache()  # for the trainings, which are other processes


if __name__ == "__main__":
    sys.exit(main())
