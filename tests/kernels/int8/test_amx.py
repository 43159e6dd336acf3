"""The back end ``amx``: the numbers of ``vnni`` to the bit, emulated where the processor has no tiles; and the real build."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.int8_products import unlike_rows_of_gradient
from lorakeet.kernels.cpu import features, gemm
from lorakeet.kernels.cpu.build import FLAGS, SOURCE_FOLDER
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import linear, registry
from lorakeet.kernels.int8.format import OUTLIERS, outlier_columns, quantize_weight

needs_tiles = pytest.mark.skipif(
    Feature.AMX not in features.runnable(), reason="no AVX2 or no C compiler, or Linux refuses the tiles of AMX"
)
#: Tokens, in, out: odd sizes, one row of a tile, around 64 inputs, deeper than one block (640 forward, 2,048 backward).
SHAPES = [
    (17, 1, 1),
    (18, 5, 3),
    (19, 64, 16),
    (33, 33, 65),
    (23, 640, 48),
    (37, 641, 50),
    (17, 1300, 70),
    (80, 576, 200),
    (275, 40, 33),
    (18, 31, 2200),
]


def same_bits(mine: Tensor, right: Tensor) -> bool:
    return mine.shape == right.shape and torch.equal(mine.view(torch.int32), right.view(torch.int32))


def both(*given: Tensor | None, gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Return the result of ``amx`` and of the plain C product."""
    results = []
    for name in ("amx", "vnni"):
        with registry.using(name):
            results.append(linear.input_gradient(*given) if gradient else linear.product(*given))
    return results[0], results[1]


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_as_without_tiles(shape: tuple[int, int, int]) -> None:
    """Rows of unlike size, one of zeros, one with NaN and one with infinity; bias, low rank, outlier columns, vocabulary."""
    n, inner, out = shape
    g, weight, scale = unlike_rows_of_gradient(n, inner, out)
    x, bias = torch.randn(n, inner) * torch.logspace(-8, 8, n).unsqueeze(1), torch.randn(out)
    for rows in (x, g):
        rows[3], rows[4, 0], rows[5] = 0, float("nan"), float("inf")
    for rank in (0, 5):
        low_rank = (torch.randn(n, rank), torch.randn(out, rank)) if rank else None
        for given in (None, bias):
            mine, right = both(x, weight, scale, given, low_rank)
            assert same_bits(mine, right) and mine[4:6].isnan().any() and mine[6:].isfinite().all()
    assert (outlier_columns(weight, scale) is not None) == (inner > max(out, OUTLIERS))
    for scales in (scale, scale[:out]):  # the second is a vocabulary's: rounding errors are fed back
        assert same_bits(*both(x, weight, scales))
        assert same_bits(*both(g, weight, scales, gradient=True))


@needs_tiles
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_any_number_of_rows(tokens: int) -> None:
    """The products themselves; the registry gives them more than 16 rows only."""
    weight, scale = quantize_weight(torch.randn(50, 70))
    x, row_scale = torch.randn(tokens, 70), scale[:50]
    plain = gemm.gemm_w8a16(x, weight, row_scale, None, None)
    assert same_bits(gemm.gemm_w8a16(x, weight, row_scale, None, None, tiles=True), plain)
    plain = gemm.gemm_w8a8_grouped_dgrad(plain, weight, row_scale, None)
    g = gemm.gemm_w8a16(x, weight, row_scale, None, None)
    assert same_bits(gemm.gemm_w8a8_grouped_dgrad(g, weight, row_scale, None, tiles=True), plain)


@needs_tiles
def test_the_largest_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values have the largest magnitude: 256 times the high bytes' sum alone would overflow."""
    for depth in (512, 518, 640, 1536):
        for sign in (1, -1):
            weight = torch.full((40, depth), 127 * sign, dtype=torch.int8)
            mine, right = both(torch.full((20, depth), 3.0), weight, torch.ones(40))
            assert same_bits(mine, right)
            assert torch.allclose(mine, torch.full((20, 40), 381.0 * sign * depth), rtol=1e-4)


def compiled_for_amx(made: Path, *words: str) -> None:
    """Compile for a processor with AMX, or skip the test."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or os.name != "posix":
        pytest.skip("no C compiler on this machine")
    command = [*compiler.split(), *FLAGS, "-march=sapphirerapids", f"-I{SOURCE_FOLDER}", *words, "-o", str(made)]
    asked = subprocess.run(
        [*command[:-2], "-E", "-x", "c", "/dev/null", "-o", os.devnull], capture_output=True, text=True
    )
    if asked.returncode:
        pytest.skip(f"this compiler knows no AMX: {asked.stderr.splitlines()[0]}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_real_instructions_are_compiled(tmp_path: Path) -> None:
    compiled_for_amx(
        tmp_path / "gemm_amx.s", "-fopenmp", "-Wall", "-Werror", "-S", str(SOURCE_FOLDER / "gemm/gemm_amx.c")
    )
    text = (tmp_path / "gemm_amx.s").read_text()
    counts = {word: text.count(f"{word}\t") for word in ("ldtilecfg", "tileloadd", "tdpbssd", "tdpbusd", "tilestored")}
    assert counts == {"ldtilecfg": 2, "tileloadd": 6, "tdpbssd": 3, "tdpbusd": 2, "tilestored": 5}
    assert text.count("tilerelease") == 2 and text.count("tilezero") == 5


def test_the_real_instructions_of_bf16_are_compiled(tmp_path: Path) -> None:
    made = tmp_path / "gemm_half_amx.s"
    compiled_for_amx(made, "-fopenmp", "-Wall", "-Werror", "-S", str(SOURCE_FOLDER / "gemm/half/gemm_half_amx.c"))
    counts = {
        word: made.read_text().count(f"{word}\t") for word in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored")
    }
    assert counts == {"ldtilecfg": 1, "tileloadd": 4, "tdpbf16ps": 4, "tilestored": 4}


def test_tiles_that_linux_refuses_are_no_feature(tmp_path: Path) -> None:
    """Compiled for AMX, the library lists it only where the system grants it, and never emulates it."""
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("another operating system")
    compiled_for_amx(tmp_path / "features.so", str(SOURCE_FOLDER / "features.c"))
    loaded = ctypes.CDLL(str(tmp_path / "features.so"))
    loaded.lk_cpu_features.restype = ctypes.c_char_p
    words = Path("/proc/cpuinfo").read_text().split()
    assert (b"amx" in loaded.lk_cpu_features().split()) == ("amx_int8" in words)
    assert loaded.lk_emulates_amx() == 0
