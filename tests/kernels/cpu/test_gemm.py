"""The products in C: GEMV against fp64, NaN and infinity, wrong shapes, and reads beyond the weight."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import linear, registry
from lorakeet.kernels.int8.format import dequantize, quantize_rows, quantize_weight, split_scale

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
SHAPES = [
    (1, 1, 1),
    (1, 7, 16),
    (3, 5, 33),
    (4, 4, 8),
    (5, 6, 129),
    (16, 130, 70),
    (9, 300, 640),
    (2, 3, 0),
    (0, 5, 8),
    (4, 5, 20),
    (9, 7, 40),
]


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-6) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.numel():
        assert float((a - b).abs().max()) <= share * max(float(b.abs().max()), 1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_gemv(shape: tuple[int, int, int], biased: bool) -> None:
    n, out, inner = shape
    torch.manual_seed(n + out)
    weight, scale = quantize_rows(torch.randn(out, inner))
    x, bias = torch.randn(n, inner), torch.randn(out) if biased else None
    for columns in (None, torch.logspace(-3, 3, inner, 2)):
        scales = scale if columns is None else torch.cat((scale, columns))
        truth = x.double() @ dequantize(weight, scales, torch.float64).T + (bias.double() if biased else 0)
        close(gemm.gemv_w8(x, weight, scale, columns, bias).double(), truth, 3e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has one is not finite, and no other row; in C and without it."""
    weight, scale = quantize_rows(torch.randn(8, 40))
    for rows in (3, 20):
        for compiled in (True, False):
            x = torch.randn(rows, 40)
            x[1, 7] = value
            with monkeypatch.context() as patch:
                if not compiled:
                    patch.setattr(bindings, "is_cpu_contiguous", lambda *_: False)
                with registry.using("vnni"):
                    h = linear.product(x, weight, scale)
            assert not h[1].isfinite().any() and h[[i for i in range(rows) if i != 1]].isfinite().all()


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", ["vnni", "blocked"])
def test_tensors_that_do_not_fit_are_an_error(rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C would read memory beyond them."""
    monkeypatch.setenv("LORAKEET_INT8", name)
    registry._chosen.clear()
    weight, scale = quantize_rows(torch.randn(8, 40))
    x, bias = torch.randn(rows, 40), torch.randn(8)
    wrong = [
        (x[:, :39].clone(), weight, scale, bias),
        (x, weight, scale[:7].clone(), bias),
        (x, weight, scale, bias[:7].clone()),
    ]
    for given in wrong:
        with pytest.raises((RuntimeError, ValueError)):
            linear.product(*given)
    with pytest.raises((RuntimeError, ValueError)):
        linear.input_gradient(torch.randn(20, 8), weight, scale[:7].clone())
    half = linear.product(x, weight, scale.bfloat16(), bias)  # a scale in bf16 is read as bf16
    assert float((half - linear.product(x, weight, scale, bias)).abs().max()) < 0.1


def test_nothing_is_read_beyond_the_weight() -> None:
    """The weight's last byte is the last of a page, and the next page may not be read: to do so would end the process."""
    script = (
        "import ctypes, mmap, torch\n"
        "from lorakeet.kernels.cpu import features, gemm\nfrom lorakeet.kernels.cpu.features import Feature\n"
        "libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE\n"
        "for out, inner in ((1, 1), (15, 17), (16, 16), (16, 17), (17, 40), (32, 41), (5, 700), (48, 1300)):\n"
        "    size = -(-out * inner // page) * page\n"
        "    memory = mmap.mmap(-1, size + page)\n"
        "    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "    assert libc.mprotect(ctypes.c_void_p(at + size), page, 0) == 0\n"
        "    w = torch.frombuffer(memory, dtype=torch.int8, count=out * inner, offset=size - out * inner)\n"
        "    w = w.view(out, inner)\n"
        "    w.copy_(torch.randint(-127, 128, w.shape))\n"
        "    for n in (1, 3, 4, 20):\n"
        "        x, g, s, c = torch.randn(n, inner), torch.randn(n, out), torch.rand(out), torch.ones(inner)\n"
        "        gemm.gemv_w8(x, w, s, c, s)\n"
        "        if features.has(Feature.AVX2):\n"
        "            gemm.gemm_w8a16(x, w, s, c, s), gemm.gemm_w8a16_dgrad(g, w, s, c)\n"
        "            gemm.gemm_w8a8_grouped_dgrad(g, w, s, c)\n"
        "        if Feature.AMX in features.runnable():\n"
        "            gemm.gemm_w8a16(x, w, s, c, s, tiles=True), gemm.gemm_w8a8_grouped_dgrad(g, w, s, c, tiles=True)\n"
        "print('alive', flush=True)\n"
        "import os; os._exit(0)\n"  # the memory is never given back
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "alive\n", (done.returncode, done.stderr)


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="this library has no 16-bit products")
@pytest.mark.parametrize("shape", [(576, 576), (17, 33), (1, 5), (35, 1290), (16, 31), (64, 650), (48, 2048)])
def test_few_and_many_rows_have_the_same_bits(shape: tuple[int, int]) -> None:
    """A row of the 16-bit products does not depend on the other rows, nor on the loops for few or for many."""
    torch.manual_seed(sum(shape))
    weight, scale = quantize_weight(torch.randn(shape))
    row_scale, columns = split_scale(weight, scale)
    x, bias = torch.randn(40, shape[1]) * torch.rand(40, 1) * 10, torch.randn(shape[0])
    whole = gemm.gemm_w8a16(x, weight, row_scale, columns, bias)
    for n in (*range(1, 18), 40):
        for first in (0, 40 - n):
            for product in (gemm.gemv_w8a16, gemm.gemm_w8a16):
                h = product(x[first : first + n].contiguous(), weight, row_scale, columns, bias)
                assert torch.equal(h, whole[first : first + n]), (product.__name__, n, first)
