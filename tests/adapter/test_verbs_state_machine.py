"""Any sequence of methods that change adapters leaves the model that should be there, or changes nothing.

The machine calls the methods in random order, with good and bad arguments. After each call the model answers as a dense
reference without Lorakeet. Or the call raised one of Lorakeet's errors, and the model's whole state is the same.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from helpers.dense_adapters import IDS, RATE, Adapter, TinyModel, answer, train_step
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter import peft_model, put_adapter
from lorakeet.adapter.adapter_folders import adapter_folder
from lorakeet.errors import LorakeetError
from lorakeet.lora import model as lora_model
from lorakeet.lora.layer import LoraLayer
from lorakeet.lora.linear import LoraLinear

pytestmark = pytest.mark.filterwarnings("ignore")
#: Sequences of the long run, and of the run that every change gets.
MANY, FEW = int(os.environ.get("LORAKEET_VERB_SEQUENCES", "10000")), 200
GOOD = ["default", "a", "policy"]
BAD = ["", "a.b", "x/y", "/tmp/x", "training", "_modules", "weight", "checkpoint-1"]
NAMES = st.sampled_from(GOOD)
ANY_NAME = st.sampled_from([*GOOD * 10, *BAD])
LAYERS = ("emb", "lin1", "lin2")
PLAIN = st.fixed_dictionaries(
    {
        "r": st.just(2),
        "lora_alpha": st.sampled_from([1, 5]),
        "target_modules": st.just(["emb", "lin1"]),
        "use_rslora": st.just(False),
        "modules_to_save": st.just(None),
        "bias": st.just("none"),
    }
)
ODD = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "lora_alpha": st.sampled_from([1, 2, 5]),
        "target_modules": st.sampled_from([["lin1"], ["emb", "lin2"], ["lin1", "lin2"], ["emb"], ["emb", "lin1"]]),
        "use_rslora": st.booleans(),
        "modules_to_save": st.sampled_from([None, None, None, ["lin2"], ["nowhere"]]),
        "bias": st.sampled_from(["none"] * 6 + ["all", "lora_only"]),
    }
).filter(lambda chosen: not set(chosen["modules_to_save"] or ()) & set(chosen["target_modules"]))
SETTINGS = PLAIN | ODD


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Hold that two tensors are equal but for the rounding of fp64."""
    limit = 1e-9 * (1 + float(expected.abs().max()))
    assert found.shape == expected.shape and float((found - expected).abs().max()) <= limit


