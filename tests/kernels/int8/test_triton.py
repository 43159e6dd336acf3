"""The Triton back end: its checks interpreted and on a GPU, its kernels compiled for two GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.int8_products import assert_close
from lorakeet.kernels.int8 import gpu
from lorakeet.kernels.int8.format import dequantize, quantize_rows

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run_checks(**environment: str) -> None:
    """triton_checks.py in a process of its own: whether Triton interprets is settled when it is imported."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--no-header",
        str(Path(__file__).with_name("triton_checks.py")),
    ]
    keep = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        words, env={**keep, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@needs_triton
def test_interpreted_kernels_equal_their_references() -> None:
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_compiled_kernels_equal_their_references() -> None:
    run_checks()


def test_without_triton_the_module_imports_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("lorakeet.kernels.int8.triton")
    copy = importlib.util.module_from_spec(spec)  # beside the one that others may have imported
    monkeypatch.setitem(sys.modules, "triton", None)
    spec.loader.exec_module(copy)
    assert copy.available(torch.device("cuda")) == (False, "Triton 3.4 or newer is not installed")


def test_the_gradient_of_a_vocabulary_is_not_rounded() -> None:
    """A token has one scale there, which would zero its many small values."""
    weight, scale = quantize_rows(torch.randn(300, 48))
    g = torch.randn(20, 300)
    assert_close(gpu.input_gradient(g, weight, scale), g @ dequantize(weight, scale), 1e-5)


@needs_triton
def test_a_processor_is_no_gpu() -> None:
    from lorakeet.kernels.int8 import triton as int8_triton

    if not int8_triton.kernels.INTERPRETED:
        assert int8_triton.available(torch.device("cpu")) == (False, "cpu is not an NVIDIA GPU")


# -- compiled, not run ------------------------------------------------------------------------------------------------

# An argument is a pointer's or a number's type (":16" for a multiple of 16), or a value that is known when compiled.
BF16, FP32, INT8, INT32 = "*bf16", "*fp32", "*i8", "*i32"
ROW = {"x_row": "i32:16", "x_column": 1, "width": "i32:16"}
MAXIMA = {**ROW, "n": "i32", "top": INT32, "squares": FP32, "ROWS": 32, "COLUMNS": 256, "STEPS": 4}
CHOICE = {
    **{"top": INT32, "squares": FP32, "parts": "i32", "numel": "fp32", "outlier": "fp32", "width": "i32"},
    **{"columns": INT32, "inside": INT8, "WIDTH": 16384, "PARTS": 1024, "CHUNK": 4096, "MOST": 32, "S": 32},
}
ROUND = {**ROW, "n": "i32", "ROWS": 1, "rounded": INT8, "scales": FP32, "S": 32}
SPLIT = {"factor": None, "inside": INT8, "columns": INT32}
FOLD = {"factor": FP32, "inside": None, "columns": None, "apart": None}
SIZES = {"n": "i32", "width": "i32:16", "inner": "i32:16", "bucket": "i32", "row_scale": FP32, "S": 32, "GROUP": 8}
LOW = {"rank": "i32:16", "u_row": "i32:16", "u_rank": 1, "RANK": 16}
FORWARD = {**SIZES, **LOW, "w_row": "i32:16", "w_inner": 1, "v_row": "i32:16", "v_rank": 1, "column_scale": FP32}
BACKWARD = {**SIZES, **LOW, "w_row": 1, "w_inner": "i32:16", "v_row": 1, "v_rank": "i32:16", "column_scale": None}
BACKWARD |= {"bias": None, "apart": None, "picked": None}


def products(form: dict[str, Any], kind: str, tma: bool, m: int, n: int, k: int) -> dict[str, Any]:
    """Arguments of ``multiply`` for one tile, all floating tensors of one kind."""
    a, w = (f"tensordesc<i8[{m}, {k}]>", f"tensordesc<i8[{n}, {k}]>") if tma else (INT8, INT8)
    some = {"bias": kind, "apart": kind, "picked": INT8, **form}
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "APART_KIND": kind, "LOW_KIND": kind}
    return {**some, **sizes, "a": a, "w": w, "out": kind, "u": kind, "v": kind, "TMA": tma, "EVEN": k != 64}


#: Kernel, arguments, warps, stages, and what must be among the instructions for Hopper.
CASES: dict[str, tuple[str, dict[str, Any], int, int, tuple[str, ...]]] = {
    "column maxima": ("column_maxima", {**MAXIMA, "x": BF16}, 4, 3, ("ld.global.v4",)),
    "choice of columns": ("choose_columns", CHOICE, 32, 3, ()),
    "turning": ("turn", {"w": INT32, "turned": INT32, "height": "i32:16", "width": "i32:16", "BLOCK": 32}, 4, 3, ()),
    "rounding, split": (
        *("quantize_rows", {**ROUND, **SPLIT, "x": BF16, "apart": BF16, "BLOCK": 4096, "WHOLE": True}, 4, 3),
        ("ld.global.v4",),
    ),
    "rounding, folded": (
        *("quantize_rows", {**ROUND, **FOLD, "x": FP32, "BLOCK": 16384, "WHOLE": False}, 16, 3),
        ("ld.global.v4",),
    ),
    "product, descriptors": (
        *("multiply", products(FORWARD, BF16, True, 128, 256, 128), 8, 3),
        ("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", "cp.async.bulk.tensor"),
    ),
    "product, fp32": ("multiply", products(FORWARD, FP32, False, 128, 128, 128), 8, 4, ("s32.s8.s8", "cp.async")),
    "product, few rows": ("multiply", products(FORWARD, "*fp16", False, 16, 64, 256), 4, 4, ("s32.s8.s8",)),
    "input gradient": ("multiply", products(BACKWARD, BF16, False, 128, 256, 128), 8, 3, ("s32.s8.s8",)),
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_compiles(arch: int, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For Ampere and Hopper, with the types that the interpreter does not see; Triton brings its own assembler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorakeet.kernels.int8 import triton as int8_triton

    if int8_triton.kernels.INTERPRETED:
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, arguments, warps, stages, instructions = CASES[case]
    if arch == 80 and arguments.get("TMA"):
        pytest.skip("tensor descriptors are Hopper's")
    kernel = getattr(int8_triton.kernels, name)
    signature, known, divisible = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        value = arguments[argument]
        if argument.endswith("_KIND"):
            value = {BF16: triton.language.bfloat16, FP32: triton.language.float32}.get(value, triton.language.float16)
        if not isinstance(value, str):
            signature[argument], known[(at,)] = "constexpr", value
            continue
        signature[argument], _, multiple = value.partition(":")
        if multiple or value.startswith("*"):
            divisible[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, divisible)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    assert compiled.asm["cubin"]
    missing = [words for words in instructions if arch == 90 and words not in compiled.asm["ptx"]]
    assert not missing, missing
