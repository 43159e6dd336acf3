"""Default layers and fresh heads of each architecture and task: trained for a step, saved and loaded again."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from safetensors import safe_open
from torch import nn

from helpers.tiny import token_ids
from helpers.tiny_architectures import SIZES, build, tiny_config
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.errors import TargetError
from lorakeet.lora.default_targets import TASK_HEADS, default_targets, task_heads
from lorakeet.lora.inject import plan_injection

pytestmark = pytest.mark.filterwarnings("ignore")

AUTO = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
}
ENCODERS = ["bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "albert", "deberta", "deberta-v2", "modernbert"]
SEQ2SEQ = ["t5", "mt5", "bart", "mbart", "marian", "pegasus"]
#: architecture -> names of its query and value projections
TARGETS = {
    **dict.fromkeys(SIZES, ["q_proj", "v_proj"]),
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    **dict.fromkeys(["bloom", "gpt_neox", "falcon"], ["query_key_value"]),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "albert"], ["query", "value"]),
    "distilbert": ["q_lin", "v_lin"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "modernbert": ["Wqkv"],
    **dict.fromkeys(["t5", "mt5", "mpnet"], ["q", "v"]),
}
#: heads of other names than classifier, score and qa_outputs
HEADS = {
    ("distilbert", "SEQ_CLS"): {"pre_classifier", "classifier"},
    **{(kind, "SEQ_CLS"): {"classification_head"} for kind in ("t5", "mt5", "bart", "mbart")},
    **{(kind, "SEQ_CLS"): {"pooler", "classifier"} for kind in ("deberta", "deberta-v2")},
    **{("modernbert", task): {"head", "classifier"} for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")},
}
IDS = token_ids(3, 7)


def main_task(kind: str) -> str:
    return "SEQ_2_SEQ_LM" if kind in SEQ2SEQ else "TOKEN_CLS" if kind in ENCODERS else "CAUSAL_LM"


def rows() -> list[tuple[str, str]]:
    found = []
    for kind in SIZES:
        tasks = {main_task(kind), "SEQ_CLS"} | ({"QUESTION_ANS"} if kind in ("modernbert", "t5", "gpt2") else set())
        tasks |= {"TOKEN_CLS"} if kind in ("t5", "gpt2", "qwen3") else set()
        found += [(kind, task) for task in sorted(tasks) if type(tiny_config(kind)) in AUTO[task]._model_mapping]
    return found


def sample(task: str) -> dict[str, torch.Tensor]:
    labels = {"SEQ_CLS": torch.tensor([0, 2, 1]), "TOKEN_CLS": IDS % 3}.get(task, IDS)
    if task == "QUESTION_ANS":
        return {"input_ids": IDS, "start_positions": IDS[:, 0] % 7, "end_positions": IDS[:, 1] % 7}
    ids = torch.cat(
        [IDS[:, :-1], torch.ones_like(IDS[:, :1])], 1
    )  # ends with the end token, as BART's classifier wants
    return {"input_ids": ids, "labels": labels}


def answer(model: nn.Module, task: str) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(**sample(task))
    return out.start_logits + out.end_logits if task == "QUESTION_ANS" else out.logits


def make(kind: str, task: str) -> tf.PreTrainedModel:
    return build(AUTO[task], kind, num_labels=2 if task == "QUESTION_ANS" else 3)


def fresh(kind: str, task: str) -> nn.Module:
    """Build the base as it is loaded again: the same backbone, another random head."""
    model = make(kind, task)
    torch.manual_seed(99)
    for name in task_heads(model, task):
        for parameter in getattr(model, name, nn.Module()).parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("kind", "task"), rows())
def test_default_layers_learn_and_come_back(kind, task, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make(kind, task), LoraConfig(task_type=task, r=2, init_lora_weights=False))
    config = model.peft_config["default"]
    assert config.target_modules == TARGETS[kind]
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert {name.rpartition(".")[2] for name in adapted} == set(TARGETS[kind]) and len(adapted) >= len(TARGETS[kind])
    heads = {name.partition(".modules_to_save")[0] for name, _ in model.named_parameters() if "modules_to_save" in name}
    usual = {head for head in TASK_HEADS.get(task, []) if hasattr(model, head)}
    assert heads == HEADS.get((kind, task), usual) and (heads or task not in TASK_HEADS)

    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(**sample(task)).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, grad in learning.items() if grad is None or not (grad.any() or name.endswith("bias"))] == []
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= {name for name, grad in learning.items() if grad.any()}
    # A gradient that is rounding noise may move a parameter by less than its last bit.
    last_bit = {name: torch.finfo(p.dtype).eps * p.abs() for name, p in before.items()}
    assert moved >= {name for name, grad in learning.items() if (0.1 * grad.abs() > last_bit[name]).any()}

    wanted = answer(model, task)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(fresh(kind, task), tmp_path), task), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged, task), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(SIZES) & set(PEFT_DEFAULTS)))
def test_defaults_are_those_of_peft(kind):
    assert default_targets(make(kind, main_task(kind))) == PEFT_DEFAULTS[kind] == TARGETS[kind]


@pytest.mark.parametrize(("kind", "task"), [("bart", "SEQ_CLS"), ("distilbert", "SEQ_CLS"), ("deberta-v2", "SEQ_CLS")])
def test_peft_reads_the_head_that_it_would_not_have_trained(kind, task, tmp_path):
    model = get_peft_model(make(kind, task), LoraConfig(task_type=task, r=2, init_lora_weights=False))
    model(**sample(task)).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(kind, task), tmp_path)
    torch.testing.assert_close(answer(theirs, task), answer(model, task), rtol=0, atol=1e-5)


def test_distilberts_head_has_pefts_keys(tmp_path):
    keys = []
    for library, config in ((peft.get_peft_model, peft.LoraConfig), (get_peft_model, LoraConfig)):
        model = library(
            build(AUTO["SEQ_CLS"], "distilbert"), config(task_type="SEQ_CLS", r=2, target_modules=["q_lin"])
        )
        model.save_pretrained(tmp_path / library.__module__)
        with safe_open(tmp_path / library.__module__ / "adapter_model.safetensors", "pt") as file:
            keys.append(set(file.keys()))
    assert keys[0] == keys[1] and any("pre_classifier" in key for key in keys[0])


def test_all_linear_leaves_a_head_of_any_name():
    for kind, head in (("bart", "classification_head"), ("distilbert", "pre_classifier"), ("deberta", "pooler")):
        config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
        names = [target.name for target in plan_injection(build(AUTO["SEQ_CLS"], kind), config).targets]
        assert names and not any(name.startswith((head, "classifier")) for name in names)
        assert any("fc" in name or "dense" in name or "lin" in name for name in names)


def test_a_model_that_sees_and_reads_is_adapted_where_it_reads():
    small = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 61, "num_key_value_heads": 1, "head_dim": 8}
    config = tf.Gemma3Config(text_config=text, vision_config=small | {"image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = tf.Gemma3ForConditionalGeneration(config)
    names = [target.name for target in plan_injection(model, LoraConfig()).targets]
    assert len(names) == 4 and all("language_model" in name for name in names)
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())


def test_the_layers_of_a_default_regular_expression_can_be_chosen(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 61, "num_key_value_heads": 1, "head_dim": 8}
    config = tf.Gemma3Config(text_config=text, vision_config=small | {"image_size": 28, "patch_size": 14})

    def adapted(adapter: LoraConfig) -> list[str]:
        with torch.device("meta"):
            model = tf.Gemma3ForConditionalGeneration(config)
        get_peft_model(model, adapter).peft_config["default"].save_pretrained(tmp_path)
        return sorted({name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name})

    names = adapted(LoraConfig(layers_to_transform=[1]))
    assert len(names) == 2 and all("language_model.layers.1." in name for name in names)
    assert adapted(LoraConfig.from_pretrained(tmp_path)) == names  # the saved settings mean the same layers


def test_all_linear_says_once_that_it_leaves_out_the_experts(caplog):
    caplog.set_level("WARNING", "lorakeet")
    get_peft_model(build(tf.AutoModelForCausalLM, "mixtral"), LoraConfig(target_modules="all-linear", r=2))
    assert [record.message for record in caplog.records if "experts" in record.message] == [
        "the weights of the experts (down_proj, gate_up_proj) are not linear layers, so all-linear does not adapt them; "
        "target_parameters=['down_proj', 'gate_up_proj'] does"
    ]


@pytest.mark.parametrize("pattern", [None, "layers", ["layers", "h"], "(layers|h)"])
def test_layers_are_numbered_at_the_root_and_by_patterns_with_groups(pattern):
    for model in (build(tf.AutoModelForCausalLM, "llama"), build(tf.AutoModelForCausalLM, "llama").model):
        config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=pattern)
        names = [target.name for target in plan_injection(model, config).targets]
        assert len(names) == 1 and "layers.1." in names[0]


def test_a_list_of_layers_that_is_not_there_is_named():
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h")
    with pytest.raises(TargetError, match="no numbered layers in a list named 'h'"):
        plan_injection(build(tf.AutoModelForCausalLM, "llama"), config)


def test_speech_with_convolutions_as_targets(tmp_path):
    def whisper() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
        tokens = {
            "vocab_size": 61,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
        config = tf.WhisperConfig(**sizes, **heads, **tokens, max_source_positions=10, max_target_positions=20)
        return tf.WhisperForConditionalGeneration(config).eval()

    sound = {"input_features": torch.randn(2, 8, 20), "labels": IDS[:2]}
    assert default_targets(whisper()) == ["q_proj", "v_proj"]
    config = LoraConfig(target_modules=["conv1", "conv2", "q_proj"], init_lora_weights=False)
    model = get_peft_model(whisper(), config)
    out = model(**sound)
    out.loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert (out.logits - whisper()(**sound).logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(whisper(), tmp_path)(**sound).logits, out.logits)
    torch.testing.assert_close(model.merge_and_unload()(**sound).logits, out.logits, atol=1e-5, rtol=0)
