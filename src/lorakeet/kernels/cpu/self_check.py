"""Self-check of the compiled products: each against the same in fp64 on odd shapes, before the library is first used.

A compiler, a processor or a virtual machine may be wrong where the tests of this package never ran. The check takes
milliseconds. Its result is kept beside the library, for each machine that uses it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakeet.files import write_json
from lorakeet.kernels.cpu.abi import GROUP, NF4_VALUES
from lorakeet.security.paths import exists

Array = NDArray[Any]
#: Tokens, outputs, inputs: odd sizes, deeper than one block of the sums in either direction.
SHAPES = ((19, 37, 709), (33, 2101, 70))
#: The same for NF4, whose rows have whole blocks of 64.
NF4_SHAPES = ((5, 37, 704), (33, 130, 64))
#: Largest difference from fp64, over the root mean square of its row: activations in 16 bits, and in fp32.
ROUNDED, EXACT = 1e-3, 2e-5


@dataclass(frozen=True)
class Product:
    """A compiled product.

    Attributes:
        name: C functions have it with the prefix ``lk_``.
        feature: Feature of the processor without which nothing calls it; None: everything may call it.
        errors: Computes, for a library, the error of each shape over the largest one allowed.
    """

    name: str
    feature: str | None
    errors: Callable[[Any], Iterator[float]]


def differing_products(library: Any, record: Path | None) -> list[str]:
    """Return the names of the products of a library that differ from fp64 on this machine.

    Args:
        library: The loaded library.
        record: File with the result of an earlier check, which is written if it is not there; None: check anew.
    """
    machine = f"{platform.node()} {library.lk_cpu_features().decode()}"
    known = _read(record)
    if machine not in known:
        known[machine] = [product.name for product in PRODUCTS if _differs(product, library)]
        with suppress(OSError):  # the cache cannot be written: every process checks
            if record is not None:
                write_json(record, known)
    return known[machine]


def _read(record: Path | None) -> dict[str, list[str]]:
    if record is None or not exists(record):
        return {}
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except ValueError:  # damaged
        return {}


def features_of(names: list[str]) -> frozenset[str | None]:
    """Return the features that products need; None stands for one that everything may call."""
    return frozenset(product.feature for product in PRODUCTS if product.name in names)


def _differs(product: Product, library: Any) -> bool:
    listed = {None, *library.lk_cpu_features().decode().split()}
    needed = "avx2" if product.feature == "vnni" else product.feature  # without it, it is emulated
    return needed in listed and not all(error <= 1 for error in product.errors(library))


# -- the products -----------------------------------------------------------------------------------------------------


def _forward(tiles: str = "") -> Callable[[Any], Iterator[float]]:
    """Return the check of the product with activations in 16 bits, with every addend."""

    def errors(library: Any) -> Iterator[float]:
        for n, out, inner in SHAPES:
            x, weight, rows, columns = _layer(n, out, inner)
            bias, u, v = _normal(out, 5), _normal((n, 3), 6), _normal((3, out), 7)
            codes, scale = _bytes(2 * _function(library, f"lk_packed_a16{tiles}_size")(n, inner)), _empty(n)
            h = _empty((n, out))
            _call(library, f"lk_pack_a16{tiles}", x, columns, codes, scale, n, inner, 0)
            plain = () if tiles else (0,)
            given = codes, scale, weight, rows, bias, u, v, 3, h, n, out, inner, *plain
            _call(library, f"lk_gemm_w8a16{tiles}", *given)
            yield _error(h, _wide(x, weight, rows, columns) + bias + u.astype(float) @ v, ROUNDED)

    return errors


def _few(name: str, limit: float) -> Callable[[Any], Iterator[float]]:
    """Return the check of a product of few tokens and an int8 weight."""

    def errors(library: Any) -> Iterator[float]:
        for _, out, inner in SHAPES:
            x, weight, rows, columns = _layer(7, out, inner)
            bias, h = _normal(out, 5), _empty((7, out))
            memory = (_bytes(library.lk_packed_a16_rows(7, inner)),) if name == "lk_gemv_w8a16" else ()
            _call(library, name, x, weight, rows, columns, bias, h, *memory, 7, out, inner)
            yield _error(h, _wide(x, weight, rows, columns) + bias, limit)

    return errors


def _gradient_in_16_bits(library: Any) -> Iterator[float]:
    for n, out, inner in SHAPES:
        _, weight, rows, columns = _layer(n, out, inner)
        g, dx = _normal((n, out), 8), _empty((n, inner))
        codes, scale = _bytes(2 * library.lk_packed_a16_size(n, out)), _empty(n)
        _call(library, "lk_pack_a16", g, rows, codes, scale, n, out, 0)
        given = codes, scale, weight, columns, None, None, None, 0, dx, n, out, inner, 1
        _call(library, "lk_gemm_w8a16", *given)
        yield _error(dx, (g.astype(float) * rows) @ weight * columns, ROUNDED)


def _gradient_in_8_bits(tiles: bool) -> Callable[[Any], Iterator[float]]:
    """Return the check of the gradient by groups, on integers that it rounds exactly: a group's largest is 127."""

    def errors(library: Any) -> Iterator[float]:
        size, pack, multiply = (
            ("lk_packed_a8_amx_groups", "lk_pack_a8_amx", "lk_gemm_w8a8_amx_dgrad")
            if tiles
            else ("lk_packed_a8_groups", "lk_pack_a8_grouped", "lk_gemm_w8a8_grouped_dgrad")
        )
        for n, out, inner in SHAPES:
            _, weight, _, columns = _layer(n, out, inner)
            g, dx = _integers((n, out), 8).astype(np.float32), _empty((n, inner))
            g[:, ::GROUP] = 127
            groups = _function(library, size)(n, out)
            packed = _bytes(GROUP * groups), _empty(groups), *(() if tiles else (_empty(groups),))
            _call(library, pack, g, None, *packed, n, out, 0)
            _call(library, multiply, *packed, weight, columns, dx, n, out, inner)
            yield _error(dx, g.astype(float) @ weight * columns, EXACT)

    return errors


