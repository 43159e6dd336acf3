"""The choice of an attention back end; the GPU back ends against the reference."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attention_patterns import PATTERNS
from lorakeet.kernels.attention.backends import AvailableKernels, available_kernels, choose_backend, packed_attention
from lorakeet.kernels.attention.pattern import Pattern
from lorakeet.kernels.attention.segment import segment_attention, segment_attention_reference

PLAIN = Pattern(causal=True)
NEW = frozenset({"query", "scale", "window_size", "enable_gqa"})  # of torch 2.12
OLDER = NEW - {"enable_gqa"}  # of torch 2.11
OLDEST = frozenset({"query", "is_causal"})  # of torch 2.10
FLASH = frozenset({"q", "softmax_scale", "window_size", "softcap", "dropout_p", "causal"})
H100 = AvailableKernels(True, (9, 0), NEW)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("backend", "kernels", "device", "dtype", "heads", "widths", "pattern"),
    [
        ("cpu", AvailableKernels(cpu=True), "cpu", FP32, (8, 2), (64, 64), PLAIN),
        ("cpu", AvailableKernels(cpu=True), "cpu", BF16, (8, 8), (64, 64), Pattern(causal=False, window=3)),
        ("sdpa", AvailableKernels(cpu=False), "cpu", FP32, (8, 8), (64, 64), PLAIN),
        ("sdpa", AvailableKernels(cpu=True), "cpu", FP32, (8, 8), (64, 32), PLAIN),
        ("sdpa", AvailableKernels(cpu=True), "cpu", FP32, (8, 8), (64, 64), Pattern(causal=True, dropout=0.1)),
        ("softcap", AvailableKernels(cpu=True), "cpu", FP32, (8, 8), (64, 64), Pattern(causal=True, softcap=30.0)),
        ("sdpa", AvailableKernels(cpu=True), "mps", FP16, (8, 8), (64, 64), PLAIN),
        ("torch_varlen", H100, "cuda", BF16, (32, 8), (128, 128), PLAIN),
        ("torch_varlen", H100, "cuda", FP16, (8, 8), (256, 256), Pattern(causal=True, window=5)),
        ("torch_varlen", H100, "cuda", BF16, (8, 8), (40, 40), Pattern(causal=False, window=5)),
        ("sdpa", H100, "cuda", FP32, (8, 8), (64, 64), PLAIN),
        ("sdpa", H100, "cuda", BF16, (8, 8), (64, 32), PLAIN),
        ("sdpa", H100, "cuda", BF16, (8, 8), (20, 20), PLAIN),
        ("sdpa", H100, "cuda", BF16, (8, 8), (264, 264), PLAIN),
        ("sdpa", H100, "cuda", BF16, (8, 8), (64, 64), Pattern(causal=True, dropout=0.1)),
        ("softcap", H100, "cuda", BF16, (8, 8), (64, 64), Pattern(causal=True, softcap=30.0)),
        ("sdpa", AvailableKernels(True, (7, 5), NEW, FLASH), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("sdpa", AvailableKernels(True, (8, 6), NEW, FLASH), "cuda", FP16, (8, 8), (256, 256), PLAIN),
        ("torch_varlen", AvailableKernels(True, (8, 6), NEW, FLASH), "cuda", FP16, (8, 8), (192, 192), PLAIN),
        ("torch_varlen", AvailableKernels(True, (8, 0), OLDER), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("sdpa", AvailableKernels(True, (8, 0), OLDER), "cuda", FP16, (8, 2), (64, 64), PLAIN),
        ("flash_attn", AvailableKernels(True, (8, 0), OLDER, FLASH), "cuda", FP16, (8, 2), (64, 64), PLAIN),
        ("sdpa", AvailableKernels(True, (8, 0), OLDEST), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("flash_attn", AvailableKernels(True, (8, 0), frozenset(), FLASH), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        (
            "flash_attn",
            AvailableKernels(True, (9, 0), NEW, FLASH),
            "cuda",
            FP16,
            (8, 8),
            (64, 64),
            Pattern(True, dropout=0.1),
        ),
        (
            "flash_attn",
            AvailableKernels(True, (9, 0), NEW, FLASH),
            "cuda",
            FP16,
            (8, 8),
            (64, 64),
            Pattern(True, softcap=9.0),
        ),
        (
            "softcap",
            AvailableKernels(True, (9, 0), NEW, FLASH - {"softcap"}),
            *("cuda", FP16, (8, 8), (64, 64), Pattern(True, softcap=9.0)),
        ),
    ],
)
def test_the_back_end_follows_from_kernels_and_pattern(
    backend: str, kernels: AvailableKernels, device: str, dtype: torch.dtype, heads: Any, widths: Any, pattern: Pattern
) -> None:
    assert choose_backend(kernels, device, dtype, heads, widths, pattern) == backend


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern.softcap is None])
def test_windows_are_those_of_the_pattern(pattern: Pattern) -> None:
    length = 7
    before, after = pattern.window_size()
    ahead = torch.arange(length)
    distance = ahead[:, None] - ahead[None, :]
    sees = (distance <= (before if before >= 0 else length)) & (-distance <= (after if after >= 0 else length))
    expected = pattern.mask(length, torch.device("cpu"))
    if expected is None:
        expected = distance >= 0 if pattern.causal else torch.ones(length, length, dtype=torch.bool)
    assert torch.equal(sees, expected)


def test_the_kernels_of_a_cpu() -> None:
    assert available_kernels(torch.device("cpu")) == AvailableKernels(cpu=True)


@pytest.mark.parametrize("shared", [4, 2])
def test_torchs_function_accepts_our_call_forward_and_backward(shared: int) -> None:
    """Shapes alone, on the meta device: no GPU is needed to see that the call is the one that torch wants."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not set(inspect.signature(varlen.varlen_attn).parameters) >= {"scale", "window_size", "enable_gqa"}:
        pytest.skip("this torch's varlen attention is not used")
    rows = [torch.empty(9, n, 16, dtype=BF16, device="meta", requires_grad=True) for n in (4, shared, shared)]
    output = packed_attention("torch_varlen", rows[0], rows[1], rows[2], (2, 3, 4), Pattern(causal=True, window=2), 0.3)
    assert output.shape == (9, 4, 16) and output.dtype == BF16
    output.sum().backward()
    assert [row.grad.shape for row in rows if row.grad is not None] == [row.shape for row in rows]


