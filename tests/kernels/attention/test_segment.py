"""Attention within samples that lie end to end: the fast paths against the dense one, forward and backward."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.attention_patterns import PATTERNS
from lorakeet.kernels.attention import cpu
from lorakeet.kernels.attention.pattern import Pattern
from lorakeet.kernels.attention.segment import segment_attention, segment_attention_reference

LENGTHS = (1, 1, 3, 4, 4, 11)


def heads(count: int = 4, shared: int = 4, width: int = 8, value: int = 8, total: int = sum(LENGTHS)) -> list[Tensor]:
    """q, k, v [1, heads, total, width] as the linear layers leave them: a view of [1, total, heads·width]."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((count, width), (shared, width), (shared, value))
    rows = [torch.randn(1, total, n, d, generator=generator, dtype=torch.float64) for n, d in shapes]
    return [row.requires_grad_() for row in rows]


def both(rows: list[Tensor], lengths: tuple[int, ...], pattern: Pattern, scale: float | None = None) -> None:
    """Compares outputs and gradients of fast and slow."""
    results = []
    for attention in (segment_attention, segment_attention_reference):
        output = attention(*(row.transpose(1, 2) for row in rows), lengths, pattern, scale)
        weight = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
        results.append((output, *torch.autograd.grad(output, rows, weight)))
    for fast, slow in zip(*results, strict=True):
        assert fast.shape == slow.shape and fast.dtype == slow.dtype
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fast_is_slow(pattern: Pattern, shared: int) -> None:
    both(heads(shared=shared), LENGTHS, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", [(24,), (1,) * 24, (5, 0, 7, 0, 12), (12, 3, 5, 4)])
def test_odd_lengths_and_scales(lengths: tuple[int, ...], pattern: Pattern) -> None:
    both(heads(shared=2), lengths, pattern, scale=0.9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_of_another_width(pattern: Pattern) -> None:
    both(heads(shared=2, value=6), LENGTHS, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_stay_near(dtype: torch.dtype) -> None:
    wide = [row.detach().to(dtype).transpose(1, 2) for row in heads(shared=2)]
    exact = segment_attention_reference(*(t.double() for t in wide), LENGTHS, Pattern(causal=True))
    found = segment_attention(*wide, LENGTHS, Pattern(causal=True))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(causal=True, dropout=0.4)])
def test_no_sample_sees_another(pattern: Pattern) -> None:
    rows = [row.detach().transpose(1, 2) for row in heads()]
    torch.manual_seed(0)
    before = segment_attention(*rows, LENGTHS, pattern)
    changed = [row.clone() for row in rows]
    for row in changed:
        row[:, :, 5:9] = torch.inf  # the first sample of four positions; one leak and all is NaN
    torch.manual_seed(0)
    after = segment_attention(*changed, LENGTHS, pattern)
    others = [*range(5), *range(9, sum(LENGTHS))]
    assert torch.equal(after[:, others], before[:, others])


def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask() -> None:
    q, k, v = (row.detach().transpose(1, 2) for row in heads())
    for softcap in (None, 2.0):
        pattern = Pattern(causal=True, dropout=0.25, softcap=softcap)
        draws = torch.stack([segment_attention(q, k, v, LENGTHS, pattern) for _ in range(400)])
        exact = segment_attention_reference(q, k, v, LENGTHS, pattern)
        assert (draws.mean(0) - exact).abs().max() < 5 * draws.std(0).max() / 400**0.5
        learned = v.clone().requires_grad_()
        output = segment_attention(q, k, learned, LENGTHS, pattern)
        (gradient,) = torch.autograd.grad((output * 2).sum(), learned)  # o is linear in v: <∂v, v> = 2 Σ o
        torch.testing.assert_close((gradient * v).sum(), 2 * output.sum())


class Calls(TorchDispatchMode):
    """Counts attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "attention" in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_samples_of_one_length_are_one_call_and_nothing_is_quadratic_in_the_row() -> None:
    rows = heads(shared=2, total=96 * 10)
    lengths = (10,) * 90 + (60,)
    with Calls() as calls:
        output = segment_attention(*(row.transpose(1, 2) for row in rows), lengths, Pattern(causal=True))
        assert output.grad_fn is not None
        (node, _), *_ = output.grad_fn.next_functions  # the output gets its first axis last
        kept = sum(tensor.numel() for tensor in node.saved_tensors)  # type: ignore[union-attr]
        output.sum().backward()
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert [name.partition(".")[0] for name in calls.names] == [kernel] * 2 + [kernel + "_backward"] * 2
    assert kept <= 3.2 * rows[0].numel()  # q, o; k and v with half the heads; one sum for each row of scores


FIT = (16, 48, 64, 128)  # widths that the compiled loops take
KEYS = 256  # that the loops take at a time
LONG = (1, 1, 0, 3, 4, 4, 37, KEYS, KEYS + 1, 90, 2 * KEYS + 5)
SEEN = [pattern for pattern in PATTERNS if pattern.softcap is None]
SEEN += [Pattern(causal=True, window=40), Pattern(causal=True, window=300), Pattern(causal=False, window=270)]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("width", FIT)
@pytest.mark.parametrize("pattern", SEEN)
@pytest.mark.parametrize(("count", "shared"), [(6, 2), (3, 3)])
def test_samples_in_fp32(pattern: Pattern, width: int, count: int, shared: int) -> None:
    rows = [t.detach().float().requires_grad_() for t in heads(count, shared, width, width, total=sum(LONG))]
    exact = [t.detach().double().requires_grad_() for t in rows]
    results = []
    for given, attention in ((rows, segment_attention), (exact, segment_attention_reference)):
        output = attention(*(row.transpose(1, 2) for row in given), LONG, pattern, 0.2)
        weight = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output).sin().to(output.dtype)
        results.append((output, *torch.autograd.grad(output, given, weight)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), slow, rtol=0, atol=4e-6 * max(float(slow.detach().abs().max()), 4.0))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
def test_samples_in_fp32_need_no_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [t.detach().float().requires_grad_() for t in heads(width=16, value=16)]
    with Calls() as calls:
        segment_attention(*(row.transpose(1, 2) for row in rows), LENGTHS, Pattern(causal=True)).sum().backward()
    assert calls.names == []
    summed = [row.grad for row in rows]  # of a gradient whose strides are all 0
    output = segment_attention(*(row.transpose(1, 2) for row in rows), LENGTHS, Pattern(causal=True))
    for one, other in zip(summed, torch.autograd.grad(output, rows, torch.ones_like(output)), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(cpu, "supports", lambda *_: False)
    with Calls() as calls:
        segment_attention(*(row.transpose(1, 2) for row in rows), LENGTHS, Pattern(causal=True))
    assert calls.names


@pytest.mark.parametrize("pattern", SEEN)
def test_no_sample_sees_another_in_fp32(pattern: Pattern) -> None:
    rows = [row.detach().float().requires_grad_() for row in heads(width=16, value=16)]
    changed = [row.detach().clone() for row in rows]
    for row in changed:
        row[:, 5:9] = torch.inf  # the first sample of four positions; one leak and all is NaN
    results = []
    for given in (rows, [row.requires_grad_() for row in changed]):
        output = segment_attention(*(row.transpose(1, 2) for row in given), LENGTHS, pattern)
        results.append((output, *torch.autograd.grad(output, given, torch.ones_like(output))))
    others = [*range(5), *range(9, sum(LENGTHS))]
    for before, after in zip(*results, strict=True):
        assert torch.equal(after[:, others], before[:, others])


def test_one_fused_projection_is_read_where_it_lies() -> None:
    fused = torch.randn(1, sum(LENGTHS), 3, 4, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = []
    for given, attention in ((fused, segment_attention), (fused.double(), segment_attention_reference)):
        output = attention(*(part.transpose(1, 2) for part in given.unbind(2)), LENGTHS, Pattern(causal=True))
        results.append((output, *torch.autograd.grad(output.square().sum(), fused)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast.double(), slow.double(), rtol=0, atol=2e-6 * float(slow.detach().abs().max()))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
def test_a_broken_value_stays_broken_in_fp32() -> None:
    rows = [row.detach().float() for row in heads(width=16, value=16)]
    rows[0][0, 7, 2, 3] = torch.nan
    output = segment_attention(*(row.transpose(1, 2) for row in rows), LENGTHS, Pattern(causal=True))
    seen = output.isnan().any(-1)[0]
    assert seen.nonzero().tolist() == [[7, 2]]


def test_values_of_a_head_that_do_not_lie_side_by_side() -> None:
    rows = [row.detach().float() for row in heads(width=16, value=16)]
    apart = [torch.stack((row, row), dim=-1)[..., 0] for row in rows]
    found, wanted = (
        segment_attention(*(row.transpose(1, 2) for row in given), LENGTHS, Pattern(causal=True))
        for given in (apart, rows)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
def test_the_loops_are_not_told_to_read_what_is_not_there() -> None:
    q, k, v = torch.randn(24, 4, 16), torch.randn(24, 2, 16), torch.randn(24, 2, 16)
    assert cpu.supports(q, k, v, (20, 4))
    assert not cpu.supports(q, k, v, (20, 5)) and not cpu.supports(q, k, v, (20,))
    assert not cpu.supports(q, k[:23], v[:23], (20, 4)) and not cpu.supports(q, k, v[:, :1], (20, 4))
    assert not cpu.supports(q[:, :3], k, v, (20, 4)) and not cpu.supports(q, k[..., :8], v[..., :8], (20, 4))
    assert not cpu.supports(q.double(), k.double(), v.double(), (20, 4))
    assert not cpu.supports(*(torch.stack((t, t), -1)[..., 0] for t in (q, k, v)), (20, 4))
    wide = [torch.randn(24, 2, 144)] * 3
    assert not cpu.supports(*wide, (24,)) and not cpu.supports(q[:0], k[:0], v[:0], ())
    rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
    with pytest.raises(RuntimeError, match="split"):
        segment_attention(*rows, (20, 5), Pattern(causal=True))
