"""Residents: what is refused, and what becomes of requests under way when an adapter is replaced."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.heap import HOLE_BYTES, hole_below
from helpers.served import KINDS, Served
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.base.load import load_base
from lorakeet.errors import AdapterError, LorakeetError, UnknownAdapter
from lorakeet.lora.config import LoraConfig
from lorakeet.runs.process_memory import resident_bytes
from lorakeet.serve.engine import placement
from lorakeet.serve.engine.engine import Engine
from lorakeet.serve.engine.requests import Request, Sampling
from lorakeet.serve.engine.residents import Residents


@pytest.fixture(scope="module")
def residents(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Residents:
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(served.adapters, folder, dirs_exist_ok=True)
    return Residents(served.base(), folder)


def damaged(residents: Residents, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]) -> str:
    """Copy an adapter, change its settings, tensors or notes, and return its name."""
    assert residents.folder is not None
    folder = residents.folder / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(residents.folder / "plain", folder)
    files = [folder / "adapter_config.json", folder / "lorakeet.json"]
    settings, notes = (json.loads(file.read_text()) for file in files)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(settings, tensors, notes)
    for file, content in zip(files, (settings, notes), strict=True):
        file.write_text(json.dumps(content))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return "damaged"


def some(tensors: dict[str, Any], part: str) -> list[str]:
    return [key for key in tensors if part in key]


BAD: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any]]] = {
    "nan": ("NaN", lambda s, t, n: t[some(t, "lora_A")[0]].fill_(float("nan"))),
    "untrained": ("untrained", lambda s, t, n: [t[key].zero_() for key in some(t, "lora_B")]),
    "missing": ("missing tensors", lambda s, t, n: t.pop(some(t, "q_proj.lora_A")[0])),
    "unexpected": (
        "unexpected tensors",
        lambda s, t, n: t.update({"base_model.model.x.lora_A.weight": torch.ones(4, 2)}),
    ),
    "shape": ("wrong shapes", lambda s, t, n: t.update({some(t, "lora_A")[0]: torch.ones(4, 3)})),
    "rank": ("wrong shapes", lambda s, t, n: s.update(r=7)),
    "layers": ("x_proj", lambda s, t, n: s.update(target_modules=["x_proj"])),
    "base": ("trained on", lambda s, t, n: n["base"]["fingerprint"].update(architecture="gpt2")),
    "values": ("its weights differ", lambda s, t, n: next(iter(n["base"]["fingerprint"]["values"].values())).reverse()),
    "bias": ("biases", lambda s, t, n: s.update(bias="all")),
    "task": ("is for SEQ_CLS", lambda s, t, n: n.update(task={"type": "SEQ_CLS", "labels": ["a"]})),
    "embedding": (
        "its own",
        lambda s, t, n: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(260, 32)}),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapter(residents: Residents, name: str) -> None:
    words, change = BAD[name]
    before = {key: value.clone() for key, value in residents.model.state_dict().items()}
    with pytest.raises(LorakeetError, match=words):
        residents.load(damaged(residents, change))
    after = residents.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not residents.list()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../plain", "/etc", "a\\b", "a\0b", "x" * 300, "plain\n", None])
def test_no_plain_name(residents: Residents, name: Any) -> None:
    with pytest.raises(AdapterError, match="cannot be"):
        residents.load(name)


def test_elsewhere(residents: Residents, served: Served, tmp_path: Path) -> None:
    assert residents.folder is not None
    for source in (served.adapters / "plain", "user/name", "../adapters/plain"):
        with pytest.raises(AdapterError, match="another place"):
            residents.load("plain", source)
    with pytest.raises(AdapterError, match="no adapter 'plainn'"):
        residents.load("plainn")
    (residents.folder / "link").symlink_to(served.adapters / "plain")
    with pytest.raises(AdapterError, match="no adapter 'link'"):
        residents.load("link")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_usual_kinds_are_made_ready_beside_the_model(
    served: Served, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kind is put on the model between two steps in the slow way; each has the very parts that this would give it."""
    residents, slow = (Residents(served.base(), served.adapters) for _ in range(2))
    monkeypatch.setattr(slow.placement, "_places_of", lambda config: None)
    for name in (*KINDS, "plain-2", "dora-2", "head-2"):  # the last ones join layers that are there
        with monkeypatch.context() as patch:
            patch.setattr(placement, "put_adapter", None)
            resident = residents.load(name, scale=scale)
        expected = slow.load(name, scale=scale)
        assert (resident.slot, resident.version, resident.rank) == (expected.slot, expected.version, expected.rank)
        parts = [
            {id(part): part for part in one.model.lora_parts() if resident.slot in part.adapters}
            for one in (residents, slow)
        ]
        assert len(parts[0]) == len(parts[1]) > 0
    one, other = residents.model.state_dict(), slow.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    tables = [
        [(layer.scaling, layer.r, layer._fused) for layer in each.model.lora_layers()] for each in (residents, slow)
    ]
    assert sorted(map(str, tables[0])) == sorted(map(str, tables[1]))
    for resident in residents.list():
        residents.unload(resident.name)
    assert not [part for part in residents.model.lora_parts() if part.adapters]