def _f32(library: Any) -> Iterator[float]:
    for n, columns, depth in SHAPES:
        x, bias = _normal((n, depth), 1), _normal(columns, 5)
        for transposed in (0, 1):
            m = _normal((columns, depth) if transposed else (depth, columns), 9)
            h, strips = _empty((n, columns)), _empty(library.lk_packed_f32_size(n))
            _call(library, "lk_gemm_f32", x, m, bias, strips, h, n, depth, columns, transposed, 0, 0)
            yield _error(h, x.astype(float) @ (m.T if transposed else m) + bias, EXACT)


def _head(library: Any) -> Iterator[float]:
    """Yield the error of the losses of a head, and of their gradient."""
    for n, vocabulary, width in SHAPES:
        x, weight = _normal((n, width), 1) / 8, _normal((vocabulary, width), 9) / 8
        targets = _integers(n, 2, 0, vocabulary).astype(np.int64)
        losses, dx = _empty((n, 1)), _empty((n, width))
        memory = _empty(library.lk_head_f32_size(n, vocabulary, width))
        _call(
            library, "lk_head_f32", x, weight, targets, losses, dx, memory, n, vocabulary, width, n, ctypes.c_float(0.5)
        )
        logits = 0.5 * (x.astype(float) @ weight.T)
        exact = np.log(np.exp(logits).sum(1))
        gradient = np.exp(logits - exact[:, None])
        gradient[np.arange(n), targets] -= 1
        yield _error(losses, (exact - logits[np.arange(n), targets])[:, None], EXACT)
        yield _error(dx, 0.5 * gradient @ weight, EXACT)


def _half_in_tiles(library: Any) -> Iterator[float]:
    for n, out, inner in SHAPES:
        bits = (_normal((out, inner), 9).view(np.uint32) >> 16).astype(np.uint16)
        exact = (bits.astype(np.uint32) << 16).view(np.float32).astype(float)
        x, g, bias = _normal((n, inner), 1), _normal((n, out), 8), _normal(out, 5)
        h, dx = _empty((n, out)), _empty((n, inner))
        tiles = _bytes(library.lk_packed_half_amx_size(n, max(inner, out)))
        _call(library, "lk_gemm_half_amx", x, bits, bias, tiles, h, n, inner, out, 1)
        yield _error(h, x.astype(float) @ exact.T + bias, ROUNDED)
        _call(library, "lk_gemm_half_amx", g, bits, None, tiles, dx, n, out, inner, 0)
        yield _error(dx, g.astype(float) @ exact, ROUNDED)


def _half(many: bool) -> Callable[[Any], Iterator[float]]:
    """Return the check of a weight in bf16 and in fp16 by few or by many tokens, whose gradient is checked too."""

    def errors(library: Any) -> Iterator[float]:
        for (n, out, inner), bf16 in itertools.product(SHAPES, (0, 1)):
            weight, bias = _normal((out, inner), 9), _normal(out, 5)
            bits = (
                (weight.view(np.uint32) >> 16).astype(np.uint16) if bf16 else weight.astype(np.float16).view(np.uint16)
            )
            wide = (bits.astype(np.uint32) << 16).view(np.float32) if bf16 else bits.view(np.float16)
            exact = wide.astype(float)
            if not many:
                x, h = _normal((7, inner), 1), _empty((7, out))
                _call(library, "lk_gemv_half", x, bits, bias, h, 7, out, inner, bf16)
                yield _error(h, x.astype(float) @ exact.T + bias, EXACT)
                continue
            strips = _empty(library.lk_packed_f32_size(n))
            x, h, g, dx = _normal((n, inner), 1), _empty((n, out)), _normal((n, out), 8), _empty((n, inner))
            _call(library, "lk_gemm_half", x, bits, bias, strips, h, n, inner, out, 1, bf16)
            yield _error(h, x.astype(float) @ exact.T + bias, EXACT)
            _call(library, "lk_gemm_half", g, bits, None, strips, dx, n, out, inner, 0, bf16)
            yield _error(dx, g.astype(float) @ exact, EXACT)

    return errors


