"""Parents that read the weights of their children themselves: refused, left out, made to call, or found when they run."""

import ast
import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from helpers.tiny import make, shake, token_ids
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import TargetError
from lorakeet.lora.checks.direct_reads import READS
from lorakeet.lora.layer import LoraLayer

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)


class Attending(nn.Module):
    """Two linear layers around an attention of torch."""

    def __init__(self):
        super().__init__()
        self.inner, self.attn, self.out = (
            nn.Linear(16, 16),
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        h = self.inner(x)
        return self.out(self.attn(h, h, h)[0])


def encoder(layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 20, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers).eval()


def adapted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_all_linear_leaves_out_what_is_never_called_with_a_warning(caplog):
    model = get_peft_model(Attending(), LoraConfig(r=2, target_modules="all-linear"))
    assert adapted_names(model) == ["inner", "out"]
    assert "all-linear leaves out attn.out_proj (belongs to MultiheadAttention" in caplog.text
    caplog.clear()
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules="all-linear"))
    assert adapted_names(model) == [f"layers.{n}.linear{k}" for n in (0, 1) for k in (1, 2)]


def test_what_it_left_out_is_left_out_when_it_is_loaded_again(tmp_path):
    model = get_peft_model(Attending(), LoraConfig(r=2, target_modules="all-linear"))
    shake(model)
    wanted = model.eval()(X)
    model.save_pretrained(tmp_path)
    again = Attending()
    again.load_state_dict(model.unload().state_dict())
    torch.testing.assert_close(PeftModel.from_pretrained(again, tmp_path)(X), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [["out_proj"], ["inner", "attn.out_proj"], r".*out_proj"])
def test_a_layer_that_is_named_is_refused_and_nothing_is_changed(targets):
    model = Attending()
    with pytest.raises(TargetError, match="'attn.out_proj' belongs to MultiheadAttention, which reads its weight"):
        get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert type(model) is Attending and not adapted_names(model)


def test_a_name_that_means_others_too_adapts_those(caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    model = get_peft_model(transformers.SiglipVisionModel(config), LoraConfig(r=2, target_modules=["out_proj"]))
    assert adapted_names(model) == ["encoder.layers.0.self_attn.out_proj"]
    assert "not adapted: head.attention.out_proj" in caplog.text


def mamba():
    sizes = {"vocab_size": 31, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


def test_a_state_space_model_is_adapted_where_it_calls_its_layers(caplog):
    model = get_peft_model(mamba(), LoraConfig(r=2, target_modules="all-linear"))
    assert adapted_names(model) == ["backbone.layers.0.mixer.in_proj"]
    assert "x_proj" in caplog.text and "MambaMixer" in caplog.text
    for name in ("out_proj", "x_proj", "dt_proj", "conv1d"):
        with pytest.raises(TargetError, match="MambaMixer"):
            get_peft_model(mamba(), LoraConfig(r=2, target_modules=[name]))


@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["linear1", "linear2"]},
        {"target_modules": ["layers.1.linear2"]},  # the first layer would still make nested tensors
        {"target_modules": ["linear1"], "modules_to_save": ["linear2"]},
        {"target_modules": [], "target_parameters": ["self_attn.in_proj_weight"]},
    ],
    ids=str,
)
def test_an_adapter_acts_in_evaluation_as_in_training(settings, padding):
    seen = slice(None) if padding is None else ~padding
    bare = encoder()(X, src_key_padding_mask=padding)[seen]
    model = get_peft_model(encoder(), LoraConfig(r=2, **settings))
    shake(model)
    training = model.train()(X, src_key_padding_mask=padding)[seen]
    with torch.no_grad():
        evaluation = model.eval()(X, src_key_padding_mask=padding)[seen]
    assert float((evaluation - bare).abs().max()) > 0.05
    torch.testing.assert_close(evaluation, training, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    assert merged.use_nested_tensor and not any(module._forward_pre_hooks for module in merged.modules())
    torch.testing.assert_close(merged(X, src_key_padding_mask=padding)[seen], training, rtol=0, atol=1e-5)


def test_copies_and_pickles_act_too():
    model = get_peft_model(encoder(), LoraConfig(r=2, target_modules=["linear1"]))
    shake(model)
    with torch.no_grad():
        wanted = model.eval()(X)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(X), wanted)


