"""The self-check of the compiled products: wrong ones are found, switched off, and said; right ones are checked once."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli import main
from lorakeet.kernels.cpu import build, self_check
from lorakeet.kernels.cpu.self_check import PRODUCTS, differing_products

pytestmark = pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")


class Spoiled:
    """The library with one function that writes a wrong number into its result: argument ``place``, a pointer."""

    def __init__(self, name: str, place: int) -> None:
        self.name, self.place = name, place
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(build.library(), name)
        return self._spoil(real) if name == self.name else real

    def _spoil(self, real: Any) -> Any:
        def spoiled(*given: Any) -> None:
            real(*given)
            self.calls += 1
            ctypes.c_float.from_address(given[self.place] + 4).value = 1e6

        return spoiled


#: C function -> the place of the result among its arguments, and the products that call it.
RESULTS = {
    "lk_gemv_w8": (5, ["gemv_w8"]),
    "lk_gemv_nf4": (5, ["gemv_nf4"]),
    "lk_gemv_w8a16": (5, ["gemv_w8a16"]),
    "lk_gemm_w8a16": (8, ["gemm_w8a16", "gemm_w8a16_dgrad"]),
    "lk_pack_a16": (3, ["gemm_w8a16", "gemm_w8a16_dgrad"]),
    "lk_gemm_f32": (4, ["gemm_f32"]),
    "lk_head_f32": (4, ["head_f32"]),
    "lk_gemm_half": (4, ["gemm_half"]),
    "lk_gemv_half": (3, ["gemv_half"]),
    "lk_gemm_nf4": (6, ["gemm_nf4"]),
    "lk_gemm_w8a8_grouped_dgrad": (5, ["gemm_w8a8_grouped_dgrad"]),
}


def test_the_products_of_this_machine_are_right() -> None:
    assert build.library().differing == [] == differing_products(build.library(), None)
    assert build.switched_off() == frozenset()


@pytest.mark.parametrize("name", RESULTS)
def test_one_wrong_number_is_found(name: str) -> None:
    place, products = RESULTS[name]
    if not hasattr(build.library(), name):
        pytest.skip("this library has no such product")
    spoiled = Spoiled(name, place)
    wrong = [p.name for p in PRODUCTS if p.name in products and not all(e <= 1 for e in p.errors(spoiled))]
    assert wrong == products and spoiled.calls


def test_products_in_tiles_are_checked_where_the_processor_has_them() -> None:
    """Emulated tiles would be too slow for a check at each start; the products themselves can be checked here."""
    library = build.library()
    if not library.lk_emulates_amx() or b"avx2" not in library.lk_cpu_features():
        pytest.skip("the tiles are not emulated")
    assert not any(self_check._differs(product, Spoiled("lk_gemm_w8a16_amx", 8)) for product in PRODUCTS)
    in_tiles = [product for product in PRODUCTS if product.feature == "amx"]
    assert len(in_tiles) == 3 and all(error <= 1 for product in in_tiles for error in product.errors(library))


def test_the_result_is_kept_for_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    spoiled: Any = Spoiled("lk_gemv_w8", 5)
    monkeypatch.setattr(self_check, "PRODUCTS", PRODUCTS[:1])
    for machine in ("one", "one", "other"):
        monkeypatch.setattr(self_check.platform, "node", lambda machine=machine: machine)
        assert differing_products(spoiled, record) == ["gemv_w8"]
    assert spoiled.calls == 2 and len(json.loads(record.read_text())) == 2
    record.write_text("{")  # damaged
    assert differing_products(spoiled, record) == ["gemv_w8"]


#: A file of ``csrc``, a line of it, a wrong one; the feature that is switched off, and the back end that is chosen then.
#: Without AVX2, ``vnni`` multiplies in torch.
BROKEN = [
    ("gemm/gemv_w8.c", "single[r][t] * row_scale[r]", "2 * single[r][t] * row_scale[r]", "avx512", "vnni"),
    ("gemm/w8a8_grouped.h", "(floats){0} + scale, total", "(floats){0} + 2 * scale, total", "vnni", "pairs"),
    ("gemm/w8a16_epilogue.h", "load(columns->scale + VLEN * half)", "x_scale", "avx2", "vnni"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line", "wrong", "feature", "instead"), BROKEN)
def test_a_library_with_a_broken_line_does_not_multiply(
    file: str, line: str, wrong: str, feature: str, instead: str, tmp_path: Path
) -> None:
    """From the compiler to the layer: one warning, and the plain path computes the right numbers."""
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_FOLDER, sources)
    text = (sources / file).read_text()
    assert line in text
    (sources / file).write_text(text.replace(line, wrong))
    script = (
        "import sys, torch\nfrom pathlib import Path\n"
        "from lorakeet.kernels.cpu import build, features\n"
        "build.SOURCE_FOLDER = Path(sys.argv[1])\n"
        "from lorakeet.kernels.int8 import linear, registry\n"
        "from lorakeet.kernels.int8.format import dequantize, quantize_weight\n"
        "torch.manual_seed(0)\n"
        "weight, scale = quantize_weight(torch.randn(100, 70))\n"
        "x, g = torch.randn(40, 70), torch.randn(40, 100)\n"
        "wide = dequantize(weight, scale)\n"
        "assert (linear.product(x, weight, scale) - x @ wide.T).abs().max() < 1e-2\n"
        "dx = linear.input_gradient(g, weight, scale)\n"
        "assert (dx - g @ wide).norm() < 0.02 * dx.norm()\n"
        "print(registry.best_on('cpu').name, *sorted(features.runnable()))\n"
    )
    env = {**os.environ, "LORAKEET_HOME": str(tmp_path / "home"), "LORAKEET_CFLAGS": "-O1"}
    for _ in range(2):  # the second process reads what the first one found
        done = subprocess.run([sys.executable, "-c", script, str(sources)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        chosen, *runnable = done.stdout.split()
        assert chosen == instead and feature not in runnable
        assert done.stderr.count("differ from plain torch on this machine") == 1


def test_doctor_without_data_shows_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["self-check"] == "every compiled product is right"
    assert facts["compiled loops"] == build.library_version()
    monkeypatch.setattr(build.library(), "differing", ["gemm_w8a8_grouped_dgrad"])
    assert main(["doctor"]) == 0
    assert "switched off: gemm_w8a8_grouped_dgrad" in capsys.readouterr().out
    assert main(["doctor", "--model", "./none"]) == 2
    assert "no data to examine" in capsys.readouterr().err
