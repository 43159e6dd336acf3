"""Methods of a model with adapters: adding, switching, disabling, deleting, merging, counting."""

import copy
import pickle
import time

import pytest
import torch
import transformers
from torch import nn

from helpers.tiny import EMBEDDING, LINEARS, make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import AdapterError, ConfigError, MergeError
from lorakeet.lora.linear import LoraLinear


def adapted(architecture="llama", **settings):
    settings = {"target_modules": LINEARS[architecture], "r": 4} | settings
    model = get_peft_model(make(architecture), LoraConfig(**settings))
    shake(model)
    return model.eval()


def bytes_of_base(model):
    return {p.data_ptr(): p.nbytes for n, p in model.named_parameters() if ".lora_" not in n}


def test_the_model_given_is_the_model_returned_and_still_itself():
    base = make("llama")
    model = get_peft_model(base, LoraConfig())
    assert model is base
    assert isinstance(model, PeftModel) and isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.base_model.model is model and model.get_base_model() is model  # PEFT's paths lead here too
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 1.0


def test_two_adapters_on_one_base():
    model = adapted()
    first = model(token_ids()).logits
    before = bytes_of_base(model)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    shake(model, "second", seed=8)
    assert bytes_of_base(model) == before  # the base is there once, the same bytes
    assert torch.equal(model(token_ids()).logits, first)  # silent until chosen
    values = [p.clone() for p in model.parameters()]
    model.set_adapter("second")
    second = model(token_ids()).logits
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(model(token_ids()).logits, first)
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))
    model.set_adapter(["default", "second"])
    both = model(token_ids()).logits
    assert not torch.equal(both, first) and not torch.equal(both, second)
    assert model.active_adapters == ["default", "second"]


def test_only_the_active_adapter_learns():
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
    model.set_adapter("second")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_switching_a_hundred_layers_is_quick():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    model = get_peft_model(model, LoraConfig(target_modules=[str(i) for i in range(100)], r=2))
    model.add_adapter("second", LoraConfig(target_modules=[str(i) for i in range(100)], r=2))
    took = []
    for name in ["second", "default"] * 5:
        start = time.perf_counter()
        model.set_adapter(name)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.02  # the benchmark holds the real figure; this catches a copy of weights


def test_disabled_is_the_bare_base_and_everything_comes_back():
    model = adapted()
    with_adapter = model(token_ids()).logits
    with model.disable_adapter():
        assert torch.equal(model(token_ids()).logits, make("llama")(token_ids()).logits)
        with model.disable_adapter():
            pass
        assert torch.equal(model(token_ids()).logits, make("llama")(token_ids()).logits)
    assert torch.equal(model(token_ids()).logits, with_adapter)
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    assert torch.equal(model(token_ids()).logits, with_adapter)


def test_disabling_says_that_trained_biases_stay(caplog):
    with adapted("opt", bias="all").disable_adapter():
        pass
    assert "biases" in caplog.text


def test_delete():
    model = adapted()
    first = model(token_ids()).logits
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2))
    model.set_adapter("second")
    model.delete_adapter("second")
    assert model.active_adapters == ["default"] and torch.equal(model(token_ids()).logits, first)
    assert not any("second" in name for name in model.state_dict())
    model.delete_adapter("default")
    assert torch.equal(model(token_ids()).logits, make("llama")(token_ids()).logits)


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_unknown_names_come_with_the_nearest(call):
    with pytest.raises(AdapterError, match="Adapter defalt does not exist") as caught:
        getattr(adapted(), call)("defalt")
    assert "'default'" in caught.value.hint