class Reading(nn.Module):
    """A module that reads the weight of one child in evaluation, and of another always."""

    def __init__(self):
        super().__init__()
        self.called, self.sometimes, self.never = (nn.Linear(16, 16) for _ in range(3))
        self.lists = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        h = self.called(x)
        h = self.sometimes(h) if self.training else F.linear(h, self.sometimes.weight)
        return F.linear(F.linear(h, self.never.weight), self.lists[0].weight)


def test_a_layer_that_its_parent_does_not_call_is_told_once_for_each_mode(caplog):
    model = get_peft_model(Reading(), LoraConfig(r=2, target_modules="all-linear"))
    model.train()(X)
    assert "2 adapted layers are not called in training" in caplog.text and "never, lists.0" in caplog.text
    caplog.clear()
    model.eval()(X)
    assert "3 adapted layers are not called in evaluation" in caplog.text and "sometimes" in caplog.text
    caplog.clear()
    model(X), model.train()(X)
    assert not caplog.text
    model.unload()(X)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_healthy_models_are_quiet(architecture, caplog):
    model = get_peft_model(
        make(architecture), LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    )
    model.train()(token_ids(), labels=token_ids()).loss.backward()
    model.eval()(token_ids())
    model.generate(token_ids()[:1], max_new_tokens=2, do_sample=False)
    assert "not called" not in caplog.text


def test_experts_without_tokens_are_no_finding(caplog):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x):
            return self.up(x)

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return self.experts[1](x)

    get_peft_model(Routed(), LoraConfig(r=2, target_modules=["up"]))(X)
    assert not caplog.text


#: Methods that only set weights up, attributes of a weight that reveal no values, and children that are no layers to adapt.
_SETUP = {"__init__", "_init_weights", "tie_weights", "extra_repr", "resize_position_embeddings", "initialize_weights"}
_FACTS = {"dtype", "device", "shape", "size", "requires_grad", "ndim"}
_TABLES = (
    "embed",
    "position",
    "token",
    "query",
    "queries",
    "codebook",
    "rel_",
    "norm",
    "patterns",
    "reference_points",
    "_bias",
)
_ELSEWHERE = {
    ("BloomAttention", "dense"),  # with slow_but_exact alone; watched_calls finds it
    ("BloomMLP", "dense_4h_to_h"),  # the same
    ("DisentangledSelfAttention", "in_proj"),  # for query_states, which no model gives it
    ("Gemma3nTextAltUp", "prediction_coefs"),  # clamps it, and calls it
    ("TransformerEncoderLayer", "linear1"),  # leave_fast_path
    ("TransformerEncoderLayer", "linear2"),
    ("TransformerEncoderLayer", "self_attn.out_proj"),  # found as MultiheadAttention's
    ("OneFormerTextMapper", "prompt_ctx"),  # an embedding
    ("VideomtForUniversalSegmentation", "query"),
}


def direct_reads(file):
    """Yield (class, child) for each ``self.child.weight`` that a method of a class in ``file`` computes with."""
    text = file.read_text()
    tree = ast.parse(text if re.search(r"self\.[\w.]+\.weight\b", text) else "")
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for method in (node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name not in _SETUP):
            around = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(method):
                read = ast.unparse(node) if isinstance(node, ast.Attribute) and node.attr == "weight" else ""
                outer = around.get(node)
                asked = isinstance(outer, ast.Attribute) and outer.attr in _FACTS
                asked |= isinstance(outer, ast.Call) and ast.unparse(outer.func) == "isinstance"
                if read.startswith("self.") and read.count(".") > 1 and not asked and "init_" not in method.name:
                    yield owner.name, read.removeprefix("self.").removesuffix(".weight")


@pytest.mark.slow
def test_every_direct_read_of_transformers_is_known():
    files = [
        *Path(transformers.__file__).parent.glob("models/*/modeling_*.py"),
        *Path(nn.__file__).parent.rglob("*.py"),
    ]
    found = {read for file in files for read in direct_reads(file)}
    assert len(found) > 100
    unknown = {
        (owner, child)
        for owner, child in found - _ELSEWHERE
        if child not in READS.get(owner, ()) and not any(word in child for word in _TABLES)
    }
    assert not unknown
