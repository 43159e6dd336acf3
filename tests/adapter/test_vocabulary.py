"""Trained rows of an embedding, tied layers and resized vocabularies: beside PEFT, a dense update, and by their meaning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, ConfigError, TargetError
from lorakeet.patches.fused_loss import fused_loss

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
TOKENS = [7, 3, 60]
ROWS = {
    "a list": {"trainable_token_indices": TOKENS},
    "by name": {"trainable_token_indices": {"embed_tokens": TOKENS}},
    "both named": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "others in the head": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [9]}},
    "ensured": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
}


def untied() -> tf.PreTrainedModel:
    model = copy.deepcopy(make("llama"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.25)
    return model


def ids() -> torch.Tensor:
    found = token_ids()
    found[0, 1:4], found[1, 2] = torch.tensor(TOKENS), 9
    return found


def keys(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    named = {
        name.removeprefix("base_model.model.").replace(".token_adapter", ""): p for name, p in model.named_parameters()
    }
    return {name: p.grad for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("option", ROWS)
def test_trained_rows_both_ways(option: str, tied: bool, tmp_path: Path) -> None:
    fresh = (lambda: make("llama")) if tied else untied
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(**SMALL, **ROWS[option]))
    ours = get_peft_model(fresh(), LoraConfig(**SMALL, **ROWS[option]))
    assert theirs.get_nb_trainable_parameters()[0] == ours.get_nb_trainable_parameters()[0]
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    wanted = theirs(ids()).logits
    ours = PeftModel.from_pretrained(fresh(), tmp_path / "theirs", is_trainable=True).eval()
    torch.testing.assert_close(ours(ids()).logits, wanted, rtol=0, atol=1e-5)
    assert (wanted - fresh()(ids()).logits).abs().max() > 1e-2
    true = gradients(theirs)
    mine = gradients(ours)
    assert mine.keys() == true.keys() and any("trainable_tokens_delta" in name for name in mine)
    for name, grad in true.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-6, msg=name)

    ours.save_pretrained(tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")
    torch.testing.assert_close(back(ids()).logits, wanted, rtol=0, atol=1e-5)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(ids()).logits, fresh()(ids()).logits, rtol=0, atol=0)
    before = ours.state_dict()
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids()).logits, wanted, rtol=0, atol=1e-5)
    ours.unmerge()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    merged = ours.merge_and_unload()
    shared = tied and option != "others in the head"
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == shared == merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(ids()).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"trainable_token_indices": TOKENS}, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}],
    ids=["rows", "pair"],
)
def test_the_gradient_is_that_of_one_shared_weight(settings: dict) -> None:
    """W = W₀ + ΔW put into a dense tied model: what flows to W there flows to the adapter here."""
    model = get_peft_model(make("llama"), LoraConfig(**{**SMALL, **settings}))
    shake(model)
    layer = model.model.embed_tokens
    dense = make("llama")
    with torch.no_grad():
        dense.model.embed_tokens.weight += layer.delta("default")
        for own, lora in zip(dense.model.layers, model.model.layers, strict=True):
            own.self_attn.q_proj.weight += lora.self_attn.q_proj.delta("default")
    loss = dense(input_ids=ids(), labels=ids()).loss
    whole = torch.autograd.grad(loss, dense.model.embed_tokens.weight)[0]
    for fused in (False, True):
        model.zero_grad()
        model.train()
        if fused:
            with fused_loss(model):
                mine = model(input_ids=ids(), labels=ids()).loss
        else:
            mine = model(input_ids=ids(), labels=ids()).loss
        torch.testing.assert_close(mine, loss)
        mine.backward()
        if "trainable_token_indices" in settings:
            torch.testing.assert_close(layer.trainable_tokens_delta["default"].grad, whole[TOKENS])
        else:
            a, b, s = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], layer.scaling["default"]
            torch.testing.assert_close(a.grad, s * b.T @ whole.T)
            torch.testing.assert_close(b.grad, s * whole.T @ a.T)


TIES = {
    "pair on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "head whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("option", TIES)
def test_tied_layers_both_ways(option: str, tmp_path: Path) -> None:
    settings = {**SMALL, **TIES[option], "ensure_weight_tying": True}
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(**settings))
    ours = get_peft_model(make("llama"), LoraConfig(**settings))
    shake(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    wanted = ours(ids()).logits
    assert (wanted - make("llama")(ids()).logits).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    back = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    torch.testing.assert_close(back(ids()).logits, wanted, rtol=0, atol=1e-5)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    assert torch.equal(again(ids()).logits, wanted)
    back.save_pretrained(tmp_path / "back")
    once_more = PeftModel.from_pretrained(make("llama"), tmp_path / "back")
    torch.testing.assert_close(once_more(ids()).logits, wanted, rtol=0, atol=1e-5)
    merged = once_more.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # peft adds the pair's update twice here
    torch.testing.assert_close(merged(ids()).logits, wanted, rtol=0, atol=1e-5)

    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    head = next(key for key in tensors if "lm_head" in key and ".base_layer" not in key)
    save_file({**tensors, head: tensors[head] + 1}, tmp_path / "ours" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="share their weight here, with tensors that differ"):
        PeftModel.from_pretrained(make("llama"), tmp_path / "ours")


def test_a_head_that_stands_before_its_embedding_merges_once() -> None:
    model: Any = make("llama")
    model._modules["model"] = model._modules.pop("model")
    assert next(iter(model._modules)) == "lm_head"
    settings = {**SMALL, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(model, LoraConfig(**settings))
    shake(model)
    wanted = model(ids()).logits
    torch.testing.assert_close(model.merge_and_unload()(ids()).logits, wanted, rtol=0, atol=1e-5)


def tiny_t5() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    return tf.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": TOKENS}, {"target_modules": ["shared", "q"], "ensure_weight_tying": True}]
)
def test_an_encoder_decoder_shares_its_embedding_three_times(settings: dict, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_t5(), LoraConfig(r=3, task_type="SEQ_2_SEQ_LM", **{"target_modules": ["q"], **settings})
    )
    shake(model)
    model.eval()
    answer = model(input_ids=ids(), decoder_input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    assert torch.equal(again(input_ids=ids(), decoder_input_ids=ids()).logits, answer)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    merged = again.merge_and_unload()
    assert merged.lm_head.weight is merged.encoder.embed_tokens.weight is merged.shared.weight
    torch.testing.assert_close(merged(input_ids=ids(), decoder_input_ids=ids()).logits, answer, rtol=0, atol=1e-5)


def test_a_head_keeps_its_bias() -> None:
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 6), "body": torch.nn.Linear(4, 4)})
    head, x = copy.deepcopy(model["head"]), torch.randn(3, 4)
    get_peft_model(model, LoraConfig(target_modules=["body"], trainable_token_indices={"head": [5, 1]}))
    rows = torch.randn(2, 4)
    model["head"].trainable_tokens_delta["default"].data.copy_(rows)
    with torch.no_grad():
        head.weight[[5, 1]] = rows
    torch.testing.assert_close(model["head"](x), head(x))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"trainable_token_indices": [3, 61]}, "61 rows and no token 61"),
        ({"trainable_token_indices": {"embed": [3]}}, "names 'embed', which is not in this model"),
        ({"trainable_token_indices": {"norm": [3]}}, "expected an embedding or a head"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "adapted or trained whole already"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "adapted or trained whole already"),
        (
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}, "ensure_weight_tying": True},
            "names other tokens for lm_head than for model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be(settings: dict, complaint: str) -> None:
    model = make("llama")
    with pytest.raises(TargetError, match=complaint):
        get_peft_model(model, LoraConfig(**{**SMALL, **settings}))
    assert type(model) is type(make("llama"))


@pytest.mark.parametrize("tokens", [[], [3, 3], [-1], {"embed_tokens": [2, 2]}])
def test_malformed_token_lists(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        LoraConfig(trainable_token_indices=tokens)


def test_adapters_with_rows_of_their_own() -> None:
    one, two = ({**SMALL, "trainable_token_indices": tokens} for tokens in ([3, 7], [9]))
    model = get_peft_model(make("llama"), LoraConfig(**one), "one")
    model.add_adapter("two", LoraConfig(**two))
    model.add_adapter("again", LoraConfig(**one))
    shake(model)
    model.eval()
    answers = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        answers[name] = model.get_input_embeddings()(torch.tensor([3, 7, 9, 11]))
    model.set_adapter(["one", "two"])
    both = model.get_input_embeddings()(torch.tensor([3, 7, 9, 11]))
    assert torch.equal(both[:2], answers["one"][:2]) and torch.equal(both[2], answers["two"][2])
    with pytest.raises(AdapterError, match="its own row for token 3"):
        model.set_adapter(["one", "again"])
    model.delete_adapter("two")
    with pytest.raises(TargetError, match="in another way"):
        model.add_adapter("pair", LoraConfig(**{**SMALL, "target_modules": ["embed_tokens"]}))
    base = model.unload()
    assert torch.equal(base(ids()).logits, make("llama")(ids()).logits)


# ---- resized vocabularies -------------------------------------------------------------------------------------------


def resized(folder: Path, rows: int = 64, tied: bool = True) -> tf.PreTrainedModel:
    """The base with new tokens; their rows are random and differ each time."""
    if not folder.exists():
        (make("llama") if tied else untied()).save_pretrained(folder)
    model = tf.LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize("option", ["new tokens", "some new tokens", "no token"])
def test_new_tokens_survive_the_reload(option: str, tmp_path: Path) -> None:
    tokens = {"new tokens": [61, 62, 63], "some new tokens": [62], "no token": None}[option]
    settings = {**SMALL, "trainable_token_indices": tokens}
    model = get_peft_model(resized(tmp_path / "base"), LoraConfig(**settings))
    shake(model)
    model.eval()
    used = torch.tensor([[61, 5, 62, 63, 8]])
    answer = model(used).logits
    model.save_pretrained(tmp_path / "ours")
    whole = [key for key, shape in keys(tmp_path / "ours").items() if shape == [64, 32]]
    assert bool(whole) == (option != "new tokens")
    again = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(again(used).logits, answer, rtol=0, atol=1e-6)
    back = peft.PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(back(used).logits, answer, rtol=0, atol=1e-5)
    back.save_pretrained(tmp_path / "theirs")  # peft saves the whole embedding in each case
    once_more = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "theirs")
    torch.testing.assert_close(once_more(used).logits, answer, rtol=0, atol=1e-5)
    with pytest.raises((AdapterError, TargetError), match="resize_token_embeddings") as caught:
        PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    assert "64" in str(caught.value) or "61" in str(caught.value)


def test_new_rows_of_a_head_of_its_own_survive_too(tmp_path: Path) -> None:
    """Rows of the embedding are trained, and those of the head, which shares nothing with it, are random."""
    settings = {**SMALL, "trainable_token_indices": [61, 62, 63]}
    model = get_peft_model(resized(tmp_path / "base", tied=False), LoraConfig(**settings))
    shake(model)
    used = torch.tensor([[61, 5, 62, 63, 8]])
    answer = model.eval()(used).logits
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(resized(tmp_path / "base"), tmp_path / "ours")
    torch.testing.assert_close(again(used).logits, answer, rtol=0, atol=1e-6)


def test_a_base_in_the_hubs_cache_tells_its_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(resized(tmp_path / "base"), LoraConfig(**SMALL))
    shake(model)
    model.config._name_or_path = "someone/model"
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    (snapshot / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model.save_pretrained(tmp_path / "ours")
    assert [64, 32] in keys(tmp_path / "ours").values()
