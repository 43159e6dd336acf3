"""The page on many GPUs says what its script computes, and the script's model agrees with what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

import scale

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"


def test_the_page_has_the_tables_and_numbers_of_the_script() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert scale.memory_table() in text and scale.traffic_table() in text
    compute = scale.compute_seconds(scale.LLAMA_70B, 4096, scale.Cluster().flops)
    assert f"computes for {compute:.1f} s" in text
    assert f"twice, {scale.gather_bytes(scale.LLAMA_70B) / 1e9:.1f} GB" in text
    assert f"in a step, {scale.adapter_bytes(scale.LLAMA_70B, 16, 64) / 1e9:.1f} GB" in text
    assert f"{scale.TRAINED * scale.LLAMA_70B.adapter_parameters(256) / 1e9:.0f} GB with their moments" in text


def test_the_shape_has_the_parameters_of_the_model() -> None:
    assert scale.LLAMA_70B.parameters() == pytest.approx(70.55e9, rel=1e-3)


def test_sharding_divides_the_layers_and_adds_two_that_are_gathered() -> None:
    whole, shards = (scale.memory(scale.LLAMA_70B, gpus, 16, 4096) for gpus in (1, 64))
    assert shards["layers"] == whole["layers"] / 64 and not whole["two gathered layers"]
    assert shards["two gathered layers"] == pytest.approx(2 * whole["layers"] / 80)
