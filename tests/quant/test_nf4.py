"""A base in 4 bits: what is rounded, how it is read and written in both layouts, trained, merged and decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.tiny_training import tiny_llama, tiny_tokenizer
from lorakeet import LoraConfig, Nf4Config, PeftModel, api, get_peft_model, load_base
from lorakeet.base.load import inspect_model
from lorakeet.cli import main
from lorakeet.config import BaseSettings, make_run
from lorakeet.errors import BaseModelError, ConfigError, MergeError
from lorakeet.inference.fast_decode import fast_decode
from lorakeet.kernels.nf4.format import VALUES, dequantize, quantize
from lorakeet.plan.cut_model import whole_model
from lorakeet.quant.int8 import Int8Embedding, Int8Linear
from lorakeet.quant.nf4 import Nf4Linear
from lorakeet.quant.protocol import dequantized_copy
from lorakeet.quant.quantize import quantize_
from lorakeet.tasks.task import Task

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 2, 5, 9, 9, 1]])
STATE = "weight.quant_state.bitsandbytes__nf4"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base in 4 bits, in each layout."""
    made = {}
    for layout in ("lorakeet", "bitsandbytes"):
        made[layout] = tmp_path_factory.mktemp(layout) / "base"
        words = ["quantize", "--model", str(folder), "--bits", "4", "--layout", layout, "--out", str(made[layout])]
        assert main(words) == 0
    return made


def test_layers_are_in_four_bits_and_the_vocabulary_in_eight(folder: Path) -> None:
    base = load_base(str(folder), load_in_4bit=True)
    layers = [module for module in base.model.modules() if isinstance(module, Nf4Linear)]
    assert len(layers) == 14 and "14 layers in 4 bits, 2 layers in 8 bits" in base.describe()
    assert isinstance(base.model.model.embed_tokens, Int8Embedding) and isinstance(base.model.lm_head, Int8Linear)
    full = load_base(str(folder), dtype="fp32")
    assert base.describe().split(",")[0] == full.describe().split(",")[0]  # values are counted, not bytes
    own, dense = base.model.model.layers[0].mlp.up_proj, full.model.model.layers[0].mlp.up_proj
    assert torch.equal(own.quantized_weight().dequantize(), dequantize(quantize(dense.weight)))
    error = (logits(base.model) - logits(full.model)).std() / logits(full.model).std()
    assert 0 < float(error) < 0.6
    in_memory = load_base(str(folder), dtype="fp32").model
    assert quantize_(in_memory, form="nf4") == 16 and torch.equal(logits(in_memory), logits(base.model))


def test_a_written_base_is_the_same_base(folder: Path, written: dict[str, Path]) -> None:
    read, again = load_base(str(folder), bits=4), load_base(str(written["lorakeet"]))
    assert torch.equal(logits(read.model), logits(again.model)) and read.describe() == again.describe()
    assert json.loads((written["lorakeet"] / "config.json").read_text())["quantization_config"] == {
        "quant_method": "lorakeet_nf4",
        "embeddings": True,
        "modules_to_not_convert": [],
        "layout": "lorakeet",
    }
    for bits in (8, 16):
        with pytest.raises(BaseModelError, match=f"stored quantized, in 4 bits, and bits={bits}"):
            load_base(str(written["lorakeet"]), bits=bits)


