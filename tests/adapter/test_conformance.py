"""Conformance: options x architectures, each compared with ``peft`` and with a dense ΔW.

Each case is one adapter.

- Saved by peft, it loads here, with the same outputs and the same gradients of a step.
- Saved again here, it has the same keys, shapes and settings, and peft loads it.
- Merged, every weight is W + s·B·A; unmerged, it has the old bits.

The default run takes all options on five architectures and three on each other one; the full table is marked slow.

Other layers than linear ones have their own files: test_conv.py, test_target_parameters.py (experts), test_vocabulary.py
(rows of embeddings, tied weights, resized vocabularies), test_several_adapters.py (mixed batches, weighted sums).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft.tuners.lora.layer import LoraLayer as TheirLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from helpers.tiny import shake, token_ids
from helpers.tiny_architectures import SIZES, build, tiny_config
from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model
from lorakeet.lora.default_targets import default_targets
from lorakeet.lora.layer import LoraLayer

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "defaults": {"target_modules": None},
    "rank and alpha": {"r": 3, "lora_alpha": 7},
    "dropout": {"lora_dropout": 0.3},
    "regex": {"target_modules": r".*\.({first}|{second})"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["{first}"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "head trained whole": {"modules_to_save": ["{head}"]},
    "one of the layers": {"layers_to_transform": [1]},
    "layers pattern": {"layers_to_transform": 0, "layers_pattern": "{layers}"},
    "rank pattern": {"rank_pattern": {"{first}": 2}, "alpha_pattern": {"{third}": 9}},
    "pattern of one layer": {"rank_pattern": {"{layers}.1.*{first}": 5}},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["{embedding}", "{first}"]},
    "lora_bias": {"lora_bias": True},
}
ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "albert", "deberta", "deberta-v2", "modernbert"]
SEQ2SEQ = ["t5", "mt5", "bart", "mbart", "marian", "pegasus"]
#: architecture -> a linear layer that is neither a query nor a value projection
THIRD = {
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe"], "o_proj"),
    **dict.fromkeys(["opt", "bart", "mbart", "marian", "pegasus"], "fc1"),
    "t5": "wi",
    "mt5": "wi_0",
    **dict.fromkeys(["bloom", "gpt_neox", "falcon"], "dense_h_to_4h"),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "mpnet", "deberta", "deberta-v2"], "intermediate.dense"),
    "phi": "dense",
    "phi3": "gate_up_proj",
    "gpt2": "c_fc",
    "distilbert": "lin1",
    "albert": "ffn",
    "modernbert": "Wi",
}
EVERY_OPTION = ("llama", "opt", "gpt2", "bert", "t5")
#: cases where peft differs (docs/differences-from-peft.md)
ELSEWHERE = {
    *((kind, "all-linear") for kind in ("mixtral", "qwen2_moe", "qwen3_moe")),  # it adds the experts and the router
    *((kind, "all-linear") for kind in ENCODERS),  # it adapts the fresh head, then fails to train it whole
    *((kind, "defaults") for kind in SIZES if kind not in PEFT_DEFAULTS),
    ("marian", "embedding"),  # it does not save the decoder's, though it is another weight there
    *(("albert", option) for option in ("one of the layers", "pattern of one layer")),  # all its layers are one
    *(
        (kind, option) for kind in ("mixtral", "qwen3_moe") for option in ("regex", "defaults")
    ),  # it rewrites the targets
}


def table() -> list[Any]:
    rows, options = [], list(OPTIONS)
    for number, kind in enumerate(SIZES):
        core = set(options if kind in EVERY_OPTION else [options[(3 * number + k) % len(options)] for k in range(3)])
        for option in options:
            if (kind, option) not in ELSEWHERE:
                marks = [] if option in core or (kind, option) == ("deberta", "bias all") else [pytest.mark.slow]
                rows.append(pytest.param(kind, option, id=f"{kind}-{option}", marks=marks))
    return rows


def task_of(kind: str) -> str:
    return "SEQ_2_SEQ_LM" if kind in SEQ2SEQ else "TOKEN_CLS" if kind in ENCODERS else "CAUSAL_LM"


def make(kind: str) -> tf.PreTrainedModel:
    auto = {
        "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
        "TOKEN_CLS": tf.AutoModelForTokenClassification,
        "CAUSAL_LM": tf.AutoModelForCausalLM,
    }
    return build(auto[task_of(kind)], kind)


def settings(kind: str, option: str) -> dict[str, Any]:
    model = make(kind)
    targets = default_targets(model)
    assert isinstance(targets, list)
    third = THIRD.get(kind, "down_proj")
    paths = [name for name, _ in model.named_modules()]
    leaf_of = {id(module): name.rpartition(".")[2] for name, module in reversed(list(model.named_modules()))}
    names = {
        "{first}": targets[0],
        "{second}": targets[1] if len(targets) > 1 else third,
        "{third}": third,
        "{head}": "classifier" if kind in ENCODERS else leaf_of[id(model.get_output_embeddings())],
        "{layers}": next(found[1] for path in paths if (found := re.match(r"(?:.*\.)?(\w+)\.0\.", path + "."))),
        "{embedding}": leaf_of[id(model.get_input_embeddings())],
    }

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for key, name in names.items():
                value = value.replace(key, name)
            return value
        if isinstance(value, list):
            return [fill(item) for item in value]
        return {fill(k): fill(v) for k, v in value.items()} if isinstance(value, dict) else value

    chosen: dict[str, Any] = {"target_modules": [*targets, third], "r": 4, "task_type": task_of(kind)}
    chosen |= {key: fill(value) for key, value in OPTIONS[option].items()}
    return {**chosen, "fan_in_fan_out": True} if kind == "gpt2" else chosen


def sample(kind: str) -> dict[str, torch.Tensor]:
    ids = token_ids(2, 7)
    return {"input_ids": ids, "labels": ids % 3 if kind in ENCODERS else ids}


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample(kind)).logits


def gradients(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Return the gradients by the parameter's key in the file."""
    model.zero_grad()
    model(**sample(kind)).loss.backward()
    inner = re.compile(r"^base_model\.model\.|\.modules_to_save(?=\.default)|\.default")
    return {inner.sub("", name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def keys(folder: Path) -> dict[str, list[int]]:
    redundant = (
        ".original_module.bias",
        ".modules_to_save.bias",
    )  # copies that peft writes beside the biases' own keys
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    head = "base_model.model.head."  # ModernBERT's, which peft leaves random and does not save
    return {key: shape for key, shape in shapes.items() if not key.endswith(redundant) and not key.startswith(head)}


def comparable(folder: Path) -> dict[str, Any]:
    """Read the saved settings; lists without an order become sets."""
    values = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values[key], list):
            values[key] = sorted(set(values[key]) - {"head"})  # PEFT repeats a head that is both the task's and named
    values["target_parameters"] = values["target_parameters"] or None
    return values


def dense_update(folder: Path, path: str, layer: TheirLayer, config: dict[str, Any]) -> torch.Tensor:
    """Compute s·B·A of the file's tensors, in the base weight's layout."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix, embedding = f"base_model.model.{path}", layer.lora_embedding_A
    a, b = (
        tensors[f"{prefix}.{'lora_embedding_' if embedding else 'lora_'}{half}{'' if embedding else '.weight'}"]
        for half in "AB"
    )
    r, alpha = a.shape[0], config["lora_alpha"]
    for pattern, value in config["alpha_pattern"].items():
        alpha = value if re.match(rf"(.*\.)?({pattern})$", path) else alpha
    ba = alpha / (math.sqrt(r) if config["use_rslora"] else r) * (b @ a)
    transposed = bool(embedding) or type(layer.get_base_layer()).__name__ == "Conv1D"
    return ba.T if transposed else ba


@pytest.mark.parametrize(("kind", "option"), table())
def test_row(kind: str, option: str, tmp_path: Path) -> None:
    chosen = settings(kind, option)
    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**chosen))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs, kind)
    near = 2e-5 * max(1.0, float(wanted.abs().max()))
    assert (wanted - logits(make(kind), kind)).abs().max() > 1e-3, "the adapter does nothing"

    # from peft to here: outputs, gradients
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(logits(loaded, kind), wanted, rtol=0, atol=near)
    mine, true = gradients(loaded, kind), gradients(theirs, kind)
    assert mine.keys() == true.keys() and mine
    for name, gradient in true.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=2e-5, msg=name)

    # and back: keys, shapes, settings, outputs
    loaded.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "theirs")
    assert {f"base_model.model.{name}" for name in mine} <= keys(tmp_path / "again").keys(), "trained, and not saved"
    back = peft.PeftModel.from_pretrained(make(kind), tmp_path / "again")
    torch.testing.assert_close(logits(back, kind), wanted, rtol=0, atol=near)

    # made here: the same keys and settings
    ours = get_peft_model(make(kind), LoraConfig(**chosen))
    ours.save_pretrained(tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    config = comparable(tmp_path / "theirs")
    loose = {"target_modules": 0} if option == "all-linear" else {}  # short names or full ones: the keys are the same
    assert comparable(tmp_path / "ours") | loose == config | loose
    assert comparable(tmp_path / "again") | {"target_modules": 0} == config | {"target_modules": 0}
    assert PeftConfig.from_pretrained(tmp_path / "ours").to_dict() == ours.peft_config["default"].to_dict() | {
        "inference_mode": True
    }

    # merged: W + s·B·A in each layer, and the old bits after
    if option == "lora_bias" and any(
        layer.base_layer.bias is None for layer in loaded.lora_layers() if hasattr(layer.base_layer, "bias")
    ):
        return  # refused, and tested elsewhere
    before = {name: layer.base_layer.weight for name, layer in loaded.named_modules() if isinstance(layer, LoraLayer)}
    loaded.merge_adapter()
    their_layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in theirs.named_modules()
        if isinstance(layer, TheirLayer)
    }
    assert before.keys() == their_layers.keys()
    for path, weight in before.items():
        update = dense_update(tmp_path / "theirs", path, their_layers[path], config)
        torch.testing.assert_close(update, their_layers[path].get_delta_weight("default"), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loaded.get_submodule(path).base_layer.weight, weight + update, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(loaded, kind), wanted, rtol=0, atol=near)
    loaded.unmerge()
    assert all(loaded.get_submodule(path).base_layer.weight is weight for path, weight in before.items())


def test_the_table_has_every_option_and_every_architecture() -> None:
    assert {kind for kind in SIZES if type(tiny_config(kind)).model_type} == {row.values[0] for row in table()}
    core = [row for row in table() if not row.marks]
    assert {row.values[0] for row in core} == set(SIZES) and {row.values[1] for row in core} == set(OPTIONS)


@pytest.mark.parametrize("kind", EVERY_OPTION)
def test_merged_it_loads_as_a_plain_model(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(make(kind), LoraConfig(**settings(kind, "plain")))
    shake(model)
    wanted = logits(model, kind)
    merged = model.merge_and_unload()
    assert type(merged) is type(make(kind))
    merged.save_pretrained(tmp_path)
    plain = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain, kind), wanted, rtol=0, atol=2e-5)