def _nf4(many: bool) -> Callable[[Any], Iterator[float]]:
    """Return the check of an NF4 weight by few or by many tokens, whose gradient is checked too."""

    def errors(library: Any) -> Iterator[float]:
        for n, out, inner in NF4_SHAPES:
            codes = _integers((out, inner // 2), 2, 0, 256).astype(np.uint8)
            absmax = 1 + np.abs(_normal(out * inner // 64, 3))
            values = np.array(NF4_VALUES)[np.stack((codes >> 4, codes & 15), -1)].reshape(-1, 64)
            weight = (values * absmax[:, None]).reshape(out, inner)
            for gradient in (0, 1) if many else (0,):
                x = _normal((n, out if gradient else inner), 1)
                bias = None if gradient else _normal(out, 5)
                h, strips = (
                    _empty((n, inner if gradient else out)),
                    _empty(library.lk_packed_f32_size(n)) if many else None,
                )
                given = (strips, h, n, out, inner, gradient) if many else (h, n, out, inner)
                _call(library, "lk_gemm_nf4" if many else "lk_gemv_nf4", x, codes, absmax, None, bias, *given)
                exact = x.astype(float) @ (weight if gradient else weight.T)
                yield _error(h, exact if bias is None else exact + bias, EXACT)

    return errors


#: Every product, those that others fall back to first.
PRODUCTS = (
    Product("gemv_w8", None, _few("lk_gemv_w8", EXACT)),
    Product("gemv_nf4", None, _nf4(many=False)),
    Product("gemv_w8a16", "avx2", _few("lk_gemv_w8a16", ROUNDED)),
    Product("gemm_w8a16", "avx2", _forward()),
    Product("gemm_w8a16_dgrad", "avx2", _gradient_in_16_bits),
    Product("gemm_f32", "avx2", _f32),
    Product("head_f32", "avx2", _head),
    Product("gemm_half", "avx2", _half(many=True)),
    Product("gemv_half", "avx2", _half(many=False)),
    Product("gemm_nf4", "avx2", _nf4(many=True)),
    Product("gemm_w8a8_grouped_dgrad", "vnni", _gradient_in_8_bits(tiles=False)),
    Product("gemm_half_amx", "amx", _half_in_tiles),
    Product("gemm_w8a16_amx", "amx", _forward("_amx")),
    Product("gemm_w8a8_amx_dgrad", "amx", _gradient_in_8_bits(tiles=True)),
)


# -- numbers and calls ------------------------------------------------------------------------------------------------


def _layer(n: int, out: int, inner: int) -> tuple[Array, Array, Array, Array]:
    """Return x [n, in], an int8 weight [out, in], its row scales, and column scales that are powers of two."""
    columns = np.exp2(_integers(inner, 4, -3, 4)).astype(np.float32)
    rows = (0.5 + np.abs(_normal(out, 3))).astype(np.float32)
    return _normal((n, inner), 1), _integers((out, inner), 2).astype(np.int8), rows, columns


def _wide(x: Array, weight: Array, rows: Array, columns: Array) -> Array:
    return (x.astype(float) * columns) @ weight.T.astype(float) * rows


def _normal(shape: Any, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _integers(shape: Any, seed: int, low: int = -127, high: int = 128) -> Array:
    return np.random.default_rng(seed).integers(low, high, shape)


def _empty(shape: Any) -> Array:
    return np.full(shape, np.nan, np.float32)


def _bytes(count: int) -> Array:
    return np.zeros(count, np.int8)


def _function(library: Any, name: str) -> Any:
    return getattr(library, name)


def _call(library: Any, name: str, *given: Any) -> None:
    """Call a C function, with the addresses of arrays."""
    _function(library, name)(*(each.ctypes.data if isinstance(each, np.ndarray) else each for each in given))


def _error(got: Array, exact: Array, limit: float) -> float:
    """Return the largest difference, over the root mean square of its row and over the limit; infinite if there is NaN."""
    size = np.sqrt(np.mean(exact**2, axis=1, keepdims=True))
    worst = float(np.max(np.abs(got - exact) / size))
    return worst / limit if np.isfinite(worst) else np.inf
