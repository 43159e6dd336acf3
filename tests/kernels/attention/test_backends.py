"""Which attention kernel is chosen for what, and that those of a GPU compute what the slow truth computes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attention_patterns import PATTERNS
from lorakeet.kernels.attention.backends import Kernels, choose_path, kernels_on, varlen_attention, window
from lorakeet.kernels.attention.segment import Pattern, segment_attention, segment_attention_reference

PLAIN = Pattern(causal=True)
NEW = frozenset({"query", "scale", "window_size", "enable_gqa"})  # of torch 2.12
OLDER = NEW - {"enable_gqa"}  # of torch 2.11
OLDEST = frozenset({"query", "is_causal"})  # of torch 2.10
FLASH = frozenset({"q", "softmax_scale", "window_size", "softcap", "dropout_p", "causal"})
H100 = Kernels(True, (9, 0), NEW)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("path", "kernels", "device", "dtype", "heads", "widths", "pattern"),
    [
        ("cpu", Kernels(cpu=True), "cpu", FP32, (8, 2), (64, 64), PLAIN),
        ("cpu", Kernels(cpu=True), "cpu", BF16, (8, 8), (64, 64), Pattern(causal=False, window=3)),
        ("batches", Kernels(cpu=False), "cpu", FP32, (8, 8), (64, 64), PLAIN),
        ("batches", Kernels(cpu=True), "cpu", FP32, (8, 8), (64, 32), PLAIN),
        ("batches", Kernels(cpu=True), "cpu", FP32, (8, 8), (64, 64), Pattern(causal=True, dropout=0.1)),
        ("capped", Kernels(cpu=True), "cpu", FP32, (8, 8), (64, 64), Pattern(causal=True, softcap=30.0)),
        ("batches", Kernels(cpu=True), "mps", FP16, (8, 8), (64, 64), PLAIN),
        ("varlen", H100, "cuda", BF16, (32, 8), (128, 128), PLAIN),
        ("varlen", H100, "cuda", FP16, (8, 8), (256, 256), Pattern(causal=True, window=5)),
        ("varlen", H100, "cuda", BF16, (8, 8), (40, 40), Pattern(causal=False, window=5)),
        ("batches", H100, "cuda", FP32, (8, 8), (64, 64), PLAIN),
        ("batches", H100, "cuda", BF16, (8, 8), (64, 32), PLAIN),
        ("batches", H100, "cuda", BF16, (8, 8), (20, 20), PLAIN),
        ("batches", H100, "cuda", BF16, (8, 8), (264, 264), PLAIN),
        ("batches", H100, "cuda", BF16, (8, 8), (64, 64), Pattern(causal=True, dropout=0.1)),
        ("capped", H100, "cuda", BF16, (8, 8), (64, 64), Pattern(causal=True, softcap=30.0)),
        ("batches", Kernels(True, (7, 5), NEW, FLASH), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("batches", Kernels(True, (8, 6), NEW, FLASH), "cuda", FP16, (8, 8), (256, 256), PLAIN),
        ("varlen", Kernels(True, (8, 6), NEW, FLASH), "cuda", FP16, (8, 8), (192, 192), PLAIN),
        ("varlen", Kernels(True, (8, 0), OLDER), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("batches", Kernels(True, (8, 0), OLDER), "cuda", FP16, (8, 2), (64, 64), PLAIN),
        ("flash_attn", Kernels(True, (8, 0), OLDER, FLASH), "cuda", FP16, (8, 2), (64, 64), PLAIN),
        ("batches", Kernels(True, (8, 0), OLDEST), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("flash_attn", Kernels(True, (8, 0), frozenset(), FLASH), "cuda", FP16, (8, 8), (64, 64), PLAIN),
        ("flash_attn", Kernels(True, (9, 0), NEW, FLASH), "cuda", FP16, (8, 8), (64, 64), Pattern(True, dropout=0.1)),
        ("flash_attn", Kernels(True, (9, 0), NEW, FLASH), "cuda", FP16, (8, 8), (64, 64), Pattern(True, softcap=9.0)),
        (
            "capped",
            Kernels(True, (9, 0), NEW, FLASH - {"softcap"}),
            *("cuda", FP16, (8, 8), (64, 64), Pattern(True, softcap=9.0)),
        ),
    ],
)
def test_the_path_is_chosen_by_what_there_is_and_what_is_asked(
    path: str, kernels: Kernels, device: str, dtype: torch.dtype, heads: Any, widths: Any, pattern: Pattern
) -> None:
    assert choose_path(kernels, device, dtype, heads, widths, pattern) == path


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern.softcap is None])
def test_windows_are_those_of_the_pattern(pattern: Pattern) -> None:
    length = 7
    before, after = window(pattern)
    ahead = torch.arange(length)
    distance = ahead[:, None] - ahead[None, :]
    sees = (distance <= (before if before >= 0 else length)) & (-distance <= (after if after >= 0 else length))
    expected = pattern.mask(length, torch.device("cpu"))
    if expected is None:
        expected = distance >= 0 if pattern.causal else torch.ones(length, length, dtype=torch.bool)
    assert torch.equal(sees, expected)


def test_what_there_is_on_a_cpu() -> None:
    assert kernels_on(torch.device("cpu")) == Kernels(cpu=True)


@pytest.mark.parametrize("shared", [4, 2])
def test_torchs_function_takes_what_it_is_given_forward_and_backward(shared: int) -> None:
    """Shapes alone, on the meta device: no GPU is needed to see that the call is the one that torch wants."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not set(inspect.signature(varlen.varlen_attn).parameters) >= {"scale", "window_size", "enable_gqa"}:
        pytest.skip("this torch's varlen attention is not used")
    rows = [torch.empty(9, n, 16, dtype=BF16, device="meta", requires_grad=True) for n in (4, shared, shared)]
    output = varlen_attention("varlen", rows[0], rows[1], rows[2], (2, 3, 4), Pattern(causal=True, window=2), 0.3)
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
def test_on_a_gpu_fast_is_slow(pattern: Pattern, shared: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    rows = [
        torch.randn(1, sum(LENGTHS), n, 64, generator=generator, device="cuda", dtype=dtype)
        for n in (4, shared, shared)
    ]
    kernels = kernels_on(rows[0].device)
    path = choose_path(kernels, "cuda", dtype, (4, shared), (64, 64), pattern)
    if kernels.capability >= (8, 0) and pattern.softcap is None and {"scale", "enable_gqa"} <= kernels.varlen:
        assert path == "varlen"
    for scale in (None, 0.3):
        found = outcome(segment_attention, rows, pattern, scale)
        exact = outcome(segment_attention_reference, [row.double() for row in rows], pattern, scale)
        near = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        for mine, true in zip(found, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == true.shape
            assert (mine.double() - true).norm() <= near * true.norm(), (path, scale)