def test_the_layout_of_bitsandbytes(folder: Path, written: dict[str, Path]) -> None:
    base, path = load_base(str(written["bitsandbytes"])), written["bitsandbytes"]
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (
        config["quant_method"] == "bitsandbytes" and config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "nf4"
    )
    stored = load_file(path / "model.safetensors")
    owner = "model.layers.0.mlp.down_proj"
    assert {name.removeprefix(f"{owner}.") for name in stored if name.startswith(owner)} == {
        *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE)
    }
    state = json.loads(bytes(stored[f"{owner}.{STATE}"].tolist()))
    assert state["shape"] == [64, 128] and state["blocksize"] == 64 and state["dtype"] == "float32"
    assert stored[f"{owner}.weight"].shape == (64 * 64, 1) and stored["lm_head.weight"].dtype == torch.float32
    own = load_base(str(folder), bits=4, model_options={"quantization_config": Nf4Config(embeddings=False)})
    assert torch.equal(logits(own.model), logits(base.model))
    assert type(base.model.lm_head) is torch.nn.Linear
    base.model.save_pretrained(path.parent / "again")
    assert load_file(path.parent / "again" / "model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize("layout", ["lorakeet", "bitsandbytes"])
def test_a_plan_knows_the_bytes_of_both_layouts(layout: str, written: dict[str, Path]) -> None:
    base = {"model": str(written[layout]), "dtype": "fp32", "device": "cpu"}
    planned = whole_model(make_run({"base": base}), inspect_model(BaseSettings(**base)), Task())
    loaded = load_base(str(written[layout]), dtype="fp32").model
    frozen = sum(p.nbytes for p in planned.parameters() if not p.requires_grad)
    assert frozen == sum(p.nbytes for p in loaded.parameters())


def test_scales_that_are_not_rounded_are_read(folder: Path, written: dict[str, Path], tmp_path: Path) -> None:
    """bitsandbytes writes them by default; written again by Lorakeet they stay what they are."""
    copy_of(written["bitsandbytes"], tmp_path / "single", single)
    base, full = load_base(str(tmp_path / "single")), load_base(str(folder), dtype="fp32").model
    layer = base.model.model.layers[1].mlp.up_proj
    assert layer.absmax.dtype == torch.float32 and layer.nested is None
    dense = full.model.layers[1].mlp.up_proj.weight
    assert torch.equal(layer.quantized_weight().dequantize(), dequantize(quantize(dense, double=False)))
    base.model.config.quantization_config.layout = "lorakeet"
    base.model.save_pretrained(tmp_path / "own")
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    assert torch.equal(logits(load_base(str(tmp_path / "own")).model), logits(base.model))


def copy_of(path: Path, to: Path, change: Any) -> Path:
    """Copy a model folder with its tensors changed."""
    to.mkdir()
    for file in path.iterdir():
        if file.name != "model.safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def single(tensors: dict[str, torch.Tensor]) -> None:
    """Give every layer scales in fp32, as without double quantization."""
    full = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2).state_dict()
    for name in [name for name in tensors if name.endswith(".weight.absmax")]:
        owner = name.removesuffix(".absmax")
        tensors[name] = quantize(full[owner], double=False).absmax
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(full[owner].shape)}
        tensors[f"{owner}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode())).byte()
        for leaf in ("nested_absmax", "nested_quant_map"):
            del tensors[f"{owner}.{leaf}"]


UP = "model.layers.1.mlp.up_proj.weight"


def changed_state(**values: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{UP}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | values
        tensors[name] = torch.tensor(list(json.dumps(state).encode())).byte()

    return change


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("lorakeet", lambda t: t.update({UP: t[UP][:-1].clone()}), "up_proj"),
        ("lorakeet", lambda t: t.pop(UP.replace("weight", "absmax")), r"lack .*up_proj"),
        ("lorakeet", lambda t: t.pop(UP.replace("weight", "nested")), r"lack .*up_proj"),
        ("lorakeet", lambda t: t.update({UP.replace("weight", "nested"): torch.ones(258)[:-1].clone()}), "up_proj"),
        ("bitsandbytes", lambda t: t.update({UP: t[UP][:-1].clone()}), "up_proj"),
        ("bitsandbytes", lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][1:].clone()}), "up_proj"),
        ("bitsandbytes", lambda t: t.pop(f"{UP}.nested_absmax"), r"up_proj"),
        ("bitsandbytes", lambda t: t.pop(f"{UP}.quant_state.bitsandbytes__nf4"), r"not in NF4.*up_proj"),
        ("bitsandbytes", lambda t: t.update({f"{UP}.quant_map": torch.tensor(VALUES) * 2}), r"not in NF4.*up_proj"),
        ("bitsandbytes", changed_state(blocksize=128), r"not in NF4 with blocks of 64.*up_proj"),
        ("bitsandbytes", changed_state(quant_type="fp4"), r"not in NF4.*up_proj"),
        ("bitsandbytes", changed_state(nested_offset="x"), r"not in NF4.*up_proj"),
        ("bitsandbytes", changed_state(nested_offset=None), r"not in NF4.*up_proj"),
    ],
)
def test_damaged_files_are_refused(
    layout: str, change: Any, match: str, written: dict[str, Path], tmp_path: Path
) -> None:
    path = copy_of(written[layout], tmp_path / "base", change)
    with pytest.raises(BaseModelError, match=match):
        load_base(str(path))


