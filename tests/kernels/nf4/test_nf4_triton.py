"""The Triton kernels of the 4-bit product: interpreted, on a GPU, and absent."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_checks(**environment: str) -> None:
    """nf4_triton_checks.py in a process of its own: whether Triton interprets is settled when it is imported."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    words.append(str(Path(__file__).with_name("nf4_triton_checks.py")))
    keep = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        words, env={**keep, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout


@needs_triton
def test_interpreted_kernels_equal_their_reference() -> None:
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_compiled_kernels_equal_their_reference() -> None:
    run_checks()


def test_without_triton_the_module_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("lorakeet.kernels.nf4.triton")
    copy = importlib.util.module_from_spec(spec)  # beside the one that others may have imported
    monkeypatch.setitem(sys.modules, "triton", None)
    spec.loader.exec_module(copy)
    assert copy.triton is None


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32", "*fp16"])
@pytest.mark.parametrize("name", ["multiply", "multiply_back"])
def test_a_kernel_compiles(name: str, kind: str, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For Ampere and Hopper, with the types that the interpreter does not see; Triton brings its own assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorakeet.kernels.nf4 import triton_kernels

    if triton_kernels.INTERPRETED:
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    dtype = {"*bf16": "bfloat16", "*fp32": "float32", "*fp16": "float16"}[kind]
    known = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "KIND": getattr(triton.language, dtype)}
    types = {"codes": "*u8", "absmax": "*u8", "nested": "*fp32", "table": "*fp32"}
    types |= dict.fromkeys(("x", "g", "bias", "out"), kind)
    signature = {a: "constexpr" if a in known else types.get(a, "i32") for a in kernel.arg_names}
    constants = {(at,): known[a] for at, a in enumerate(kernel.arg_names) if a in known}
    made = triton.compile(ASTSource(kernel, signature, constants, {}), GPUTarget("cuda", arch, 32))
    assert "mma" in made.asm["ptx"]