def test_on_8_bits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is copied in full precision, whatever the base stores; norms are those of the rounded weights."""
    bases = [load_base(str(served.folder), dtype="fp32", device="cpu", bits=8) for _ in range(2)]
    residents, slow = (Residents(base, served.adapters) for base in bases)
    monkeypatch.setattr(slow.placement, "_places_of", lambda config: None)
    for name in ("head", "dora"):
        slow.load(name)
        with monkeypatch.context() as patch:
            patch.setattr(placement, "put_adapter", None)
            residents.load(name)
    one, other = residents.model.state_dict(), slow.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_norms_of_dora_are_there_before_the_first_step(served: Served) -> None:
    residents = Residents(served.base(), served.adapters)
    resident = residents.load("dora", scale=0.5)
    layers = [layer for layer in residents.model.lora_layers() if resident.slot in layer.r]
    before = [layer.part("lora_magnitude_vector", resident.slot)._known for layer in layers]
    assert all(known is not None for known in before)
    for layer in layers:
        layer.variants[resident.slot].output_scale(layer, resident.slot)
    assert [layer.part("lora_magnitude_vector", resident.slot)._known for layer in layers] == before


def test_part_of_the_base(served: Served, tmp_path: Path) -> None:
    base = served.base()
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with torch.no_grad():
        for parameter in model.adapter_parameters("default"):
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "pissa")
    residents = Residents(served.base(), tmp_path)
    with pytest.raises(AdapterError, match="took a part of the base"):
        residents.load("pissa")


def test_scale(served: Served) -> None:
    residents = Residents(served.base(), served.adapters)
    whole, half = residents.load("plain"), residents.load("rslora", scale=0.5)
    layer = next(layer for layer in residents.model.lora_layers() if half.slot in layer.r)
    assert layer.scaling[half.slot] == 0.5 * 8 / 8**0.5 and layer.scaling[whole.slot] == 2.0
    again = residents.load("plain", scale=0.5)
    assert again.digest == whole.digest and residents.root(again) != residents.root(whole)
    assert (residents.version("plain"), [one.name for one in residents.list()]) == (3, ["plain", "rslora"])


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_replace_and_unload(served: Served, name: str) -> None:
    base = served.base()
    residents = Residents(base, served.adapters, allow_elsewhere=True)
    engine = Engine(base, residents, page_tokens=4, cache_bytes=1 << 20)
    prompt = base.tokenizer("the weather is ")["input_ids"]

    def ask() -> Any:
        return engine.submit(Request(prompt, Sampling(temperature=0, max_tokens=9), name))

    residents.load(name)
    old = ask()
    engine.step()
    residents.load(name, served.adapters / f"{name}-2")
    new = ask()
    engine.step()
    residents.unload(name)
    with pytest.raises(UnknownAdapter):
        ask()
    assert len(residents.model.peft_config) == 2
    while not (old.done and new.done):
        engine.step()
    texts = [served.answer(folder, "the weather is ", 9) for folder in (name, f"{name}-2")]
    assert [old.result().text, new.result().text] == texts and texts[0] != texts[1]
    assert (old.version, new.version) == (1, 2)
    assert not residents.model.peft_config and residents.list() == []


def test_load_while_running(served: Served) -> None:
    base = served.base()
    residents = Residents(base, served.adapters)
    engine = Engine(base, residents, page_tokens=4, cache_bytes=1 << 20)
    engine.start()
    stream = engine.submit(Request([5, 6, 7], Sampling(temperature=0, max_tokens=100, ignore_end=True)))
    for name in ("plain", "wide", "dora"):
        residents.load(name)
        ids = base.tokenizer("he says: ")["input_ids"]
        answer = engine.submit(Request(ids, Sampling(temperature=0, max_tokens=5), name)).result()
        assert answer.text == served.answer(name, "he says: ", 5)
        residents.unload(name)
    assert stream.result().finish == "length"
    engine.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems return it by themselves")
@pytest.mark.parametrize("is_copy", [False, True], ids=["in the model", "beside it"])
@pytest.mark.parametrize("way", ["unloaded", "replaced", "with its last request"])
def test_memory_goes_back_to_the_system_when_a_version_goes(served: Served, way: str, is_copy: bool) -> None:
    residents = Residents(served.base(), served.adapters)
    if is_copy:
        residents.own_copy = lambda layers, update: [update(layer) for layer in layers]
    first, is_used = residents.load("plain"), way == "with its last request"
    assert (first.copy is not None) == is_copy
    if is_used:
        residents.acquire("plain")
        residents.unload("plain")
    end, before = hole_below(), resident_bytes()
    if is_used:
        residents.release(first)
    else:
        residents.unload("plain") if way == "unloaded" else residents.load("plain", "plain-2")
    assert before - resident_bytes() > 0.7 * HOLE_BYTES and len(end)
    assert first.copy is None and len(residents._held) == (way == "replaced")


@pytest.mark.slow
def test_memory(served: Served) -> None:
    """100 loads and unloads leave no more in memory than the first ones."""
    residents = Residents(served.base(), served.adapters)

    def cycle() -> None:
        for name in ("plain", "wide", "dora", "head"):
            residents.load(name)
        for one in residents.list():
            residents.unload(one.name)

    for _ in range(10):
        cycle()
    before = resident_bytes()
    for _ in range(100):
        cycle()
    assert resident_bytes() < 1.05 * before
    assert not residents.model.peft_config and len(residents._held) == 0
