"""Trainers of TRL, each with a ready model and with a configuration: train, save, resume, load the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as tf

from helpers.peft_users import SETTINGS, arguments, equal, own_tensors
from helpers.tiny_training import tiny_llama, tiny_tokenizer
from lorakeet import LoraConfig, PeftModel, get_peft_model

TRAINERS = ("SFTTrainer", "DPOTrainer", "RewardTrainer", "GRPOTrainer")
_ROWS: dict[str, dict[str, Any]] = {
    "SFTTrainer": {"text": ["the bird sings", "a green parrot learns one song", "rain falls on its branch"] * 3},
    "DPOTrainer": {"prompt": ["the bird"] * 8, "chosen": [" sings one song"] * 8, "rejected": [" sleeps"] * 8},
    "RewardTrainer": {"chosen": ["the bird sings"] * 8, "rejected": ["the bird sleeps"] * 8},
    "GRPOTrainer": {"prompt": ["the bird", "a parrot"] * 4},
}


def trained(name: str, folder: Path, *, ready: bool, resume: bool = False, adapter: str = "default") -> Any:
    """Run one of TRL's trainers for four steps, or for the last two.

    Args:
        name: The trainer's class.
        folder: Of its checkpoints.
        ready: Whether to hand over a model with an adapter, or a bare one and the configuration.
        resume: Whether to resume from the checkpoint of the second step, and to load the best at the end.
        adapter: Name of the adapter of a ready model.
    """
    import trl

    is_reward, generates = name == "RewardTrainer", name == "GRPOTrainer"
    settings = LoraConfig(**{**SETTINGS, "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM"})
    model: Any = tiny_llama()
    if is_reward:
        model.config.num_labels = 1
        torch.manual_seed(0)
        model = tf.LlamaForSequenceClassification(model.config)
    more: dict[str, Any] = {"peft_config": settings}
    if not tf.utils.is_peft_available():  # TRL loads the reference from where the base came from
        model.save_pretrained(folder.parent / "base")
        model.config._name_or_path = str(folder.parent / "base")
    if ready:
        model, more = get_peft_model(model, settings, adapter), {}
    data = datasets.Dataset.from_dict(_ROWS[name])
    changes: dict[str, Any] = {"gradient_checkpointing": False}
    changes |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1} if generates else {"max_length": 16}
    if generates:
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    elif resume:
        changes |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        more["eval_dataset"] = data
    args = arguments(folder, getattr(trl, name.replace("Trainer", "Config")), **changes)
    trainer = getattr(trl, name)(model, args=args, train_dataset=data, processing_class=tiny_tokenizer(), **more)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def check_trainer(name: str, folder: Path, *, ready: bool, own: bool = True) -> None:
    """Check that a resumed run ends like the whole one, and that no second model is the reference.

    Args:
        name: The trainer's class.
        folder: Of its checkpoints.
        ready: As in :func:`trained`.
        own: Whether the reference must be the model itself, with its adapter switched off or a frozen copy of it.
    """
    whole = trained(name, folder, ready=ready)
    assert isinstance(whole.model, PeftModel)
    assert (getattr(whole, "ref_model", None) is None) == own or name not in ("DPOTrainer", "GRPOTrainer")
    ends = own_tensors(whole.model)
    resumed = trained(name, folder, ready=ready, resume=True)
    assert resumed.state.global_step == 4
    best = resumed.state.best_global_step or 4
    if best != 4:
        whole.model.restore_adapters(folder / f"checkpoint-{best}")
        ends = own_tensors(whole.model)
    assert equal(own_tensors(resumed.model), ends)
