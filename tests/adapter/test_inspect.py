"""``inspect``: figures compared with a model that has the adapter, damaged files, and compatible tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import make, shake
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.adapter.compatibility import readers
from lorakeet.adapter.inspect import inspect_adapter, update_norm
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.errors import AdapterError, ConfigError

BASE = "ana/tiny-base"


def saved(folder: Path, base: str = "llama", trained: bool = True, **settings: object) -> PeftModel:
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(make(base), LoraConfig(base_model_name_or_path=BASE, **values))
    if trained:
        shake(model)
    model.save_pretrained(folder, notes={"steps": 3, "eval_loss_after": 2.5})
    return model


def spoil(folder: Path, edit) -> dict:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return strict(folder)


def strict(folder: Path | str) -> dict:
    """Inspect the adapter and check that the result is strict JSON."""
    info = inspect_adapter(folder)
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    return info


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 9}},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"lora_bias": True},
    ],
)
def test_every_layer_as_the_model_has_it(settings: dict, tmp_path: Path) -> None:
    model = saved(tmp_path, **settings)
    info = strict(tmp_path)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_alpha")}
    assert [layer["name"] for layer in info["layers"]] == sorted(layers)
    for found in info["layers"]:
        layer = layers[found["name"]]
        assert (found["r"], found["alpha"]) == (layer.r["default"], layer.lora_alpha["default"])
        assert found["scaling"] == layer.scaling["default"]
        assert found["update_norm"] == pytest.approx(float(layer.delta("default").detach().norm()), rel=1e-5)
        assert found["parameters"] == sum(part.numel() for part in layer.parts("default"))
        assert found["kind"] == found["name"].rpartition(".")[2] and not found["dead"]


def test_the_norm_of_a_product_that_is_never_formed() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(7, 300, generator=generator), torch.randn(200, 7, generator=generator)
    assert update_norm(A, B, 0.5) == pytest.approx(float((0.5 * B.double() @ A.double()).norm()), rel=1e-12)
    ones = torch.ones(1, 200_000)  # their product would take 320 GB
    assert update_norm(ones, ones.T, 2.0) == pytest.approx(400_000)


def test_sums_and_settings(tmp_path: Path) -> None:
    model = saved(tmp_path, modules_to_save=["lm_head"], rank_pattern={"layers.0.self_attn.q_proj": 2})
    info = strict(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (info["base_model"], info["architecture"]) == (BASE, "llama")
    assert info["settings"]["r"] == 4 and info["settings"]["target_modules"] == ["q_proj", "v_proj"]
    assert info["parameters"] == model.get_nb_trainable_parameters()[0] == sum(t.numel() for t in tensors.values())
    assert info["bytes"] == 4 * info["parameters"] and info["dtypes"] == {"float32": info["parameters"]}
    assert info["trained_whole"] == ["lm_head.weight"]
    assert info["learned"] and info["finite"] and not info["dead_layers"] and not info["problems"]
    assert info["lorakeet"]["steps"] == 3 and info["lorakeet"]["base"]["name"] == BASE
    kinds = {kind["kind"]: kind for kind in info["kinds"]}
    assert {name: (kind["layers"], kind["r"]) for name, kind in kinds.items()} == {
        "q_proj": (3, [2, 4]),
        "v_proj": (3, [4]),
    }
    norms = [layer["update_norm"] for layer in info["layers"] if layer["kind"] == "v_proj"]
    assert kinds["v_proj"]["update_norm_mean"] == pytest.approx(sum(norms) / 3)
    assert (kinds["v_proj"]["update_norm_min"], kinds["v_proj"]["update_norm_max"]) == (min(norms), max(norms))
    assert kinds["v_proj"]["shapes"] == ["32→16"]


def test_one_dead_layer_and_all_dead(tmp_path: Path) -> None:
    saved(tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    info = spoil(tmp_path, lambda t: t[f"base_model.model.{name}.lora_B.weight"].zero_())
    assert info["learned"] and info["dead_layers"] == [name]
    assert [layer["update_norm"] for layer in info["layers"] if layer["dead"]] == [0.0]
    assert f"1 of 6 layers are all zero: {name}" in inspection_text(info)
    other = "model.layers.2.self_attn.v_proj"
    info = spoil(tmp_path, lambda t: t[f"base_model.model.{other}.lora_A.weight"].zero_())
    assert info["dead_layers"] == [name, other] and [kind["dead"] for kind in info["kinds"]] == [1, 1]
    saved(tmp_path, trained=False)
    info = strict(tmp_path)
    assert not info["learned"] and len(info["dead_layers"]) == 6
    assert "trained     NO" in inspection_text(info) and info["readers"]["lorakeet"] == {
        "can": False,
        "why": ["it is untrained"],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    saved(tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    info = spoil(tmp_path, lambda t: t.update({key: t[key].double().fill_(value)}))
    assert info["finite"] == (value == 1e200) and info["layers"][0]["update_norm"] is None
    assert info["dtypes"].keys() == {"float32", "float64"}
    assert (key in " ".join(info["problems"])) == (not info["finite"]) == (not info["readers"]["lorakeet"]["can"])


def test_layers_that_cannot_be_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def edit(tensors: dict) -> None:
        tensors.pop(q.format(0, "A"))
        tensors[q.format(1, "B")] = torch.ones(32, 5)
        tensors.update({q.format(2, "A"): torch.ones(3, 32), q.format(2, "B"): torch.ones(32, 3)})

    info = spoil(tmp_path, edit)
    assert info["problems"] == [
        "model.layers.0.self_attn.q_proj has no A",
        "model.layers.1.self_attn.q_proj has A [4, 32] and B [32, 5], which cannot be multiplied",
        "model.layers.2.self_attn.q_proj has A [3, 32] and B [32, 3], but the settings have rank 4",
    ]
    assert len(info["layers"]) == 4 and info["readers"]["lorakeet"]["why"] == info["problems"]


def test_an_adapter_that_another_tool_saved(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "lorakeet.json").unlink()
    info = strict(tmp_path)
    assert info["lorakeet"] == {} and info["architecture"] is None
    assert info["readers"]["Ollama"] == {"can": True, "why": ["if the base is llama or gemma2"]}
    assert "made with" not in inspection_text(info)


def test_it_can_be_read_by_people(tmp_path: Path) -> None:
    saved(tmp_path)
    lines = inspection_text(inspect_adapter(tmp_path)).splitlines()
    assert "base        ana/tiny-base (llama)" in lines
    assert "targets     q_proj, v_proj" in lines and "notes       steps=3, eval_loss_after=2.5" in lines
    [head, q, v] = [line for line in lines if line.startswith(("layer ", "q_proj ", "v_proj "))]
    assert head.index("rank") == q.index("4  ") and q.split()[:4] == ["q_proj", "3", "4", "32→32"]
    assert v.split()[3] == "32→16"
    assert "  lorakeet  yes" in lines and "  llama.cpp yes (after convert_lora_to_gguf.py)" in lines
    assert max(map(len, lines)) < 120
    notes = json.loads((tmp_path / "lorakeet.json").read_text())
    (tmp_path / "lorakeet.json").write_text(
        json.dumps({**notes, **{f"a long figure, number {n}": n / 7 for n in range(9)}})
    )
    lines = inspection_text(inspect_adapter(tmp_path)).splitlines()
    assert max(map(len, lines)) <= 120 and "number 6=0.85714" in " ".join(lines)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        inspect_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        inspect_adapter(tmp_path)
    saved(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    with pytest.raises(AdapterError, match="damaged"):
        inspect_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        inspect_adapter(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_qalora": True}))
    with pytest.raises(ConfigError, match="use_qalora"):
        inspect_adapter(tmp_path)


# -- compatible tools --------------------------------------------------------------------------------------------------

PLAIN = ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)


def answers(
    keys: tuple[str, ...] = PLAIN, ranks: tuple[int, ...] = (8,), base: str | None = "llama", **settings: object
):
    config = LoraConfig(target_modules=["q_proj"], **settings)
    return readers(config, keys, ranks, base=base)


def refusing(**arguments: object) -> set[str]:
    return {tool for tool, answer in answers(**arguments).items() if not answer["can"]} - {"mlx-lm"}


@pytest.mark.parametrize(
    ("arguments", "tools"),
    [
        ({}, set()),
        ({"use_rslora": True}, {"llama.cpp", "Ollama"}),
        ({"alpha_pattern": {"q_proj": 3}}, {"llama.cpp", "Ollama"}),
        ({"rank_pattern": {"q_proj": 3}}, set()),
        ({"lora_alpha": 8.5}, {"Ollama"}),
        ({"base": "qwen3"}, {"Ollama"}),
        ({"bias": "all", "keys": (*PLAIN, "base_model.model.fc.bias")}, {"vLLM", "llama.cpp", "Ollama"}),
        (
            {"lora_bias": True, "keys": (*PLAIN, PLAIN[0].replace("A.weight", "B.bias"))},
            {"vLLM", "llama.cpp", "Ollama"},
        ),
        ({"modules_to_save": ["lm_head"], "keys": (*PLAIN, "lm_head.weight")}, {"vLLM", "llama.cpp", "Ollama"}),
        ({"modules_to_save": ["score"], "keys": (*PLAIN, "score.weight")}, {"llama.cpp", "Ollama"}),
        ({"keys": (*PLAIN, "model.embed_tokens.base_layer.weight", "model.norm.weight")}, set()),
        ({"ranks": (513,)}, {"vLLM"}),
    ],
)
def test_tools_that_refuse(arguments: dict, tools: set[str]) -> None:
    assert refusing(**arguments) == tools


def test_conditions_of_tools() -> None:
    assert answers(ranks=(8, 16))["vLLM"] == {"can": True, "why": []}
    assert answers(ranks=(32,))["vLLM"]["why"] == answers(ranks=(8, 17))["vLLM"]["why"] == ["with --max-lora-rank 32"]
    assert "rank_pattern and alpha_pattern" in answers(rank_pattern={"q": 1}, alpha_pattern={"q": 1})["vLLM"]["why"][0]
    head = answers(keys=("base_model.model.lm_head.lora_A.weight",))
    assert head["llama.cpp"]["can"] and "tie lm_head" in head["llama.cpp"]["why"][1]
    assert not answers()["mlx-lm"]["can"]
