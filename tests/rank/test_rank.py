"""Ranks of adapters: singular values against a dense SVD, resized adapters against the best approximation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.tiny import make, shake, token_ids
from helpers.tiny_experts import IDS, adapted, moe
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.cli import main
from lorakeet.errors import AdapterError
from lorakeet.lora.algebra.decomposition import decompose
from lorakeet.lora.algebra.spectrum import Spectrum, singular_values
from lorakeet.lora.layer import LoraLayer
from lorakeet.rank.plot import draw_ranks
from lorakeet.rank.report import rank_report, rank_text
from lorakeet.rank.resize import resize


class Convolutions(nn.Module):
    """Two convolutions, one of them with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(6, 8, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.plain(x))


def saved(folder: Path, base: Any = "llama", **settings: Any) -> PeftModel:
    values = {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(make(base) if isinstance(base, str) else base, LoraConfig(**values))
    shake(model)
    with torch.no_grad():  # singular values that fall quickly
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and parameter.ndim == 2:
                parameter *= 0.3 ** torch.arange(parameter.shape[1])
    model.save_pretrained(folder)
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.delta("default").detach().double()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9}},
    {"target_modules": ["embed_tokens", "down_proj"]},
    {"lora_bias": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_singular_values_are_those_of_the_dense_update(settings: dict[str, Any], tmp_path: Path) -> None:
    dense = deltas(saved(tmp_path, **settings))
    layers = {layer["name"]: layer for layer in rank_report(tmp_path)["layers"]}
    assert layers.keys() == dense.keys()
    for name, delta in dense.items():
        values = torch.tensor(layers[name]["singular_values"], dtype=torch.float64)
        expected = torch.linalg.svdvals(delta)[: len(values)]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6 * float(expected[0]))
        assert layers[name]["update_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rank", [1, 2, 6])
def test_a_resized_adapter_is_the_best_of_its_rank(settings: dict[str, Any], rank: int, tmp_path: Path) -> None:
    dense = deltas(saved(tmp_path / "a", **settings))
    made = resize(tmp_path / "a", tmp_path / "b", rank=rank)
    model = PeftModel.from_pretrained(make("llama"), tmp_path / "b")
    for name, delta in deltas(model).items():
        U, values, Vh = torch.linalg.svd(dense[name], full_matrices=False)
        best = (U[:, :rank] * values[:rank]) @ Vh[:rank]
        torch.testing.assert_close(delta, best, rtol=1e-4, atol=2e-6 * float(values[0]))
    assert set(made["ranks"].values()) <= {rank, 3}


def test_energy_chooses_a_rank_for_each_layer(tmp_path: Path) -> None:
    dense = deltas(saved(tmp_path / "a", r=6))
    made = resize(tmp_path / "a", tmp_path / "b", energy=0.99)
    after = deltas(PeftModel.from_pretrained(make("llama"), tmp_path / "b"))
    for name, delta in dense.items():
        rank = made["ranks"][name]
        values = torch.linalg.svdvals(delta) ** 2
        assert values[:rank].sum() >= 0.99 * values.sum() > values[: rank - 1].sum()
        assert (delta - after[name]).norm() ** 2 <= 0.0101 * delta.norm() ** 2
    assert made["parameters_after"] < made["parameters_before"] and made["energy_kept"] >= 0.99


def test_whole_energy_keeps_the_outputs(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", lora_bias=True, modules_to_save=["lm_head"])
    resize(tmp_path / "a", tmp_path / "b", energy=1.0)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "b")
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits, rtol=1e-4, atol=1e-5)


def test_peft_reads_a_resized_adapter_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved(tmp_path / "a")
    resize(tmp_path / "a", tmp_path / "b", energy=0.9)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "b")
    torch.testing.assert_close(ours(token_ids()).logits, theirs(token_ids()).logits, rtol=1e-5, atol=1e-6)


