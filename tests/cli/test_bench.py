"""``lorakeet bench``: rates of every product, each number format in its own process, and the words on the defaults."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_tasks import save_tiny, write_rows
from lorakeet.cli import main
from lorakeet.cli.bench import products, runs, tables
from lorakeet.kernels.cpu import build
from lorakeet.kernels.int8 import registry

SHAPE = (20, 64, 33)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    save_tiny(folder / "base", "llama")
    write_rows(folder / "rows.jsonl", ({"text": f"the bird {'sees the old house ' * (n % 3 + 1)}"} for n in range(200)))
    return folder


def test_every_product_of_this_machine_has_a_rate() -> None:
    rows = list(products.rates_of(SHAPE, seconds=0))
    names = [row["product"] for row in rows]
    assert {"fp32 by torch", "int8 blocked", "NF4", f"int8 {registry.best_on('cpu').name}"} <= set(names)
    assert all(row["forward"] > 0 and row["backward"] > 0 and row["shape"] == list(SHAPE) for row in rows)
    before = next(name for name in names if name.startswith("int8 "))
    assert before == f"int8 {registry.best_on('cpu').name}", "the chosen one is the first"


@pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")
def test_a_loop_in_registers_counts_its_operations() -> None:
    library = build.library()
    for kind in range(4):
        once, twice = library.lk_peak(kind, 1), library.lk_peak(kind, 2)
        assert twice == 2 * once and (once > 0) == (b"avx2" in library.lk_cpu_features())
    assert library.lk_peak(9, 1) == 0


def measured(**faster: float) -> dict[str, Any]:
    """Return figures of a machine on which the defaults are the fastest, but for some."""
    rates = {"fp32": 300, "bf16": 200, "8 bits": 500, "auto": 300} | faster
    row = {"shape": [640, 576, 576], "backward": 100}
    return {
        "machine": {"processor": "one"},
        "peaks": {"16 bits": 400.0},
        "products": [{"product": "int8 vnni", "forward": 200, **row}, {"product": "int8 pairs", "forward": 190, **row}],
        "runs": [{"format": name, "train": rate, "write": None} for name, rate in rates.items()],
    }


def test_the_table_says_whether_the_defaults_agree() -> None:
    found = measured()
    found |= tables.verdict(found)
    text = "\n".join(tables.lines(found))
    assert "base: {bits: 8}" in text and "the defaults agree" in text and "200 (50 %)" in text
    found = measured(bf16=400)
    found["products"][1]["forward"] = 250
    found |= tables.verdict(found)
    assert found["disagreements"] == [
        "auto is fp32, but bf16 trains at 400 tokens/s instead of 300",
        "int8 vnni is chosen, but int8 pairs is faster forward at 640 × 576 × 576: 250 instead of 200 GFLOP/s",
    ]
    assert all(line in "\n".join(tables.lines(found)) for line in found["disagreements"])


@pytest.mark.slow
def test_a_format_trains_and_writes(folder: Path) -> None:
    given = {"base": {"model": str(folder / "base"), "bits": 8}, "data": {"path": str(folder / "rows.jsonl")}}
    found = runs.measure_one(given, 1, 3)
    assert found["dtype"] == "float32" and found["train"] > 0 and found["write"] > 0


def test_a_process_that_fails_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert runs._answer([sys.executable, "-c", "raise SystemExit('error: no room')"], "8 bits") is None
    assert "8 bits could not be measured: no room" in caplog.text
    given = {"base": {"model": "a folder that is not there"}, "data": {"path": "nothing.jsonl"}}
    words = [sys.executable, "-m", "lorakeet.cli.bench.runs", json.dumps(given), "1", "1"]
    assert runs._answer(words, "fp32") is None
    assert re.search("fp32 could not be measured: .*a folder that is not there", caplog.text)


@pytest.mark.slow
def test_the_command_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--short", "--json"]
    assert main(["bench", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    formats = [row["format"] for row in found["runs"]]
    assert [name for name in formats if name in ("fp32", "8 bits", "4 bits", "PEFT fp32")] == [
        "fp32",
        "8 bits",
        "4 bits",
        "PEFT fp32",
    ]
    assert all(row["train"] > 0 for row in found["runs"]) and found["best"]["base"]
