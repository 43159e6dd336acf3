"""Time of a training step by kind of work: ``python benchmarks/cost.py --parts profile``.

The times are torch.profiler's self times, grouped by operation and by its callers. The profiler does not see C loops called
through ctypes. They are recorded here by name; a decoder layer in C measures its parts itself. "Python" is the remainder of
the step's time: the interpreter, autograd, and torch between two operations.

The base's products are then run alone: the same weights, in the same order, with random inputs of the same shapes. In the
step they take longer, because the caches hold other data and memory is newly allocated.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from training_step import Point, as_a_run, make_batch, make_model, make_step

FORWARD, BACKWARD = "base products, forward", "base products, backward"
GROUPS = (
    FORWARD, BACKWARD, "rounding and rescaling for int8", "low-rank products", "attention",
    "norms, activations, rotary, sums", "head, products", "cross-entropy", "optimizer", "other operations", "Python",
)  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "mkldnn_linear"}
ELEMENTWISE = {
    "add", "addcmul", "bernoulli", "cat", "copy", "cos", "div", "exp", "fill", "ge", "gelu", "gelu_backward",
    "linalg_vector_norm", "lt", "mean", "mul", "native_dropout", "neg", "pow", "random", "reciprocal", "rsqrt",
    "rsub", "sigmoid", "silu", "silu_backward", "sin", "sqrt", "square", "sub", "sum", "uniform", "where", "zero",
}  # fmt: skip
#: Groups of the kinds of work that a decoder layer in C measures itself (``lorakeet.kernels.cpu.abi.WORK``).
OF_LAYERS = {
    "product": FORWARD,
    "gradient": BACKWARD,
    "rounding": "rounding and rescaling for int8",
    "low_rank": "low-rank products",
    "attention": "attention",
    "elementwise": "norms, activations, rotary, sums",
}
#: Functions of :mod:`lorakeet.kernels.cpu.gemm` that prepare an int8 product; the others are products.
ROUNDING = {"pack_a16", "pack_a8_grouped"}
SHAPES = ((4096, 4096),)  # [out, in]; measured in addition to the model's own
INT8, NATIVE = "int8 ", "native "


@contextmanager
def recorded(module: ModuleType, prefix: str, names: list[str]) -> Iterator[None]:
    """Record the calls of these functions of a module in the profile."""
    from torch.profiler import record_function

    before = {name: getattr(module, name) for name in names}

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(prefix + name):
                return function(*args, **kwargs)

        return call

    for name, function in before.items():
        setattr(module, name, named(name, function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def loops(bindings: ModuleType) -> list[str]:
    """List the functions of the module that return tensors."""
    functions = inspect.getmembers(bindings, inspect.isfunction)
    made = {name: str(f.__annotations__.get("return")) for name, f in functions if f.__module__ == bindings.__name__}
    return [name for name, returns in made.items() if "Tensor" in returns]


def group_of(event: Any, rank: int) -> str:
    """Return the kind of work of one operation."""
    from lorakeet.kernels.cpu.bindings import ELEMENTWISE as OVER_ACTIVATIONS

    names, above = [event.name], event.cpu_parent
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    around = " ".join(names)
    own = event.name.removeprefix("aten::").rstrip("_")
    if "optimizer" in names:
        return "optimizer"
    loop = event.name.removeprefix(NATIVE) if event.name.startswith(NATIVE) else None
    elementwise = own in ELEMENTWISE or loop in OVER_ACTIVATIONS
    product = own in PRODUCTS or (loop is not None and loop not in ROUNDING and not elementwise)
    if "LinearCrossEntropy" in around:
        return "head, products" if product else "cross-entropy"
    if "FlashAttention" in around or "LoopAttention" in around or "scaled_dot_product" in around:
        return "attention"
    if product:
        if any(rank in shape for shape in event.input_shapes or () if shape):
            return "low-rank products"
        return BACKWARD if "autograd::engine" in around else FORWARD
    if (loop and not elementwise) or INT8 in around:
        return "rounding and rescaling for int8"
    if elementwise:
        return "norms, activations, rotary, sums"
    return "other operations" if event.name.startswith("aten::") else "Python"


def profile(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the milliseconds of a step by kind of work, and the rates of its products."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    from lorakeet.kernels.cpu import bindings, gemm, head
    from lorakeet.kernels.decoder_layer_training import watched_work
    from lorakeet.kernels.int8 import linear

    model = make_model(point)
    step, batch = make_step(model), make_batch(point["samples"], point["length"], point["spread"])
    tokens = int(batch["attention_mask"].sum())
    with as_a_run(model):
        times = [milliseconds(lambda: step(batch)) for _ in range(options.repeats + 1)][1:]
        with ExitStack() as records:
            records.enter_context(recorded(linear, INT8, ["product", "input_gradient"]))
            for module in (bindings, gemm, head):
                records.enter_context(recorded(module, NATIVE, loops(module)))
            step(batch)
            in_layers = records.enter_context(watched_work())
            with watch(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
                watched = statistics.mean(milliseconds(lambda: step(batch)) for _ in range(options.repeats))
    spent: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    events = [event for event in seen.events() if not event.is_async]
    ((main, _),) = Counter(event.thread for event in events).most_common(1)
    for event in (event for event in events if event.thread == main):
        group, own = group_of(event, point["rank"]), event.self_cpu_time_total / 1000 / options.repeats
        if group != "Python":  # the rest of the step: a layer in C is one operation that hides what it consists of
            spent[group] += own
        if group == "other operations":
            others[event.name] += own
    for kind, seconds in in_layers().items():
        spent[OF_LAYERS[kind]] += 1000 * seconds / options.repeats
    spent["Python"] = watched - sum(spent.values())
    return {
        "tokens": tokens,
        "ms": statistics.median(times),
        "watched ms": watched,
        "groups": {group: spent[group] for group in GROUPS},
        "others": dict(sorted(others.items(), key=lambda item: -item[1])[:6]),
        "products": alone(model, tokens, options.repeats),
        "rates": rates(model, tokens, options.repeats),
    }


# ---- products alone ----------------------------------------------------------------------------------------------


def base_layers(model: Any) -> dict[str, tuple[Any, Any]]:
    """Map each frozen linear layer of the decoder to its weight [out, in] and scale (None in a floating format)."""
    names = (name for name, module in model.named_modules() if getattr(module, "in_features", None))
    layers = {name: model.get_submodule(name) for name in names if ".layers." in name and "lora_" not in name}
    held = {id(m.weight): (name, m.weight, getattr(m, "scale", None)) for name, m in layers.items()}
    return {name: (weight.detach(), scale) for name, weight, scale in held.values()}


def multiply(x: Any, weight: Any, scale: Any) -> None:
    from lorakeet.kernels.int8 import linear

    if scale is None:
        x @ weight.T
    else:
        linear.product(x, weight, scale)


def multiply_back(g: Any, weight: Any, scale: Any) -> None:
    from lorakeet.kernels.int8 import linear

    if scale is None:
        g @ weight
    else:
        linear.input_gradient(g, weight, scale)


def alone(model: Any, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure the step's base products alone: GFLOP and milliseconds."""
    import torch

    layers = base_layers(model)
    # no input gradient: the embedding is frozen
    later = {name: held for name, held in layers.items() if not re.search(r"layers\.0\.self_attn\.[qkv]_proj", name)}
    inputs = {n: torch.randn(tokens, n) for weight, _ in layers.values() for n in weight.shape}
    found = {}
    with torch.no_grad():
        for way, chosen, work, side in (
            (FORWARD, list(layers.values()), multiply, 1),
            (BACKWARD, list(later.values())[::-1], multiply_back, 0),
        ):

            def all_of_them(chosen: Any = chosen, work: Any = work, side: int = side) -> None:
                for weight, scale in chosen:
                    work(inputs[weight.shape[side]], weight, scale)

            times = [milliseconds(all_of_them) for _ in range(repeats + 1)][1:]
            gflop = sum(2 * tokens * weight.numel() for weight, _ in chosen) / 1e9
            found[way] = {"GFLOP": gflop, "ms": statistics.median(times)}
    return found