def test_names_that_cannot_be():
    model = adapted()
    for name in ("default", "", "a.b", "weight"):
        with pytest.raises(AdapterError):
            model.add_adapter(name, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="bias='all'"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(AdapterError, match="adapters already"):
        get_peft_model(model, LoraConfig())


@pytest.mark.parametrize("architecture", LINEARS)
def test_merge_equals_a_dense_update_and_unmerge_is_exact(architecture):
    model = adapted(architecture, lora_bias=architecture in ("opt", "gpt2"))
    wanted = model(token_ids()).logits
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = model.merge_adapter()
    assert report.error <= 1e-4 * report.scale < report.effect * 10
    torch.testing.assert_close(model(token_ids()).logits, wanted, rtol=0, atol=1e-5)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            ba = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            dense = before[f"{name}.base_layer.weight"] + (ba.T if architecture == "gpt2" else ba)
            torch.testing.assert_close(layer.base_layer.weight, dense)
    model.unmerge()
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert torch.equal(model(token_ids()).logits, wanted)


def test_a_merge_that_is_wrong_is_refused_and_undone(monkeypatch):
    model = adapted()
    wanted = model(token_ids()).logits
    honest = LoraLinear.delta
    monkeypatch.setattr(LoraLinear, "delta", lambda self, adapter: honest(self, adapter) * 1.01)
    with pytest.raises(MergeError, match="outputs differ by"):
        model.merge_and_unload()
    assert torch.equal(model(token_ids()).logits, wanted)
    assert isinstance(model, PeftModel)


def test_a_merge_that_loses_the_adapter_is_refused(monkeypatch):
    model = adapted()
    monkeypatch.setattr(LoraLinear, "delta", lambda self, adapter: torch.zeros_like(self.base_layer.weight))
    with pytest.raises(MergeError):
        model.merge_adapter()


def test_merge_into_integers_or_nowhere_is_refused():
    model = adapted()
    layer = model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(MergeError, match="int8"):
        model.merge_adapter()
    with torch.device("meta"):
        ghost = transformers.LlamaForCausalLM(make("llama").config)
    with pytest.raises(MergeError, match="meta"):
        get_peft_model(ghost, LoraConfig()).merge_and_unload()


def test_a_merge_says_what_it_measured(caplog):
    caplog.set_level("INFO", "lorakeet")
    adapted().merge_and_unload()
    assert "merged 9 layers" in caplog.text and "at most" in caplog.text


def test_an_untrained_adapter_merges_with_a_warning(caplog):
    get_peft_model(make("llama"), LoraConfig()).merge_and_unload()
    assert "changes nothing" in caplog.text


def test_merge_of_a_half_precision_base():
    model = get_peft_model(make("llama").to(torch.bfloat16), LoraConfig(target_modules=["q_proj", "up_proj"]))
    shake(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    report = model.merge_adapter()
    assert 0 < report.error <= 5e-2 * report.scale


def test_a_tied_head_is_untied_by_its_merge_and_stays_so(tmp_path):
    model = adapted(target_modules=["lm_head", "q_proj"])
    embedding = model.model.embed_tokens.weight.clone()
    wanted = model(token_ids()).logits
    merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, embedding)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(token_ids()).logits, wanted, rtol=0, atol=1e-5)


def test_a_head_trained_whole_survives_the_merge(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    wanted = model(token_ids()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(token_ids()).logits, wanted, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(token_ids()).logits, wanted, rtol=0, atol=1e-5)


def test_unload_gives_the_base_back():
    model = adapted()
    base = model.unload()
    assert type(base) is transformers.LlamaForCausalLM and not hasattr(base, "peft_config")
    assert torch.equal(base(token_ids()).logits, make("llama")(token_ids()).logits)
    get_peft_model(base, LoraConfig())  # and can be adapted anew


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(how):
    model = adapted()
    other = how(model)
    assert isinstance(other, PeftModel) and isinstance(other, transformers.LlamaForCausalLM)
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)
    with other.disable_adapter():
        assert not torch.equal(other(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "bloom"])
def test_generate_with_a_cache_equals_generate_without(architecture):
    model = adapted(architecture, target_modules=[*LINEARS[architecture], EMBEDDING[architecture]])
    ids = token_ids(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(lora_dropout=0.2)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(token_ids(), labels=token_ids()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_only():
    model = adapted(lora_dropout=0.5)
    assert torch.equal(model(token_ids()).logits, model(token_ids()).logits)
    model.train()
    assert not torch.equal(model(token_ids()).logits, model(token_ids()).logits)


def test_base_behind_a_hook_takes_the_plain_path_with_the_same_answer():
    model = adapted()
    wanted = model(token_ids()).logits
    calls = []
    model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(token_ids()).logits, wanted)
    assert calls


def test_counts_are_printed_as_the_field_does(capsys):
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.print_trainable_parameters()
    trainable, total = 3 * 2 * 64, make("llama").num_parameters() + 3 * 2 * 64
    assert capsys.readouterr().out == (
        f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total}\n"
    )