class Verbs(RuleBasedStateMachine):
    """A tiny model, and what should be there: the base, the adapters, which of them act, and what is in each folder."""

    model: Any

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.model = TinyModel()
        self.base = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.off = ExitStack()
        self.disabled = False
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.files: dict[tuple[int, str], Adapter] = {}
        self.draws = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.off.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- how a method is tried ------------------------------------------------------------------------------------------

    @property
    def has_adapters(self) -> bool:
        """Whether the model is of the class with methods."""
        return isinstance(self.model, PeftModel)

    def state(self) -> list[Any]:
        """Return everything that a refused call must leave alone."""
        switch = getattr(self.model, "switch", None)
        modules = [
            (
                name,
                type(m),
                m.training,
                len(m._forward_hooks),
                getattr(m, "merged_adapters", None) and [*m.merged_adapters],
            )
            for name, m in self.model.named_modules()
        ]
        parameters = [
            (n, id(p), p.requires_grad, p.detach().numpy().tobytes()) for n, p in self.model.named_parameters()
        ]
        configs = {n: c.to_dict() for n, c in getattr(self.model, "peft_config", {}).items()}
        return [type(self.model), modules, parameters, [*configs.items()], vars(switch).copy() if switch else None]

    def tried(self, call: Callable[[], Any], refused: bool | None = False) -> bool:
        """Call; return whether it did something. ``refused``: whether it must be refused; None: it may be."""
        before = self.state()
        try:
            call()
        except LorakeetError:
            assert refused is not False, "a sound call was refused"
            assert self.state() == before, "a refused call changed something"
            return False
        assert refused is not True, "an unsound call was accepted"
        return True

    def fill(self, name: str) -> None:
        """Give a new adapter random weights, in the model and in the reference."""
        self.draws += 1
        generator = torch.Generator().manual_seed(self.draws)
        adapter = self.adapters[name]
        for key, parameter in self.parameters(name).items():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            parameter.data.copy_(value)
            adapter.tensors[key] = value.clone()

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """Return the adapter's parameters by the names of the reference."""
        found = {}
        for layer in self.adapters[name].settings["target_modules"]:
            module = self.model.get_submodule(layer)
            matrices = (
                (module.lora_embedding_A[name], module.lora_embedding_B[name])
                if layer == "emb"
                else (module.lora_A[name].weight, module.lora_B[name].weight)
            )
            found |= {f"{layer}.{letter}": matrix for letter, matrix in zip("AB", matrices, strict=True)}
        for layer in self.adapters[name].settings.get("modules_to_save") or ():
            whole = self.model.get_submodule(layer).modules_to_save[name]
            found |= {f"{layer}.weight": whole.weight, f"{layer}.bias": whole.bias}
        return found

    def trained_biases(self, chosen: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the base's biases that these settings train."""
        targets = LAYERS if chosen["bias"] == "all" else chosen["target_modules"] if chosen["bias"] != "none" else []
        whole = chosen.get("modules_to_save") or []
        return {
            f"{n}.bias": self.base[f"{n}.bias"].clone() for n in ("lin1", "lin2") if n in targets and n not in whole
        }

    def clashes(self, name: str, chosen: dict[str, Any]) -> bool:
        """Whether an adapter with these settings must be refused."""
        others = [adapter for other, adapter in self.adapters.items() if other != name]
        biased = [adapter for adapter in others if adapter.settings["bias"] != "none"]
        whole = chosen["modules_to_save"] or []
        return (
            name not in GOOD
            or bool(biased or (others and chosen["bias"] != "none"))
            or whole == ["nowhere"]
            or any(key in other.settings["target_modules"] for key in whole for other in others)
            or any(key in (o.settings["modules_to_save"] or []) for key in chosen["target_modules"] for o in others)
        )

    # -- the methods ------------------------------------------------------------------------------------------------------

    @rule(name=ANY_NAME, chosen=SETTINGS)
    def add(self, name: str, chosen: dict[str, Any]) -> None:
        first = not self.has_adapters
        refused = name in self.adapters or self.clashes(name, chosen)
        config = LoraConfig(**chosen)
        make = (
            (lambda: get_peft_model(self.model, config, name))
            if first
            else lambda: self.model.add_adapter(name, config)
        )
        if self.tried(make, refused):
            self.adapters[name] = Adapter(chosen, biases=self.trained_biases(chosen), trains=first)
            self.active = (name,) if first else self.active
            self.fill(name)

    @rule(name=NAMES, chosen=SETTINGS, halfway=st.integers(1, 2))
    def add_fails_halfway(self, name: str, chosen: dict[str, Any], halfway: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            calls = []

            def broken(layer: LoraLayer, adapter: str, *rest: Any) -> None:
                calls.append(adapter)
                if len(calls) == halfway:
                    raise LorakeetError("out of memory", "buy some")
                honest(layer, adapter, *rest)

            honest = LoraLayer.add_adapter
            patch.setattr(LoraLayer, "add_adapter", broken)
            config = LoraConfig(**{**chosen, "target_modules": ["emb", "lin1"], "modules_to_save": None})
            if self.has_adapters:
                self.tried(lambda: self.model.add_adapter(name, config), True)
            else:
                self.tried(lambda: get_peft_model(self.model, config, name), True)

    @precondition(lambda self: self.adapters)
    @rule(names=st.lists(ANY_NAME, min_size=1, max_size=2), inference=st.booleans())
    def switch(self, names: list[str], inference: bool) -> None:
        chosen = list(dict.fromkeys(names))
        known = all(name in self.adapters for name in chosen)
        whole = [name for name in chosen if known and self.adapters[name].settings["modules_to_save"]]
        if self.tried(lambda: self.model.set_adapter(names, inference_mode=inference), not known or len(whole) > 1):
            self.active, self.merged = tuple(chosen), ()
            for name, adapter in self.adapters.items():
                adapter.trains = name in chosen and not inference

    @precondition(lambda self: self.adapters)
    @rule(name=ANY_NAME, flag=st.booleans())
    def set_requires_grad(self, name: str, flag: bool) -> None:
        if self.tried(lambda: self.model.set_requires_grad(name, flag), name not in self.adapters):
            self.adapters[name].trains = flag

    @precondition(lambda self: self.adapters)
    @rule(name=ANY_NAME)
    def delete(self, name: str) -> None:
        if self.tried(lambda: self.model.delete_adapter(name), name not in self.adapters or name in self.merged):
            del self.adapters[name]
            self.active = tuple(other for other in self.active if other != name)
            if not self.active and self.adapters:
                self.active = (next(iter(self.adapters)),)
                for adapter in self.adapters.values():
                    adapter.trains = False

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule(name=st.none() | ANY_NAME)
    def merge(self, name: str | None) -> None:
        names = list(self.active) if name is None else [name]
        known = all(other in self.adapters for other in names) and bool(names)
        if self.tried(lambda: self.model.merge_adapter(None if name is None else [name]), None if known else True):
            self.merged = self.active = tuple(self.model.active_adapters)
            assert set(names) <= set(self.merged)

    @precondition(lambda self: self.has_adapters)
    @rule()
    def unmerge(self) -> None:
        self.tried(self.model.unmerge_adapter)
        self.merged = ()

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule()
    def disable(self) -> None:
        self.off.enter_context(self.model.disable_adapter())
        self.disabled, self.merged = True, ()  # the base is its own inside the block

    @precondition(lambda self: self.adapters and self.disabled)
    @rule()
    def enable(self) -> None:
        self.off.close()
        self.disabled = False
        self.merged = tuple(dict.fromkeys(n for layer in self.model.lora_layers() for n in layer.merged_adapters))

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule()
    def train_a_step(self) -> None:
        acting = [self.adapters[name] for name in self.active]
        if not any(adapter.trains for adapter in acting):
            return
        stuck = any(self.adapters[name].trains for name in self.merged)

        def step() -> None:
            try:
                self.model.train()(IDS).square().sum().backward()
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.data -= RATE * parameter.grad
            finally:
                self.model.eval()
                self.model.zero_grad()

        if self.tried(step, stuck):
            train_step(self.base, acting)

    @precondition(lambda self: self.adapters)
    @rule(slot=st.integers(0, 1), some=st.none() | st.lists(NAMES, min_size=1, max_size=2))
    def save(self, slot: int, some: list[str] | None) -> None:
        root, chosen = self.folder / str(slot), some or list(self.adapters)
        known = all(name in self.adapters for name in chosen)
        if self.tried(lambda: self.model.save_pretrained(root, selected_adapters=some), not known):
            self.files |= {(slot, name): self.adapters[name].copy() for name in chosen}

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 7), name=ANY_NAME, learn=st.booleans(), activate=st.booleans())
    def load(self, which: int, name: str, learn: bool, activate: bool) -> None:
        slot, saved_as = sorted(self.files)[which % len(self.files)]
        saved, path = self.files[slot, saved_as].copy(), adapter_folder(self.folder / str(slot), saved_as)
        first = not self.has_adapters
        activate = activate or first
        refused = self.clashes(name, saved.settings)
        if activate:
            load = lambda: PeftModel.from_pretrained(self.model, path, name, is_trainable=learn)  # noqa: E731
        else:
            load = lambda: self.model.load_adapter(path, name, is_trainable=learn)  # noqa: E731
        if not self.tried(load, refused):
            return
        saved.trains = learn or (name in self.adapters and self.adapters[name].trains)
        self.merged = () if name in self.merged else self.merged
        self.adapters[name] = saved
        if activate:
            self.active, self.merged = (name,), ()
            for other, adapter in self.adapters.items():
                adapter.trains = other == name and learn

    @precondition(lambda self: self.adapters)
    @rule(name=NAMES)
    def replace_by_one_of_another_alpha(self, name: str) -> None:
        if name not in self.adapters:
            return
        old, base = self.adapters[name], TinyModel()
        base.load_state_dict(self.base)
        chosen = {**old.settings, "lora_alpha": 3 * old.settings["lora_alpha"]}
        other: Any = get_peft_model(base, LoraConfig(**chosen), name)
        own, self.model = self.model, other
        self.adapters[name] = Adapter(chosen, biases=self.trained_biases(chosen), trains=old.trains)
        self.fill(name)
        other.save_pretrained(self.folder / "other", selected_adapters=[name])
        self.model = own
        self.tried(lambda: own.load_adapter(adapter_folder(self.folder / "other", name), name))
        self.merged = () if name in self.merged else self.merged

    @precondition(lambda self: self.adapters and self.files)
    @rule(slot=st.integers(0, 1))
    def restore(self, slot: int) -> None:
        present = [name for name in self.adapters if (slot, name) in self.files]
        needed = [name for name, adapter in self.adapters.items() if adapter.trains or name in self.active]
        saved = {name: self.files[slot, name].copy() for name in present}
        if self.tried(
            lambda: self.model.restore_adapters(self.folder / str(slot)), None if set(needed) <= set(present) else True
        ):
            for name, adapter in saved.items():
                adapter.trains = self.adapters[name].trains
                self.merged = () if name in self.merged else self.merged
            self.adapters |= saved

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(names=st.lists(NAMES, min_size=2, max_size=2, unique=True), name=ANY_NAME)
    def combine(self, names: list[str], name: str) -> None:
        known = [self.adapters[other] for other in names if other in self.adapters]
        sound = len(known) == 2 and not any(a.settings["modules_to_save"] for a in known)
        refused = not sound or name in self.adapters or name not in GOOD
        layers = sorted({layer for a in known for layer in a.settings["target_modules"]})
        made = lambda: self.model.add_weighted_adapter(names, [0.5, -2.0], name, "cat")  # noqa: E731
        if self.tried(made, True if refused else None):
            r = self.model.peft_config[name].r
            chosen = {"r": r, "lora_alpha": r, "target_modules": layers, "modules_to_save": None, "bias": "none"}
            self.adapters[name] = Adapter(chosen)
            combined = {key: p.detach().clone() for key, p in self.parameters(name).items()}
            for layer in layers:
                parts = [w * d for w, a in zip([0.5, -2.0], known, strict=True) if (d := a.delta(layer)) is not None]
                self.adapters[name].tensors = combined
                own = self.adapters[name].delta(layer)
                assert own is not None
                same(own, sum(parts[1:], parts[0]))

    @precondition(lambda self: self.has_adapters and not self.disabled)
    @rule()
    def unload(self) -> None:
        self.tried(self.model.unload)
        self.adapters, self.active, self.merged = {}, (), ()

    @precondition(lambda self: self.has_adapters and not self.disabled)
    @rule()
    def copy_whole(self) -> None:
        self.model = copy.deepcopy(self.model)

    # -- what always holds --------------------------------------------------------------------------------------------------

    @invariant()
    def the_model_is_what_should_be_there(self) -> None:
        if not hasattr(self, "folder"):
            return
        acting = [] if self.disabled else [self.adapters[name] for name in self.active]
        biases = {name: bias for adapter in self.adapters.values() for name, bias in adapter.biases.items()}
        with torch.no_grad():  # trained biases belong to the base: they stay while the adapter is disabled
            same(self.model(IDS), answer(self.base | biases, acting))
        if not self.has_adapters:
            assert type(self.model) is TinyModel and not self.adapters
            return
        assert set(self.model.peft_config) == set(self.adapters)
        assert tuple(self.model.active_adapters) == self.active
        for name, adapter in self.adapters.items():
            config = self.model.peft_config[name]
            assert all(
                getattr(config, key) == value for key, value in adapter.settings.items() if key != "target_modules"
            )
            own = self.parameters(name)
            assert own.keys() == adapter.tensors.keys()
            assert all(parameter.requires_grad == adapter.trains for parameter in own.values())
            for key, parameter in own.items():
                same(parameter.detach(), adapter.tensors[key])