def rates(model: Any, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Map each shape to GFLOP/s of forward and backward, with one weight that stays in the cache."""
    import torch

    from lorakeet.kernels.int8.format import quantize_weight

    rounded = any(scale is not None for _, scale in base_layers(model).values())
    shapes = sorted({tuple(weight.shape) for weight, _ in base_layers(model).values()} | set(SHAPES))
    found = {}
    for out, inner in shapes:
        dense = torch.randn(out, inner) / inner**0.5
        weight, scale = quantize_weight(dense) if rounded else (dense, None)
        x, g = torch.randn(tokens, inner), torch.randn(tokens, out)
        ways = (lambda: multiply(x, weight, scale)), (lambda: multiply_back(g, weight, scale))  # noqa: B023
        times = [statistics.median([milliseconds(way) for _ in range(2 * repeats + 1)][1:]) for way in ways]
        found[f"{out} x {inner}"] = [2 * tokens * out * inner / ms / 1e6 for ms in times]
    return found


def milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


# ---- the tables --------------------------------------------------------------------------------------------------


def show(found: dict[int, dict[str, Any]]) -> None:
    """Print the number formats side by side."""
    if not found:
        return
    one = next(iter(found.values()))
    print(f"\nprofile: one step of {one['tokens']} tokens by kind of work")
    head = "".join(f"{f'{bits} bits, ms':>14}{'share':>8}" for bits in found)
    print(f"{'':33}{head}")
    for group in GROUPS:
        cells = (f"{f['groups'][group]:14.1f}{f['groups'][group] / f['watched ms']:8.1%}" for f in found.values())
        print(f"{group:33}{''.join(cells)}")
    print(f"{'all, while watched':33}" + "".join(f"{f['watched ms']:14.1f}{'':8}" for f in found.values()))
    print(f"{'all, unwatched':33}" + "".join(f"{f['ms']:14.1f}{'':8}" for f in found.values()))
    for bits, f in found.items():
        print(f"largest other operations, {bits} bits: " + ", ".join(f"{k} {v:.1f}" for k, v in f["others"].items()))
    print("\nproducts of the base, in the step and alone; with 8 bits rounding and rescaling are part of them")
    print(f"{'':33}{'GFLOP':>8}{'step ms':>9}{'GFLOP/s':>9}{'alone ms':>9}{'GFLOP/s':>9}{'step/alone':>11}")
    for bits, f in found.items():
        print_products(bits, f)
    print(f"\nGFLOP/s of one product of {one['tokens']} tokens, alone: forward, backward")
    print(f"{'':13}" + "".join(f"{f'{bits} bits':>20}" for bits in found))
    for shape in one["rates"]:
        print(f"{shape:13}" + "".join("".join(f"{rate:10.0f}" for rate in f["rates"][shape]) for f in found.values()))


def print_products(bits: int, f: dict[str, Any]) -> None:
    """Print forward and backward together: the names of rounding operations do not tell the direction."""
    spent = f["groups"][FORWARD] + f["groups"][BACKWARD] + f["groups"]["rounding and rescaling for int8"]
    gflop = sum(way["GFLOP"] for way in f["products"].values())
    apart = sum(way["ms"] for way in f["products"].values())
    print(
        f"{f'{bits} bits, both directions':33}{gflop:8.1f}{spent:9.1f}{1000 * gflop / spent:9.0f}{apart:9.1f}"
        f"{1000 * gflop / apart:9.0f}{spent / apart:11.2f}"
    )
    for way, alone_ in f["products"].items():
        print(f"  {way:31}{alone_['GFLOP']:8.1f}{'':18}{alone_['ms']:9.1f}{1000 * alone_['GFLOP'] / alone_['ms']:9.0f}")
