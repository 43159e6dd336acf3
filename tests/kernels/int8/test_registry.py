"""The registry of 8-bit back ends: the choice, its override, and a back end that is added by one registration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.int8_products import layer
from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.int8 import blocked, linear, registry
from lorakeet.kernels.int8.registry import Implementation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LORAKEET_INT8", raising=False)
    registry._chosen.clear()
    yield
    registry._chosen.clear()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({Feature.AVX2, Feature.VNNI, Feature.AMX}, "amx"),
        ({Feature.AVX2, Feature.VNNI}, "vnni"),
        ({Feature.VNNI}, "vnni"),
        ({Feature.AVX2}, "pairs"),
        (set(), "blocked"),
    ],
)
def test_the_features_of_the_processor_decide(
    found: set[Feature], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "available", lambda: frozenset(found))
    assert registry.best_on(CPU).name == expected


@pytest.mark.parametrize("name", ["blocked", "pairs", "vnni", "amx"])
def test_the_environment_names_a_back_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "runnable", lambda: frozenset(Feature))
    monkeypatch.setenv("LORAKEET_INT8", name)
    assert registry.best_on(CPU).name == name
    few = registry.best(torch.empty(16, 3), torch.empty(5, 3, dtype=torch.int8))
    assert few.name == "blocked", "a few tokens gain nothing from rounding"


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_INT8", "amx9")
    with pytest.raises(ConfigError, match="unknown back end 'amx9'") as error:
        linear.product(*layer(20, 4, 3)[:3])
    assert "blocked" in str(error.value.hint)


def test_a_back_end_that_cannot_run_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "runnable", lambda: frozenset({Feature.VNNI}))
    monkeypatch.setenv("LORAKEET_INT8", "pairs")
    with pytest.raises(ConfigError, match="'pairs' cannot run here: .* has no avx2") as error:
        registry.best_on(CPU)
    assert "pairs" not in str(error.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_is_an_error_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_INT8", "triton")
    with pytest.raises(ConfigError, match=r"'triton' cannot run here: .*(NVIDIA GPU|not installed)"):
        registry.best_on(CPU)


def test_the_choice_is_made_once_for_each_shape_class(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    choose = registry._choose
    monkeypatch.setattr(registry, "_choose", lambda x, weight: asked.append(x.shape) or choose(x, weight))
    x, weight, scale, _ = layer(20, 4, 3)
    for rows in (1, 16, 17, 20, 3, 18):
        linear.product(x[:1].expand(rows, 4), weight, scale)
    assert asked == [(1, 4), (17, 4)]


# -- a back end that is added by one registration ---------------------------------------------------------------------


def test_a_registered_back_end_is_best_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def product(*given):
        calls.append("product")
        return blocked.product(*given)

    def input_gradient(*given):
        calls.append("input_gradient")
        return blocked.input_gradient(*given)

    fake = Implementation("fake", frozenset(), lambda x, weight: weight.shape[1] % 4 == 0, product, input_gradient)
    x, weight, scale, bias = layer(20, 8, 6)
    try:
        registry.register(fake)
        assert registry.best(x, weight) is fake and registry.best(x[:, :3], weight[:, :3]) is not fake
        h = linear.int8_linear(x.requires_grad_(), weight, scale, bias)
        h.sum().backward()
        assert calls == ["product", "input_gradient"]
        with pytest.raises(ValueError, match="'fake' is registered already"):
            registry.register(fake)
    finally:
        registry.unregister("fake")


FAKE = """
from lorakeet.kernels.int8 import blocked, registry

registry.register(
    registry.Implementation(
        "fake",
        frozenset(),
        lambda x, weight: x.is_cpu,
        lambda x, *given: {factor} * blocked.product(x, *given),
        blocked.input_gradient,
    )
)
"""


@pytest.mark.parametrize(("factor", "passes"), [pytest.param(1, True, marks=pytest.mark.slow), (1.1, False)])
def test_one_registration_runs_all_tests_of_the_product(factor: float, passes: bool, tmp_path: Path) -> None:
    """The plugin registers a back end and does nothing else; a wrong one turns the tests red."""
    (tmp_path / "fake_back_end.py").write_text(FAKE.format(factor=factor))
    tests = Path(__file__).with_name("test_linear.py")
    looked_at = ("test_products_with_column_scales", "test_dtype_and_shape_are_those_of_the_input")
    chosen = "fake" if passes else f"fake and ({' or '.join(looked_at)})"
    words = ["-p", "fake_back_end", "-p", "no:cacheprovider", "-k", chosen, "-rA", "--no-header", str(tests)]
    root = Path(__file__).parents[3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, env=env, cwd=root, timeout=300
    )
    assert done.returncode == (0 if passes else 1), done.stdout + done.stderr
    for name in looked_at:
        ends = [
            line.split()[0] for line in done.stdout.splitlines() if re.match(rf"(PASSED|FAILED) .*::{name}\[fake", line)
        ]
        assert ends and (set(ends) == {"PASSED"}) == passes