def run(sequences: int, **more: Any) -> None:
    """Run the machine on this number of sequences."""
    run_state_machine_as_test(
        Verbs,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **more,
        ),
    )


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.files._fsync", lambda path: None)
    monkeypatch.setattr(peft_model, "write_card", lambda *args: None)


def test_after_any_sequence_the_model_is_what_should_be_there() -> None:
    run(FEW)


@pytest.mark.slow
def test_after_any_of_very_many_sequences_the_model_is_what_should_be_there() -> None:
    run(MANY)


def _delete_leaves_a_merged_update(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lora_model, "merged_names", lambda model: [])


def _load_keeps_the_old_alpha(patch: pytest.MonkeyPatch) -> None:
    honest = put_adapter._settings
    patch.setattr(put_adapter, "_settings", lambda config: {**honest(config), "lora_alpha": 0, "use_rslora": 0})


def _switch_forgets_who_trains(patch: pytest.MonkeyPatch) -> None:
    def switch(self: Any, names: Any, inference_mode: bool = False) -> None:
        with patch.context() as inner:
            inner.setattr(LoraLinear, "set_trainable", lambda *rest: None)
            honest(self, names, inference_mode)

    honest = lora_model.LoraModel.set_adapter
    patch.setattr(lora_model.LoraModel, "set_adapter", switch)


@pytest.mark.parametrize(
    "plant", [_delete_leaves_a_merged_update, _load_keeps_the_old_alpha, _switch_forgets_who_trains]
)
def test_the_machine_finds_a_planted_fault(plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run(FEW, phases=[Phase.generate], database=None, report_multiple_bugs=False)
