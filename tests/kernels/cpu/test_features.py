"""Features of the processor: one answer, an override for tests, and nothing that this machine cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakeet.base.device_dtype import choose_dtype, has_bf16
from lorakeet.config import BaseSettings
from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu import build, features
from lorakeet.kernels.cpu.features import Feature

CPU = torch.device("cpu")


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
    known[Feature.AMX] = {"amx_int8"}
    for feature, names in known.items():
        assert feature not in features.detected() or names & words
    assert (Feature.AMD in features.detected()) == ("AuthenticAMD" in words and "avx2" in words)


def test_the_override_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", "")
    assert features.available() == frozenset()
    features.available.cache_clear()
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", " VNNI ,")
    assert features.available() == {Feature.VNNI} and features.has(Feature.VNNI) and not features.has(Feature.AVX2)


def test_the_override_takes_features_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, without in (("-vnni, -AVX512", {Feature.VNNI, Feature.AVX512}), ("-bf16", {Feature.BF16})):
        features.available.cache_clear()
        monkeypatch.setenv("LORAKEET_CPU_FEATURES", asked)
        assert features.available() == features.detected() - without
    features.available.cache_clear()
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", "+bf16,-vnni")
    assert features.available() == features.detected() - {Feature.VNNI} | {Feature.BF16}
    features.available.cache_clear()
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", "-avx9000")
    with pytest.raises(ConfigError, match="avx9000 cannot be used"):
        features.available()


@pytest.mark.parametrize("asked", ["avx9000", "vnni,avx512"])
def test_the_override_cannot_name_what_does_not_run(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "runnable", lambda: frozenset({Feature.VNNI, Feature.AVX2}))
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", asked)
    with pytest.raises(ConfigError, match=f"{asked.split(',')[-1]} cannot be used on this machine") as error:
        features.available()
    assert "avx2, vnni" in str(error.value.hint)


def test_without_a_library_torch_answers_for_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "library", lambda: None)
    found = features.detected() - {Feature.BF16}
    assert found == (frozenset({Feature.VNNI}) if torch.cpu._is_vnni_supported() else frozenset())
    assert features.runnable() == {Feature.VNNI, Feature.BF16}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", False),
        ("avx2", False),
        ("AVX2, BF16", True),
        ("-bf16", False),
        ("+avx2,+bf16", True),
    ],
)
def test_nothing_is_compiled_for_a_number_format(asked: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_CPU_FEATURES", asked)
    monkeypatch.setattr(features, "library", lambda: pytest.fail("compiled for a number format"))
    assert choose_dtype(BaseSettings(device="cpu", dtype="bf16"), CPU) == torch.bfloat16
    assert has_bf16(CPU) == found