# ---- on a GPU -------------------------------------------------------------------------------------------------------

LENGTHS = (1, 1, 3, 64, 64, 200, 129)


def outcome(attention: Any, rows: list[Tensor], pattern: Pattern, scale: float | None) -> list[Tensor]:
    leaves = [row.detach().clone().requires_grad_() for row in rows]
    output = attention(*(leaf.transpose(1, 2) for leaf in leaves), LENGTHS, pattern, scale)
    weight = torch.linspace(-1, 2, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, weight)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gpu_back_ends_equal_the_reference(pattern: Pattern, shared: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    rows = [
        torch.randn(1, sum(LENGTHS), n, 64, generator=generator, device="cuda", dtype=dtype)
        for n in (4, shared, shared)
    ]
    kernels = available_kernels(rows[0].device)
    backend = choose_backend(kernels, "cuda", dtype, (4, shared), (64, 64), pattern)
    if kernels.capability >= (8, 0) and pattern.softcap is None and {"scale", "enable_gqa"} <= kernels.varlen:
        assert backend == "torch_varlen"
    for scale in (None, 0.3):
        found = outcome(segment_attention, rows, pattern, scale)
        exact = outcome(segment_attention_reference, [row.double() for row in rows], pattern, scale)
        near = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        for mine, true in zip(found, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == true.shape
            assert (mine.double() - true).norm() <= near * true.norm(), (backend, scale)