def test_other_kinds_of_bitsandbytes_are_refused(written: dict[str, Path], tmp_path: Path) -> None:
    path = copy_of(written["bitsandbytes"], tmp_path / "base", lambda _: None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"quantized already \(bitsandbytes\)"):
        load_base(str(path), bits=4)


def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path) -> None:
    dense = "model.layers.1.mlp.up_proj.weight"
    path = copy_of(folder, tmp_path / "base", lambda t: t[dense].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(BaseModelError, match=r"NaN or infinite values: model\.layers\.1\.mlp\.up_proj"):
        load_base(str(path), bits=4)
    with pytest.raises(BaseModelError, match="NaN or infinite"):
        api.quantize(BaseSettings(model=str(path)), tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()


def test_settings_are_checked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--bits", "5"], ["--bits", "16"], ["--layout", "bitsandbytes"], ["--bits", "4", "--layout", "x"]):
        assert main(["quantize", "--model", str(folder), "--out", str(tmp_path / "out"), *words]) == 2
        assert words[0] in capsys.readouterr().err and not (tmp_path / "out").exists()
    for wrong in ({"layout": "x"}, {"layout": "bitsandbytes", "embeddings": True}, {"double": True}):
        with pytest.raises(ConfigError):
            Nf4Config(**wrong)


def test_an_adapter_fits_the_full_base_and_eight_bits(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        load_base(str(folder), bits=4).model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    for settings in ({"dtype": "fp32"}, {"bits": 8}):
        other = PeftModel.from_pretrained(load_base(str(folder), **settings).model, tmp_path)
        assert float((logits(other) - logits(model)).std() / logits(other).std()) < 0.6


def test_merging_is_refused(folder: Path) -> None:
    model = get_peft_model(
        load_base(str(folder), bits=4).model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    before = logits(model)
    with pytest.raises(MergeError, match="uint8"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_gpt2_stores_its_weights_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=61, initializer_range=0.2)
    full = GPT2LMHeadModel(config).eval()
    full.save_pretrained(tmp_path / "full")
    read = GPT2LMHeadModel.from_pretrained(tmp_path / "full", quantization_config=Nf4Config())
    rounded = GPT2LMHeadModel(config).eval()
    rounded.load_state_dict(full.state_dict())
    assert quantize_(rounded.requires_grad_(False), form="nf4") == 10
    assert torch.equal(logits(read), logits(rounded))
    assert torch.allclose(logits(read), logits(dequantized_copy(read)), atol=1e-4)
    read.save_pretrained(tmp_path / "nf4")
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "nf4")), logits(read))


def test_the_compiled_decoder_step_reads_four_bits(folder: Path) -> None:
    from lorakeet.inference import fast_decode as module

    model = load_base(str(folder), bits=4).model
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    prompt = IDS[:, :4]
    steps = []
    own = module._Quick.step
    for one in (adapted, adapted.disable_adapter):
        with one() if callable(one) and one is not adapted else torch.no_grad():
            plain = model.generate(
                prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            with fast_decode(adapted), pytest.MonkeyPatch.context() as patch:
                patch.setattr(module._Quick, "step", lambda *given: steps.append(1) or own(*given))
                fast = model.generate(
                    prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
        assert torch.equal(plain.sequences, fast.sequences)
        for a, b in zip(plain.logits, fast.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(steps) >= 16
