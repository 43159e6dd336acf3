"""A frozen linear layer against plain torch, and what it leaves behind in memory."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import frozen_linear as module
from lorakeet.kernels.cpu import features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.cpu.memory import transient_empty, workspace
from lorakeet.kernels.frozen_linear import frozen_linear, frozen_linear_reference, linear_out

NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def operands(shape: tuple[int, ...], out: int, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(4)
    made = [
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in (shape, (out, shape[-1]), (out,))
    ]
    return made[0], made[1], made[2] if bias else None


def outcome(function, x: Tensor, *rest) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    h = function(leaf, *rest)
    upstream = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).to(h.dtype).view(h.shape)
    before = upstream.clone()
    (dx,) = torch.autograd.grad(h, leaf, upstream)
    assert torch.equal(upstream, before) and torch.equal(leaf, x)
    return [h.detach(), dx]


@pytest.fixture(params=["torch", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who multiplies in fp32: torch's library, or the compiled tiles, whatever this processor is best at."""
    if request.param == "tiles" and not features.has(Feature.AVX2):
        pytest.skip("nothing is compiled for this processor")
    monkeypatch.setattr(gemm, "has_fast_f32", lambda: request.param == "tiles")
    return str(request.param)


@pytest.mark.parametrize("shape", [(5,), (1, 7), (3, 5), (2, 3, 33), (0, 4), (2, 0, 4), (300, 129)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", NEAR)
def test_forward_and_backward_equal_plain_torch(shape, bias, dtype, way) -> None:
    given = operands(shape, 131, bias, dtype)
    found, expected = outcome(frozen_linear, *given), outcome(frozen_linear_reference, *given)
    for mine, true in zip(found, expected, strict=True):
        assert mine.shape == true.shape and mine.dtype == true.dtype and mine.is_contiguous()
        torch.testing.assert_close(mine, true, rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("n", "depth", "columns"),
    [
        *((1, 1, 1), (17, 1, 40), (12, 640, 32), (25, 641, 65), (100, 1290, 63), (40, 2000, 131), (64, 7, 1)),
        *((30, 1024, 70), (13, 1023, 33), (29, 2049, 64)),  # rows of x that share sets of the cache are packed
    ],
)
def test_tiles_of_any_shape(n: int, depth: int, columns: int, turned: bool) -> None:
    """Blocks of the depth, strips, panels and the remainders of each, against fp64; the error is that of sums in fp32."""
    draw = torch.Generator().manual_seed(n)
    x, m, bias = (torch.randn(size, generator=draw) for size in ((n, depth), (depth, columns), (columns,)))
    right = torch.addmm(bias.double(), x.double(), m.double())
    given = m.T.contiguous().T if turned else m
    for b, expected in ((bias, right), (None, right - bias)):
        found = gemm.gemm_f32(x, given, b)
        assert found.shape == (n, columns) and found.dtype == torch.float32
        assert float((found - expected).abs().max()) < 1e-7 * depth + 1e-6


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
def test_tiles_pass_on_what_is_not_finite() -> None:
    x, m = torch.ones(20, 9), torch.ones(9, 70)
    x[3, 4], x[5, 0] = torch.nan, torch.inf
    found = gemm.gemm_f32(x, m)
    assert found[3].isnan().all() and found[5].isinf().all() and found.isfinite().all(1).sum() == 18


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
def test_tiles_read_nothing_beyond_their_factors() -> None:
    """The last value of each factor is the last of a page, and the next page may not be read."""
    script = (
        "import ctypes, mmap, torch\n"
        "from lorakeet.kernels.cpu import gemm\n"
        "libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE\n"
        "def at_end(rows, columns):\n"
        "    size = -(-4 * rows * columns // page) * page\n"
        "    memory = mmap.mmap(-1, size + page)\n"
        "    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
        "    assert libc.mprotect(ctypes.c_void_p(at + size), page, 0) == 0\n"
        "    count = rows * columns\n"
        "    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=size - 4 * count).view(rows, columns)\n"
        "for depth in (1, 17, 650, 1024):\n"
        "    for n in (*range(1, 14), 29):\n"
        "        x = at_end(n, depth).normal_()\n"
        "        for columns in (1, 16, 33):\n"
        "            m, turned = at_end(depth, columns).normal_(), at_end(columns, depth).normal_()\n"
        "            gemm.gemm_f32(x, m), gemm.gemm_f32(x, turned.T)\n"
        "print('alive', flush=True)\n"
        "import os; os._exit(0)\n"  # the memory is never given back
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "alive\n", (done.returncode, done.stderr)


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
def test_what_the_tiles_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens in fp32, in memory without gaps; all else is torch's."""
    taken: list[tuple[int, ...]] = []
    monkeypatch.setattr(gemm, "has_fast_f32", lambda: True)
    monkeypatch.setattr(gemm, "gemm_f32", lambda x, m, bias: taken.append(tuple(x.shape)) or x @ m)
    x, weight = torch.randn(40, 6), torch.randn(5, 6)
    for rows, m in ((x, weight.T), (x, weight.T.contiguous()), (x[:16], weight.T), (x.double(), weight.T.double())):
        torch.testing.assert_close(linear_out(rows, m, None), rows @ m)
    torch.testing.assert_close(linear_out(x[:, :4], weight[:, :4].T, None), x[:, :4] @ weight[:, :4].T)
    assert taken == [(40, 6), (40, 6)]
    with pytest.raises(RuntimeError):
        linear_out(x, torch.randn(5, 7), None)


def test_rows_and_gradients_that_do_not_lie_side_by_side(way) -> None:
    x, weight, bias = operands((64, 40), 48, True, torch.float32)
    found, expected = (outcome(f, x.T[:, :40], weight[:, :40], bias) for f in (frozen_linear, frozen_linear_reference))
    torch.testing.assert_close(found, expected)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(frozen_linear(leaf, weight), leaf, torch.ones(1, 1).expand(64, 48))
    torch.testing.assert_close(dx, weight.sum(0).expand(64, -1))


def test_what_is_not_frozen_or_not_alike_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._FrozenLinear, "apply", lambda *_: pytest.fail("not for these"))
    x, weight, bias = operands((3, 5), 7, True, torch.float32)
    assert bias is not None
    frozen_linear(x, weight.clone().requires_grad_(), bias).sum().backward()
    frozen_linear(x, weight, bias.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(x, weight, bias).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        frozen_linear(x, weight.double())


def test_the_result_may_be_overwritten() -> None:
    x, weight, _ = operands((2, 300, 64), 96, False, torch.float32)
    leaf = x.requires_grad_()
    frozen_linear(leaf, weight).mul_(2).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * weight.sum(0).expand(2, 300, -1))


def test_room_is_a_little_larger_each_time_less_so() -> None:
    like = torch.empty(0)
    sizes = [transient_empty(like, 1024, 1024).untyped_storage().nbytes() for _ in range(1200)]
    assert 1.02 * 4 * 1024 * 1024 > max(sizes) > min(sizes) >= 4 * 1024 * 1024 + 128
    steps = [a - b for a, b in itertools.pairwise(sizes)]
    assert sum(step < 96 for step in steps) <= 3, "but for the few times that it begins anew, what is next fits"
    assert transient_empty(like, 3, 5).untyped_storage().nbytes() == 60
    assert transient_empty(like, 0, 5).shape == (0, 5) and transient_empty(like.half(), 300, 700).dtype == torch.float16
    assert not transient_empty(like, 300, 70)._is_view()


def test_a_workspace_is_each_threads_own() -> None:
    import threading

    mine = workspace(100, torch.int16)
    assert mine.shape == (100,) and workspace(50, torch.int8).data_ptr() == mine.data_ptr()
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(workspace(100, torch.int16).data_ptr()))
    thread.start()
    thread.join()
    assert other != [mine.data_ptr()]


FRAGMENTATION = """
import ctypes, sys, torch
from lorakeet.kernels.cpu.memory import transient_empty

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h hblkhd u f uordblks fordblks keepcost".split()]

told = ctypes.CDLL(None).mallinfo2
told.restype = Info
torch.empty(30 << 18)  # from here on tensors of this size lie in the heap
make = transient_empty if sys.argv[1] == "transient" else lambda like, *shape: like.new_empty(shape)
kept, like = [], torch.empty(0)
before = told().fordblks
for layer in range(30):
    soon = make(like, 640, 576)
    kept.append(torch.empty(640, 576))
    del soon
    kept.extend(bytes(200) for _ in range(100))
print((told().fordblks - before) / 1e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")
def test_transient_results_do_not_fragment_the_heap() -> None:
    def fragmentation(way: str) -> float:
        done = subprocess.run([sys.executable, "-c", FRAGMENTATION, way], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert fragmentation("transient") < 4, "megabytes, of 44 that passed"
