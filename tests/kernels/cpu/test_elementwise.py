"""The compiled loops over activations: that they are what runs, and that they give what plain torch gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import dropout as drop
from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.glu import gated
from lorakeet.kernels.rms_norm import rms_norm
from lorakeet.kernels.rotary import rotary

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
SIZES = [1, 7, 8, 9, 33, 200, 40_001]  # the last is shared by threads


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def outcome(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in given]
    h = function(*leaves)
    return [h, *torch.autograd.grad(h, leaves, random(*h.shape, seed=9).to(h.dtype))]


def in_loops_and_in_torch(monkeypatch: Any, names: set[str], function: Callable[..., Tensor], *given: Tensor) -> None:
    """Compares the two ways in fp32 with plain torch's in fp64, and asserts that the loops called ``names`` ran."""
    ran = set()

    def named(name: str) -> Callable[..., Any]:
        loop = getattr(bindings, name)

        def call(*args: Any) -> Any:
            ran.add(name)
            return loop(*args)

        return call

    with monkeypatch.context() as patch:
        for name in bindings.ELEMENTWISE:
            patch.setattr(bindings, name, named(name))
        fast = outcome(function, *given)
    assert ran == names
    with monkeypatch.context() as patch:
        patch.setattr(bindings, "supports", lambda *_: False)
        slow = outcome(function, *given)
        exact = outcome(function, *(t.double() for t in given))
    for mine, plain, true in zip(fast, slow, exact, strict=True):
        most = max(float(true.detach().abs().max()), 1.0)  # of one column: ∂x is almost 0
        torch.testing.assert_close(plain.double(), true, rtol=4e-6, atol=1e-6 * most)
        torch.testing.assert_close(mine.double(), true, rtol=4e-6, atol=1e-6 * most)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(monkeypatch: Any, kind: Any, size: int) -> None:
    names = {"gated", "gated_backward"}
    in_loops_and_in_torch(monkeypatch, names, lambda a, b: gated(a, b, kind), random(1, size), random(1, size, seed=4))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_far_out(kind: Any) -> None:
    far = torch.tensor([-1e4, -200.0, -90.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e4])
    found = outcome(lambda a, b: gated(a, b, kind), far, torch.ones(12))
    wanted = outcome(lambda a, b: gated(a, b, kind), far.double(), torch.ones(12).double())
    for mine, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)
    broken = torch.tensor([1.0, torch.nan, 2.0, torch.inf, *[0.5] * 9])
    h = gated(broken, torch.ones(13), kind)
    assert h.isnan().tolist() == [False, True, *[False] * 11] and h[3] == torch.inf


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 576), (2, 3, 33), (90, 500)])
@pytest.mark.parametrize("one_more", [False, True])
def test_rms_norm(monkeypatch: Any, shape: tuple[int, ...], one_more: bool) -> None:
    weight = random(shape[-1], seed=5)

    def norm(x: Tensor) -> Tensor:
        return rms_norm(x, weight.to(x.dtype), 1e-3, one_more)

    in_loops_and_in_torch(monkeypatch, {"rms_norm", "rms_norm_backward"}, norm, random(*shape))


def test_rms_norm_whose_weight_learns_has_the_gradient_of_both(monkeypatch: Any) -> None:
    in_loops_and_in_torch(
        monkeypatch, {"rms_norm"}, lambda x, w: rms_norm(x, w, 1e-3), random(5, 40), random(40, seed=5)
    )


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (7, 3, 10), (33, 9, 64), (80, 8, 64)])
def test_rotary(monkeypatch: Any, tokens: int, heads: int, width: int) -> None:
    cos, sin = random(1, 1, tokens, width, seed=5), random(1, 1, tokens, width, seed=6)

    def turn(x: Tensor) -> Tensor:
        heads_beside = x.transpose(1, 2)
        return rotary(heads_beside, cos.to(x.dtype), sin.to(x.dtype)).transpose(1, 2)

    in_loops_and_in_torch(monkeypatch, {"rotary"}, turn, random(1, tokens, heads, width))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999999])
@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 5])
def test_dropout_is_that_of_its_mask(monkeypatch: Any, seed: int, p: float, size: int) -> None:
    x, y = random(size, 1), random(size, 1, seed=4)
    mask = drop.keep_mask(seed, x.shape, p, x.device)
    assert torch.equal(drop.dropped(x, p, seed), drop.dropout_reference(x, mask, p))
    added = y.clone()
    assert drop.plus_dropped(added, x, p, seed) is added
    torch.testing.assert_close(added, y + drop.dropout_reference(x, mask, p), rtol=1e-6, atol=1e-6 * drop.keep_scale(p))
    monkeypatch.setattr(bindings, "supports", lambda *_: False)
    assert torch.equal(drop.dropped(x, p, seed), drop.dropout_reference(x, mask, p))


def test_masks_look_random() -> None:
    shape = torch.Size((600, 700))

    def drawn(seed: int) -> Tensor:
        return drop.keep_mask(seed, shape, 0.25, torch.device("cpu")).double() - 0.75

    one, five = drawn(1), 5 * (0.25 * 0.75 / shape.numel()) ** 0.5
    assert abs(float(one.mean())) < five
    assert float(one.mean(0).abs().max()) < five * 700**0.5 and float(one.mean(1).abs().max()) < five * 600**0.5
    others = [drawn(seed) for seed in (0, 2, 3, 1 + (1 << 32), 1 + (1 << 62), -1, 12345, 54321)]
    others += [one.roll(shift, axis) for shift in (1, 2, 8, 64) for axis in (0, 1)]
    others += [drawn(2).flatten().roll(shift).view(shape) for shift in (-1, 1)]
    for other in others:
        assert abs(float((one * other).mean())) < 5 * 0.1875 / shape.numel() ** 0.5


def test_what_the_loops_cannot_read_is_left_to_torch(monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("read as if it lay in one piece, in fp32")

    for name in bindings.ELEMENTWISE:
        monkeypatch.setattr(bindings, name, fail)
    wide = random(6, 40)
    gated(wide[:, ::2], wide[:, 1::2], "silu")
    gated(wide.double(), wide.double(), "silu")
    gated(wide[:0], wide[:0], "silu")
    rms_norm(wide.T, torch.ones(6), 1e-3)
    rms_norm(wide.bfloat16(), torch.ones(40), 1e-3)
    rms_norm(wide, torch.ones(1), 1e-3)  # a weight that would be read beyond its end
    angles = random(1, 1, 6, 40)
    rotary(random(1, 3, 6, 40), angles, angles)  # tokens of one head beside each other
    rotary(random(2, 6, 3, 40).transpose(1, 2), angles, angles)
    drop.dropped(wide.T, 0.1, 1)