def test_convolutions_and_their_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Convolutions()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = saved(tmp_path / "a", base, r=4, target_modules=["plain", "grouped"])
    was = model.plain.delta("default").detach().flatten(1).double()
    assert resize(tmp_path / "a", tmp_path / "b", rank=3)["ranks"] == {"plain": 3, "grouped": 2}  # a multiple of groups
    resize(tmp_path / "a", tmp_path / "whole", energy=1.0)
    found = []
    for name in ("b", "whole"):
        again = Convolutions()
        again.load_state_dict(state)
        found.append(PeftModel.from_pretrained(again, tmp_path / name))
    U, values, Vh = torch.linalg.svd(was, full_matrices=False)
    now = found[0].plain.delta("default").detach().flatten(1).double()
    torch.testing.assert_close(now, (U[:, :3] * values[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(found[1](x), model(x), rtol=1e-4, atol=1e-5)


def test_stacked_experts(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "a")
    resize(tmp_path / "a", tmp_path / "b", energy=1.0)
    again = PeftModel.from_pretrained(moe(), tmp_path / "b")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    report = rank_report(tmp_path / "a")
    assert all(1 <= layer["rank_needed"] <= layer["r"] for layer in report["layers"])


@pytest.mark.parametrize(("r", "n_in", "n_out"), [(1, 5, 3), (7, 4, 9), (8, 30, 20), (3, 1, 1)])
def test_decomposition_of_odd_shapes(r: int, n_in: int, n_out: int) -> None:
    torch.manual_seed(r)
    a, b = torch.randn(r, n_in), torch.randn(n_out, r)
    found = decompose(a, b, 0.5)
    delta = 0.5 * b.double() @ a.double()
    torch.testing.assert_close((found.U * found.values) @ found.V.T, delta)
    torch.testing.assert_close(torch.tensor(singular_values(a, b, 0.5), dtype=torch.float64), found.values)


def test_measures_of_a_spectrum() -> None:
    equal = Spectrum(((2.0, 2.0, 2.0, 2.0),))
    assert equal.effective_rank == pytest.approx(4) and equal.rank_for(0.7) == 3 and equal.norm == 4
    assert Spectrum(((1.0, 0.0),)).effective_rank == 1 and Spectrum(((0.0, 0.0),)).effective_rank == 0
    assert Spectrum(((0.0, 0.0),)).rank_for(0.99) == 1
    assert Spectrum(((3.0, 0.1), (1.0, 1.0))).rank_for(0.9) == 2  # the worst of several matrices decides
    assert Spectrum(((3.0, 1.0),)).energy_kept == pytest.approx([0.9, 1.0])


def test_a_layer_that_did_not_learn_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").lora_B["default"].weight.zero_()
    model.save_pretrained(tmp_path)
    report = rank_report(tmp_path)
    assert [layer["name"] for layer in report["layers"] if layer["learned"] == "nothing"] == [
        "model.layers.0.mlp.down_proj"
    ]
    text = rank_text(report)
    assert "1 layers learned nothing: model.layers.0.mlp.down_proj" in text and "99" in text
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    resize(tmp_path, tmp_path / "b", energy=0.9)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "b", is_trainable=True)
    again(token_ids(), labels=token_ids()).loss.backward()
    dead = again.get_submodule("model.layers.0.mlp.down_proj")
    assert dead.lora_B["default"].weight.grad.any(), "it can still be trained"


def test_what_cannot_be_resized(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="cannot be used: .*NaN"):
        rank_report(tmp_path)
    save_file({name: value for name, value in tensors.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="has no A"):
        resize(tmp_path, tmp_path / "b", rank=1)
    assert not (tmp_path / "b").exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a")
    adapter, small = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["rank", adapter, "--picture", str(tmp_path / "ranks.png"), "--out", small, "--energy", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "q_proj" in out and f"{small}: " in out and (tmp_path / "ranks.png").stat().st_size > 10_000
    assert main(["rank", small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"] == small
    for words, message in [
        ([adapter, "--resize", "2"], "--resize has no folder"),
        ([adapter, "--resize", "2", "--energy", "0.9", "--out", "x"], "both set"),
        ([adapter, "--data", "x.jsonl"], "there is no --out"),
        ([adapter, "--energy", "1.5"], "1.5"),
        ([adapter, "--out", small], "is not empty"),
    ]:
        assert main(["rank", *words]) == 2
        assert message in capsys.readouterr().err


def test_picture_of_layers_without_numbers(tmp_path: Path) -> None:
    saved(tmp_path, Convolutions(), r=2, target_modules=["plain", "grouped"])
    draw_ranks(rank_report(tmp_path), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"
