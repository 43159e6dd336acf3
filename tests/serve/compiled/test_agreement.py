"""The compiled pass is compared with the model's own forward once for a base, and again when anything changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from helpers.bytewise import llama_config
from lorakeet.adapter.fingerprint import fingerprint
from lorakeet.kernels import paged
from lorakeet.quant.quantize import quantize_
from lorakeet.serve.compiled import CompiledForward, compiled_forward, forward
from lorakeet.serve.compiled.agreement import Agreement, agreement_of
from lorakeet.serve.engine import choose_forward as choice
from lorakeet.serve.engine.forward import PlainForward

pytestmark = pytest.mark.skipif(not paged.is_available(), reason="nothing is compiled on this machine")


@pytest.fixture(scope="module")
def model() -> Any:
    made = LlamaForCausalLM(llama_config(head_dim=16)).eval().requires_grad_(False)
    quantize_(made)
    return made


def chosen(model: Any, agreement: Agreement | None) -> Any:
    return choice.choose_forward(model, 32, 1 << 20, partial(compiled_forward, agreement=agreement))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path / "home"))


def test_a_base_is_compared_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = agreement_of(model.config, fingerprint(model))
    assert agreement is not None and not agreement.is_noted
    assert isinstance(chosen(model, agreement), CompiledForward) and agreement.is_noted
    calls: list[Any] = []
    for place in (forward, choice):
        monkeypatch.setattr(place, "_agrees", lambda *given: calls.append(given) is None)
    assert isinstance(chosen(model, agreement_of(model.config, fingerprint(model))), CompiledForward) and not calls
    assert isinstance(chosen(model, None), CompiledForward) and len(calls) == 2


@pytest.mark.parametrize("place", [forward, choice], ids=["of the loops", "of the engine"])
def test_a_pass_that_differs_is_not_noted(place: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees = place._agrees
    monkeypatch.setattr(place, "_agrees", lambda one, *more: not isinstance(one, CompiledForward | LlamaForCausalLM))
    agreement = agreement_of(model.config, fingerprint(model))
    assert isinstance(chosen(model, agreement), PlainForward) and agreement is not None and not agreement.is_noted
    monkeypatch.setattr(place, "_agrees", agrees)
    assert isinstance(chosen(model, agreement), CompiledForward)


def test_anything_that_changes_is_compared_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = fingerprint(model)
    assert values is not None
    assert agreement_of(model.config, None) is None
    paths = {agreement_of(model.config, values)._path}  # type: ignore[union-attr]
    paths.add(agreement_of(model.config, {**values, "other": 1})._path)  # type: ignore[union-attr]
    monkeypatch.setenv("LORAKEET_INT8", "vnni")
    paths.add(agreement_of(model.config, values)._path)  # type: ignore[union-attr]
    monkeypatch.setattr("lorakeet.serve.compiled.agreement._sources", lambda: "other")
    paths.add(agreement_of(model.config, values)._path)  # type: ignore[union-attr]
    assert len(paths) == 4


def test_a_cache_that_cannot_be_written_costs_the_comparison(model: Any, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the cache would be")
    agreement = agreement_of(model.config, fingerprint(model))
    assert isinstance(chosen(model, agreement), CompiledForward) and agreement is not None and not agreement.is_noted
