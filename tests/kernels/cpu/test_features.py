"""Features of the processor: one answer, an override for tests, and nothing that this machine cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu import build, features
from lorakeet.kernels.cpu.features import Feature


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    features.available.cache_clear()
    yield
    features.available.cache_clear()


def test_without_an_override_the_detected_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAKEET_CPU_FEATURES", raising=False)
    assert features.available() == features.detected() <= features.runnable()


@pytest.mark.skipif(build.library() is None, reason="nothing is compiled on this machine")
def test_the_library_has_only_what_the_processor_has() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("another operating system")
    words = set(cpuinfo.read_text().split())
    known = {Feature.AVX2: {"avx2"}, Feature.AVX512: {"avx512bw"}, Feature.VNNI: {"avx512_vnni", "avx_vnni"}}
    for feature, names in known.items():
        assert feature not in features.detected() or names & words
    assert (Feature.AMD in features.detected()) == ("AuthenticAMD" in words and "avx2" in words)


def test_the_override_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", "")
    assert features.available() == frozenset()
    features.available.cache_clear()
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", " VNNI ,")
    assert features.available() == {Feature.VNNI} and features.has(Feature.VNNI) and not features.has(Feature.AVX2)


@pytest.mark.parametrize("asked", ["avx9000", "vnni,avx512"])
def test_the_override_cannot_name_what_does_not_run(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "runnable", lambda: frozenset({Feature.VNNI, Feature.AVX2}))
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", asked)
    with pytest.raises(ConfigError, match=f"{asked.split(',')[-1]} cannot be used on this machine") as error:
        features.available()
    assert "avx2, vnni" in str(error.value.hint)


def test_without_a_library_torch_answers_for_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "library", lambda: None)
    assert features.detected() == (frozenset({Feature.VNNI}) if torch.cpu._is_vnni_supported() else frozenset())
    assert features.runnable() == {Feature.VNNI}
