"""The Triton kernels of the 4-bit product against their reference; test_nf4_triton.py runs this file in its own process."""

from __future__ import annotations

import pytest
import torch

from lorakeet.kernels.nf4 import triton
from lorakeet.kernels.nf4.format import Nf4Tensors, dequantize, quantize

DEVICE = "cpu" if triton.kernels.INTERPRETED else "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Tolerance by dtype, relative to the largest value.
ROUNDING = {FP32: 3e-6, BF16: 2e-2, FP16: 3e-3}


#: Tokens, output and input channels, dtype, whether the scales are rounded.
CASES = [
    (1, 48, 64, FP32, True),
    (5, 3, 128, BF16, True),
    (17, 70, 64, FP32, False),
    (20, 65, 128, FP16, True),
    (33, 130, 192, FP32, True),
    (0, 4, 64, FP32, True),
]


@pytest.mark.parametrize(("n", "out", "inner", "dtype", "double"), CASES)
def test_products(n: int, out: int, inner: int, dtype: torch.dtype, double: bool) -> None:
    torch.manual_seed(n)
    found = quantize(torch.randn(out, inner, device=DEVICE) / inner**0.5, double)
    wide = dequantize(found).double()
    x, g = torch.randn(n, inner, device=DEVICE).to(dtype), torch.randn(n, out, device=DEVICE).to(dtype)
    bias = torch.randn(out, device=DEVICE).to(dtype)
    assert triton.supports(x, found, inner) and not triton.supports(g, found, out + 1)
    odd = torch.randn(2 * n, 3 * inner, device=DEVICE).to(dtype)[::2, 1::3]
    odd.copy_(x)
    pairs = [
        (triton.product(x, found), x.double() @ wide.T),
        (triton.product(odd, found, bias), x.double() @ wide.T + bias.double()),
        (triton.input_gradient(g, found), g.double() @ wide),
        (triton.input_gradient(g.T.contiguous().T, found), g.double() @ wide),
    ]
    for made, truth in pairs:
        assert made.shape == truth.shape and made.dtype == dtype
        if truth.numel():
            assert float((made.double() - truth).abs().max()) <= ROUNDING[dtype] * float(truth.abs().max())


def test_weights_of_other_shapes_are_left_to_plain_torch() -> None:
    x = torch.randn(3, 96, device=DEVICE)
    codes, absmax, nested, _ = quantize(torch.randn(5, 96, device=DEVICE))
    assert not triton.supports(x, Nf4Tensors(codes, absmax, nested, (5, 96)), 96)
