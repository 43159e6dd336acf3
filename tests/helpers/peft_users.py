"""Tools that people use with ``peft``'s models, each at work on one of Lorakeet's: a table of functions that assert.

The functions run with ``peft`` installed, and in a process of their own in which it cannot be found.
"""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from helpers.tiny import make, shake, token_ids
from helpers.tiny_training import tiny_data, tiny_llama, tiny_tokenizer
from lorakeet import LoraConfig, PeftModel, get_peft_model
from lorakeet.data.collate import PaddingCollator

User = Callable[[Path], None]
#: Name of the tool, as the documentation has it -> function.
USERS: dict[str, User] = {}
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def user(name: str) -> Callable[[User], User]:
    """Register a function under the tool's name."""

    def register(function: User) -> User:
        USERS[name] = function
        return function

    return register


def learned(seed: int = 3) -> PeftModel:
    """Build a tiny Llama with an adapter that changes its answers."""
    model = get_peft_model(make("llama"), LoraConfig(**SETTINGS))
    shake(model, seed=seed)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of a fixed batch, in evaluation mode."""
    return model.eval()(token_ids()).logits


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the adapters' tensors."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".lora_" in key}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same keys and values."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- trainers ---------------------------------------------------------------------------------------------------------


def arguments(folder: Path, make_args: type = tf.TrainingArguments, **changes: Any) -> Any:
    """Return the arguments of a short training with a checkpoint in its middle."""
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 10,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return make_args(**{**values, **changes})


def plain_trainer(model: nn.Module, folder: Path, **changes: Any) -> tf.Trainer:
    """Make a Trainer of transformers."""
    args = arguments(folder, **changes)
    data = {"train_dataset": tiny_data(16), "eval_dataset": tiny_data(4, 1), "data_collator": PaddingCollator(0)}
    return tf.Trainer(model, args, **data)


@user("transformers.Trainer")
def plain(folder: Path) -> None:
    def two() -> PeftModel:
        model = get_peft_model(tiny_llama(), LoraConfig(**SETTINGS), "mine")
        model.add_adapter("default", LoraConfig(**SETTINGS))
        shake(model, "default")
        return model

    whole, resumed = two(), two()
    plain_trainer(whole, folder).train()
    ends, middle = own_tensors(whole), folder / "checkpoint-2"
    trainer = plain_trainer(resumed, folder)
    trainer.train(resume_from_checkpoint=str(middle))
    assert equal(own_tensors(resumed), ends)
    trainer.state.best_model_checkpoint = str(middle)
    trainer._load_best_model()
    whole.restore_adapters(middle)
    assert equal(own_tensors(resumed), own_tensors(whole)) and not equal(own_tensors(whole), ends)


@user("model.add_adapter")
def add_adapter_of_transformers(folder: Path) -> None:
    model = make("llama")
    model.add_adapter(LoraConfig(**SETTINGS))
    assert isinstance(model, PeftModel)
    assert model.peft_config.keys() == {"default"}
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.add_adapter(LoraConfig(**SETTINGS), "second")
    assert model.active_adapter == "second" and model.trains("second")
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()


# -- torch ------------------------------------------------------------------------------------------------------------


@user("torch.save")
def saved_by_torch(folder: Path) -> None:
    model = learned()
    torch.save(model, folder / "whole.pt")
    again = torch.load(folder / "whole.pt", weights_only=False)
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))
    torch.save(model.state_dict(), folder / "state.pt")
    other = learned(seed=5)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert torch.equal(logits(other), logits(model))


@user("copy.deepcopy")
def copied(folder: Path) -> None:
    model = learned()
    before = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), before)
        shake(twin, seed=9)
        assert not torch.equal(logits(twin), before) and torch.equal(logits(model), before)
    assert copy.deepcopy(LoraConfig(**SETTINGS)) == pickle.loads(pickle.dumps(LoraConfig(**SETTINGS)))


@user("torch.compile")
def compiled(folder: Path) -> None:
    first = get_peft_model(torch.compile(make("llama"), backend="eager"), LoraConfig(**SETTINGS))
    part = make("llama")
    part.model.layers[0] = torch.compile(part.model.layers[0], backend="eager")
    inner = get_peft_model(part, LoraConfig(**{**SETTINGS, "target_modules": "all-linear"}))
    after = learned()
    after.model.layers[0] = torch.compile(after.model.layers[0], backend="eager")
    for number, model in enumerate((first, inner, after)):
        shake(model)
        model.save_pretrained(folder / str(number), state_dict=torch.compile(model, backend="eager").state_dict())
        texts = [path.read_bytes() for path in (folder / str(number)).iterdir()]
        assert not any(b"_orig_mod" in text for text in texts)
        again = PeftModel.from_pretrained(torch.compile(make("llama"), backend="eager"), folder / str(number))
        assert [*own_tensors(again).values()] and all(
            map(torch.equal, own_tensors(again).values(), own_tensors(model).values())
        )
    plain = copy.deepcopy(first)  # what is compiled is neither copied nor pickled
    assert torch.allclose(logits(first), logits(plain), atol=1e-5)


@user("torch.ao.quantization")
def quantized_by_torch(folder: Path) -> None:
    model = learned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another package
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    error, effect = (logits(small) - logits(model)).norm(), (logits(make("llama")) - logits(model)).norm()
    assert 0 < error < 0.3 * effect


# -- pipelines and accelerate -----------------------------------------------------------------------------------------


@user("transformers.pipeline")
def pipelines(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, **small)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    tf.utils.logging.get_logger("transformers").addHandler(handler)
    for task, kind in {
        "text-generation": tf.LlamaForCausalLM,
        "text-classification": tf.LlamaForSequenceClassification,
        "token-classification": tf.LlamaForTokenClassification,
        "feature-extraction": tf.LlamaModel,
    }.items():
        model = get_peft_model(kind(config), LoraConfig(r=2, target_modules=["q_proj"]))
        assert tf.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")("the bird sings")
    tf.utils.logging.get_logger("transformers").removeHandler(handler)
    assert not [line for line in said if "not supported" in line]


@user("accelerate")
def accelerated(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), learned()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    tokens = token_ids()
    accelerator.backward(prepared(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    accelerator.save_state(str(folder / "state"))
    kept = own_tensors(model)
    optimizer.step()
    accelerator.load_state(str(folder / "state"))
    assert equal(own_tensors(model), kept)
    assert accelerator.unwrap_model(prepared) is model
    model.save_pretrained(folder / "adapter", state_dict=accelerator.get_state_dict(prepared))
    assert torch.equal(logits(PeftModel.from_pretrained(make("llama"), folder / "adapter")), logits(model))
