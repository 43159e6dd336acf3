"""The loops of this folder's C files on the CPU, compiled once with the machine's own C compiler and kept in the cache.

Where there is no compiler, or ``LORAKEET_NATIVE=0``, :func:`library` is None and the callers do the same in plain torch. The
library shares torch's threads: both use the one OpenMP runtime of the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakeet.files import cache_home
from lorakeet.kernels.cpu.memory import passing, workspace
from lorakeet.log import info

NAMES = (
    "common.h",
    "gemm_tiles.h",
    "gemv_w8.c",
    "gemm_w8a16.c",
    "gemm_w8a8_grouped.c",
    "gemm_f32.c",
    "decoder_layer.c",
    "elementwise.c",
    "attention.c",
)
SOURCES = [Path(__file__).parent / "csrc" / name for name in NAMES]
#: What ``elementwise.c`` has.
ELEMENTWISE = ("gated", "gated_backward", "rms_norm", "rms_norm_backward", "rotary", "dropout", "cross_entropy")
#: Tensors whose memory is what it seems.
PLAIN = (Tensor, torch.nn.Parameter)
#: Sums may be reordered, as vectors need it; nothing is assumed about NaN and infinity.
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC", "-std=gnu11"]
FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]


@cache
def library() -> Any:
    """The compiled loops, or None. A second or two the first time on a machine, then out of the cache."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LORAKEET_NATIVE") == "0" or compiler is None or os.name != "posix":
        return None
    sources = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(sources + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    path = cache_home() / "native" / f"{key}.so"
    try:
        if not path.exists():
            _compile(compiler, path)
        return _signed(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        info(f"no compiled loops on this machine ({told[0] if told else error}); plain torch is used instead")
        return None


def _compile(compiler: str, path: Path) -> None:
    """Write the library, whole or not at all; several processes may do so at a time. Without OpenMP one thread computes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        files = [str(path) for path in SOURCES if path.suffix == ".c"]
        command = [*compiler.split(), *FLAGS, *files, "-o", str(made), "-lm"]
        done = subprocess.run([*command, "-fopenmp"], capture_output=True, text=True, timeout=120)
        if done.returncode:
            subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        made.replace(path)


def _processor() -> str:
    """What code for this processor may use: a cache may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _signed(loaded: Any) -> Any:
    pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
    loaded.few_rows.argtypes = [pointer] * 6 + [size] * 3
    loaded.gated.argtypes = [pointer] * 5 + [size, ctypes.c_int]
    loaded.gated_backward.argtypes = [pointer] * 5 + [size, ctypes.c_int, ctypes.c_int]
    loaded.rms_norm.argtypes = [pointer] * 4 + [size] * 2 + [ctypes.c_float] * 2
    loaded.rms_norm_backward.argtypes = [pointer] * 5 + [size] * 2 + [ctypes.c_float]
    loaded.rotary.argtypes = [pointer] * 4 + [size] * 3 + [ctypes.c_int]
    bits = [ctypes.c_uint32] * 3
    loaded.dropout.argtypes = [pointer] * 2 + [size, *bits, ctypes.c_float, ctypes.c_int]
    loaded.cross_entropy.argtypes = [pointer] * 3 + [size] * 2 + [ctypes.c_float, ctypes.c_int]
    for name in ("few_rows", *ELEMENTWISE):
        getattr(loaded, name).restype = None
    if hasattr(loaded, "pair_product"):
        loaded.strips_size.argtypes, loaded.strips_size.restype = [size] * 2, size
        loaded.round_strips.argtypes, loaded.round_strips.restype = [pointer] * 4 + [size] * 2 + [ctypes.c_int], None
        loaded.most_low.argtypes, loaded.most_low.restype = [], size
        loaded.pair_product.argtypes = [pointer] * 7 + [size, pointer] + [size] * 3 + [ctypes.c_int]
        loaded.pair_product.restype = None
        loaded.kept_gradient.argtypes, loaded.kept_gradient.restype = [pointer] * 4 + [size] * 4, None
        loaded.group_size.argtypes, loaded.group_size.restype = [], size
        loaded.groups_size.argtypes, loaded.groups_size.restype = [size] * 2, size
        loaded.round_groups.argtypes, loaded.round_groups.restype = [pointer] * 5 + [size] * 2 + [ctypes.c_int], None
        loaded.group_gradient.argtypes, loaded.group_gradient.restype = [pointer] * 6 + [size] * 3, None
        loaded.fp32_size.argtypes, loaded.fp32_size.restype = [size], size
        loaded.fp32_product.argtypes, loaded.fp32_product.restype = [pointer] * 5 + [size] * 3 + [ctypes.c_int], None
    return loaded


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled loops can take these: on the CPU, in rows without gaps, their memory at hand."""
    if library() is None or torch.compiler.is_compiling():
        return False
    for t in tensors:  # noqa: SIM110 - no generator: this is asked for every layer and token
        if not (t.is_cpu and t.is_contiguous() and type(t) in PLAIN):
            return False
    return True


def fit(width: int, *vectors: Tensor | None) -> bool:
    """Whether vectors are fp32 [width]: the loops read memory as they are told to, and plain torch says what is wrong."""
    return all(v is None or (v.dtype == torch.float32 and v.shape == (width,)) for v in vectors)


def few_rows(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
    """h = (x·diag(c))·W₈ᵀ·diag(s) + b for x fp32 [n, in], W₈ int8 [out, in]; fp32 [n, out]. The weight is read once."""
    (n, width), out = x.shape, weight.shape[0]
    h = x.new_empty(n, out)
    library().few_rows(_at(x), _at(weight), _at(rows), _at(columns), _at(bias), _at(h), n, out, width)
    return h


def has_pairs() -> bool:
    """Whether the library has ``gemm_w8a16.c`` and ``gemm_w8a8_grouped.c``, which need AVX2."""
    return hasattr(library(), "pair_product")


def has_dots() -> bool:
    """Whether this processor has the 8-bit dot products that ``gemm_w8a8_grouped.c`` is written for."""
    return has_pairs() and bool(library().vnni_is_fast())


def adds(u: Tensor, v: Tensor) -> bool:
    """Whether :func:`pair_product` can add u·vᵀ for u [n, r] and v [out, r]: fp32, and of a rank that fits into its tiles."""
    return u.dtype == v.dtype == torch.float32 and 0 < u.shape[1] <= library().most_low() and usable(u)


def pair_product(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    low: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """h = (x·diag(c))·W₈ᵀ·diag(s) + b + u·vᵀ for x fp32 [n, in], rounded to 16 bits by rows, W₈ int8 [out, in].

    fp32 [n, out]. low is (u [n, r], v [out, r]), of which :func:`adds` is true, or None.
    """
    strips, row_scale = _strips(x, columns)
    h = passing(x, x.shape[0], weight.shape[0])
    u, v = (None, None) if low is None else (low[0], low[1].T.contiguous())
    at = (_at(strips), _at(row_scale), _at(weight), _at(rows), _at(bias), _at(u), _at(v))
    library().pair_product(*at, 0 if u is None else u.shape[1], _at(h), x.shape[0], *weight.shape, 0)
    return h


def pair_gradient(g: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None, even: bool = False) -> Tensor:
    """∂x = (g·diag(s))·W₈·diag(c) for g fp32 [n, out], rounded to 16 bits by rows, W₈ int8 [out, in]; fp32 [n, in].

    With ``even`` what rounding takes from a value is given to a later one: sums over a row stay what they are.
    """
    strips, row_scale = _strips(g, rows, even)
    dx = passing(g, g.shape[0], weight.shape[1])
    at = (_at(strips), _at(row_scale), _at(weight), _at(columns), None, None, None)
    library().pair_product(*at, 0, _at(dx), g.shape[0], *weight.shape, 1)
    return dx


def _strips(x: Tensor, factor: Tensor | None, even: bool = False) -> tuple[Tensor, Tensor]:
    """x·diag(factor) as ``round_strips`` lays it out, until the next ones are, and the scales of its rows."""
    strips = workspace(library().strips_size(*x.shape), torch.int16)
    row_scale = x.new_empty(x.shape[0])
    library().round_strips(_at(x), _at(factor), _at(strips), _at(row_scale), *x.shape, even)
    return strips, row_scale


def group_gradient(g: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None, even: bool = False) -> Tensor:
    """∂x = (g·diag(s))·W₈·diag(c) for g fp32 [n, out], rounded to 8 bits by groups, W₈ int8 [out, in]; fp32 [n, in].

    With ``even`` as in :func:`pair_gradient`.
    """
    codes, row_scale, start = _groups(g, rows, even)
    dx = passing(g, g.shape[0], weight.shape[1])
    at = (_at(codes), _at(row_scale), _at(start), _at(weight), _at(columns), _at(dx))
    library().group_gradient(*at, g.shape[0], *weight.shape)
    return dx


def kept_gradient(g: Tensor, places: Tensor, columns: Tensor, dx: Tensor) -> Tensor:
    """dx [n, in] with g·columnsᵀ at places fp32 [kept], for g [n, out] and columns [kept, out], all fp32."""
    library().kept_gradient(_at(g), _at(columns), _at(places), _at(dx), *g.shape, dx.shape[1], len(places))
    return dx


def _groups(x: Tensor, factor: Tensor, even: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x·diag(factor) as ``round_groups`` lays it out, until the next one is: its bytes, scales, and where sums begin."""
    groups = library().groups_size(*x.shape)
    size = library().group_size() * groups
    memory = workspace(size + 8 * groups, torch.int8)
    codes, scale, start = memory[:size], memory[size : size + 4 * groups], memory[size + 4 * groups :]
    library().round_groups(_at(x), _at(factor), _at(codes), _at(scale), _at(start), *x.shape, even)
    return codes, scale, start


@cache
def has_fp32() -> bool:
    """Whether :func:`fp32_product` is faster than torch's own product on this processor."""
    return has_pairs() and bool(library().fp32_is_fast())


def fp32_product(x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·m + b for x fp32 [n, k] and m fp32 [k, columns], of which m or mᵀ has no gaps; fp32 [n, columns]."""
    h = passing(x, x.shape[0], m.shape[1])
    strips = workspace(library().fp32_size(x.shape[0]), torch.float32)
    at = [_at(t) for t in (x, m, bias, strips, h)]
    library().fp32_product(*at, *x.shape, m.shape[1], not m.is_contiguous())
    return h


def takes(*tensors: Tensor) -> bool:
    """Whether the loops over activations can take these: fp32, at least one value, and memory as they read it."""
    return all(t.dtype == torch.float32 and t.numel() for t in tensors) and usable(*tensors)


def gated(gate: Tensor, up: Tensor, kind: int, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """f(gate)·up, fp32 of one shape; ``kind`` 0 for SiLU, 1 for GELU by tanh. Then gate and up, if ``narrow`` in bf16."""
    h = passing(gate, *gate.shape)
    kept = [torch.empty_like(t, dtype=torch.bfloat16) for t in (gate, up)] if narrow else [None, None]
    library().gated(_at(gate), _at(up), _at(h), _at(kept[0]), _at(kept[1]), gate.numel(), kind)
    return h, *(own if made is None else made for own, made in zip((gate, up), kept, strict=True))  # type: ignore[return-value]


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """∂gate = f'(gate)·up·grad and ∂up = f(gate)·grad, fp32 of one shape; gate and up both fp32 or both bf16."""
    dgate, dup = torch.empty_like(grad), torch.empty_like(grad)
    at = [_at(t) for t in (grad, gate, up, dgate, dup)]
    library().gated_backward(*at, grad.numel(), kind, gate.dtype == torch.bfloat16)
    return dgate, dup


def rms_norm(x: Tensor, weight: Tensor, eps: float, more: float) -> tuple[Tensor, Tensor]:
    """s·x·(weight + more) and s = (mean(x²) + eps)^(-½) for rows x fp32 [..., d], weight fp32 [d]: [..., d] and [..., 1]."""
    y, s = passing(x, *x.shape), x.new_empty((*x.shape[:-1], 1))
    library().rms_norm(_at(x), _at(weight), _at(y), _at(s), s.numel(), x.shape[-1], eps, more)
    return y, s


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, s: Tensor, more: float) -> Tensor:
    """The gradient to x of :func:`rms_norm`."""
    dx = torch.empty_like(x)
    library().rms_norm_backward(_at(grad), _at(x), _at(weight), _at(s), _at(dx), s.numel(), x.shape[-1], more)
    return dx


def rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """x fp32 [tokens, heads, d] turned by cos and sin fp32 [tokens, d], or its gradient."""
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    library().rotary(_at(x), _at(cos), _at(sin), _at(y), tokens, heads, width // 2, backward)
    return y


def dropout(x: Tensor, y: Tensor | None, levels: int, scale: float, low: int, high: int) -> Tensor:
    """x·mask·scale, or y plus that in y's memory, fp32; the mask of a seed's halves has levels/2¹⁶ zeros."""
    to = passing(x, *x.shape) if y is None else y
    library().dropout(_at(x), _at(to), x.numel(), low, high, levels, scale, y is not None)
    return to


def cross_entropy(z: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    """Losses [n] of logits scale·z, z fp32 [n, v], at targets int64 [n] in 0…v − 1; on demand their gradient, over z."""
    losses = z.new_empty(len(z))
    library().cross_entropy(_at(z), _at(targets), _at(losses), *z.shape, scale, gradient)
    return losses


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
