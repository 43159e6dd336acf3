"""The build of the C library: without a compiler, at the same time in two processes, its symbols and its warnings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lorakeet.kernels.cpu import build

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    script = (
        "import torch\n"
        "from lorakeet.kernels.cpu import build\nfrom lorakeet.kernels.int8 import linear\n"
        "from lorakeet.kernels.int8.format import quantize_rows\n"
        "from lorakeet.kernels.int8.reference import int8_linear_reference\n"
        "w, s = quantize_rows(torch.randn(20, 30))\n"
        "x = torch.randn(3, 30)\n"
        "assert build.library() is None\n"
        "assert torch.allclose(linear.product(x, w, s), int8_linear_reference(x, w, s), atol=1e-5)\n"
    )
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    for change, message in (({"CC": str(broken)}, "no such compiler"), ({"LORAKEET_NATIVE": "0"}, "")):
        env = {**os.environ, "LORAKEET_HOME": str(tmp_path / "home"), **change}
        env.pop("LORAKEET_CPU_FEATURES", None)  # a feature of the loops could be named, and none is compiled
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert message in done.stderr and not list(tmp_path.glob("home/native/*"))


def test_it_is_compiled_once(tmp_path: Path) -> None:
    script = "from lorakeet.kernels.cpu import build; assert build.library() is not None"
    env = {**os.environ, "LORAKEET_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", script], env=env) for _ in range(2)]  # at the same time
    assert [process.wait() for process in both] == [0, 0]
    (file,) = tmp_path.glob("native/*.so")
    before = file.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("native/*.so")] == [before]


@pytest.mark.parametrize("works", [True, False])
def test_the_library_is_compiled_ahead_and_a_failure_warns_where_it_is_loaded(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    made = 'for word; do last=$before; before=$word; [ "$last" = -o ] && : > "$word"; done'
    compiler.write_text(f"#!/bin/sh\n{made if works else 'echo no such thing >&2; exit 1'}\nexit 0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path))
    monkeypatch.setattr(build, "library", cache(build.library.__wrapped__))
    build.compile_meanwhile().join()
    assert len(list(tmp_path.glob("native/*.so"))) == works and not caplog.text
    if not works:
        assert build.library() is None
        assert "the C loops cannot be compiled (no such thing)" in caplog.text


def test_a_cache_that_cannot_be_written_changes_no_bit(tmp_path: Path) -> None:
    """The loops are compiled for one process: plain torch rounds differently, so a resumed run would differ."""
    (tmp_path / "native").write_text("a file where the folder of the cache belongs")
    script = (
        "from lorakeet.kernels.cpu import build; assert build.library() is not None; print(build.library_version())"
    )
    env = {**os.environ, "LORAKEET_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == build.library_version() and [path.name for path in tmp_path.iterdir()] == ["native"]


def test_only_prefixed_symbols_are_exported(tmp_path: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    made = tmp_path / "library.so"
    build.compile_library(os.environ.get("CC", "cc"), made)
    listed = subprocess.run([nm, "-D", "--defined-only", str(made)], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listed.splitlines()}
    assert "lk_gemv_w8" in symbols and {name for name in symbols if not name.startswith("lk_")} <= {"_init", "_fini"}


@pytest.mark.parametrize("march", ["native", "x86-64-v3", "skylake-avx512", "x86-64"])
def test_no_warnings(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users' builds do not ask for warnings: a compiler that knows new ones must not stop them."""
    if march != "native" and build.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("another architecture")
    monkeypatch.setenv("LORAKEET_CFLAGS", f"-O1 -march={march} -Wall -Wextra -Werror -Wno-psabi")
    build.compile_library(os.environ.get("CC", "cc"), tmp_path / "library.so")


def test_the_environment_adds_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CFLAGS", "-march=haswell '-DA=1 2'")
    assert build.flags() == [*build.FLAGS, "-march=haswell", "-DA=1 2"]
