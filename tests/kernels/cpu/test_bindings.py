"""The compiled loops against the same in plain torch, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.int8 import linear

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
def test_few_rows(shape: tuple[int, int, int], biased: bool) -> None:
    n, out, inner = shape
    torch.manual_seed(n + out)
    weight, scale = linear.quantize_rows(torch.randn(out, inner))
    x, bias = torch.randn(n, inner), torch.randn(out) if biased else None
    for columns in (None, torch.logspace(-3, 3, inner, 2)):
        scales = scale if columns is None else torch.cat((scale, columns))
        truth = x.double() @ linear.dequantize(weight, scales, torch.float64).T + (bias.double() if biased else 0)
        close(bindings.few_rows(x, weight, scale, columns, bias).double(), truth, 3e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_a_number(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the row that has it and in no other; by the compiled loops and without them."""
    weight, scale = linear.quantize_rows(torch.randn(8, 40))
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    for rows in (3, 20):
        for compiled in (True, False):
            x = torch.randn(rows, 40)
            x[1, 7] = value
            with monkeypatch.context() as patch:
                if not compiled:
                    patch.setattr(bindings, "usable", lambda *_: False)
                h = linear.product(x, weight, scale)
            assert not h[1].isfinite().any() and h[[i for i in range(rows) if i != 1]].isfinite().all()


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("backend", ["vnni", "pairs"])
def test_what_does_not_fit_is_an_error_and_not_other_memory(
    rows: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: backend)
    weight, scale = linear.quantize_rows(torch.randn(8, 40))
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
    half = linear.product(x, weight, scale.bfloat16(), bias)  # a scale that was cast is read as what it is
    assert float((half - linear.product(x, weight, scale, bias)).abs().max()) < 0.1


def test_nothing_is_read_beyond_the_weight() -> None:
    """The weight's last byte is the last of a page, and the next page may not be read: to do so would end the process."""
    script = (
        "import ctypes, mmap, torch\n"
        "from lorakeet.kernels.cpu import bindings as native\nfrom lorakeet.kernels.int8 import linear as int8\n"
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
        "        native.few_rows(x, w, s, c, s)\n"
        "        if native.has_pairs():\n"
        "            native.pair_product(x, w, s, c, s), native.pair_gradient(g, w, s, c)\n"
        "            native.group_gradient(g, w, s, c)\n"
        "print('alive', flush=True)\n"
        "import os; os._exit(0)\n"  # the memory is never given back
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "alive\n", (done.returncode, done.stderr)


def test_without_a_compiler_all_goes_on(tmp_path: Path) -> None:
    script = (
        "import torch\n"
        "from lorakeet.kernels.cpu import bindings as native\nfrom lorakeet.kernels.int8 import linear as int8\n"
        "w, s = int8.quantize_rows(torch.randn(20, 30))\n"
        "x = torch.randn(3, 30)\n"
        "assert native.library() is None\n"
        "assert torch.allclose(int8.product(x, w, s), int8.int8_linear_reference(x, w, s), atol=1e-5)\n"
    )
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    for change, told in (({"CC": str(broken)}, "no such luck"), ({"LORAKEET_NATIVE": "0"}, "")):
        env = {**os.environ, "LORAKEET_HOME": str(tmp_path / "home"), **change}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr and not list(tmp_path.glob("home/native/*"))


def test_it_is_compiled_once(tmp_path: Path) -> None:
    script = "from lorakeet.kernels.cpu import bindings as native; assert native.library() is not None"
    env = {**os.environ, "LORAKEET_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", script], env=env) for _ in range(2)]  # at the same time
    assert [process.wait() for process in both] == [0, 0]
    (file,) = tmp_path.glob("native/*")
    before = file.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("native/*")] == [before]
