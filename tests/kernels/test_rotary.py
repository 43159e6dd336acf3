"""Rotary embedding: the fast path against the slow one, forward and backward, and what it moves and keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorakeet.kernels.rotary import rotary, rotary_reference

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def given(rows: int, heads: int, width: int, dtype: torch.dtype = torch.float64, tied: bool = False) -> list[Tensor]:
    """x [1, heads, rows, width] as a linear layer leaves it, cos and sin [1, 1, rows, width]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, rows, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, rows, width, generator=generator, dtype=torch.float64)
    if tied:  # one angle in both halves
        cos, sin = (torch.cat([t[..., : width // 2]] * 2, dim=-1) for t in (cos, sin))
    return [t.to(dtype) for t in (x, cos, sin)]


def outcome(turn: Turn, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = turn(leaf, cos, sin)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaf, weight)]


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 2), (7, 3, 10), (5, 4, 64), (0, 2, 8)])
def test_fast_is_slow(rows: int, heads: int, width: int) -> None:
    for tied in (True, False):  # angles that differ between the halves too
        values = given(rows, heads, width, tied=tied)
        for fast, slow in zip(outcome(rotary, *values), outcome(rotary_reference, *values), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("dtype", "angles"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16)])
def test_narrow_dtypes_are_no_further_from_the_truth_than_the_slow_one(dtype: torch.dtype, angles: torch.dtype) -> None:
    x, cos, sin = given(33, 3, 16)
    values = x.to(dtype), cos.to(angles), sin.to(angles)
    exact = outcome(rotary_reference, *(t.double() for t in values))
    fast, slow = outcome(rotary, *values), outcome(rotary_reference, *values)
    for mine, plain, true in zip(fast, slow, exact, strict=True):
        assert mine.dtype == plain.dtype
        assert (mine.double() - true).norm() <= 1.01 * (plain.double() - true).norm() + 1e-12


def test_it_is_what_the_gradient_checker_expects() -> None:
    x, cos, sin = given(3, 2, 6)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x.requires_grad_())


def test_what_is_learned_or_narrower_runs_as_the_reference() -> None:
    x, cos, sin = given(4, 2, 8, torch.float32)
    one = cos[..., :1]  # the same angle in all columns
    torch.testing.assert_close(rotary(x, one, one), rotary_reference(x, one, one))
    cos.requires_grad_()
    (gradient,) = torch.autograd.grad(rotary(x, cos, sin).sum(), cos)
    torch.testing.assert_close(gradient, x.sum(1, keepdim=True))


class Moved(TorchDispatchMode):
    """Bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if not func.is_view and not any("view" in str(tag) for tag in func.tags):
            self.bytes += sum(t.nbytes for t in tree_iter((args, kwargs or {}, made)) if isinstance(t, Tensor))
        return made


def test_half_the_bytes_are_moved_and_no_more_are_kept() -> None:
    x, cos, sin = given(50, 6, 32, torch.float32, tied=True)
    moved: dict[Any, int] = {}
    kept: dict[Any, int] = {}
    for turn in (rotary, rotary_reference):
        seen: dict[int, int] = {}

        def keep(t: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaf = x.clone().requires_grad_()
        weight = torch.ones_like(x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), Moved() as mode:
            torch.autograd.grad(turn(leaf, cos, sin), leaf, weight)
        moved[turn], kept[turn] = mode.bytes, sum(seen.values())
    assert kept[rotary] <= kept[rotary_reference] == cos.nbytes + sin.nbytes
    assert moved[rotary] <= 0.55 * moved[rotary_reference], moved
