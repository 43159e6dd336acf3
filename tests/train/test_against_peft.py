"""Loss curve compared with ``peft`` and ``transformers.Trainer``, from the same initial adapter on the same batches."""

from __future__ import annotations

import peft
import transformers

from helpers.random_rows import collate, rows
from helpers.tiny import make
from lorakeet import LoraConfig, PeftModel, Trainer, get_peft_model

STEPS = 20


def curve(trainer_class, model, data, folder) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        warmup_steps=5,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=11,
        use_cpu=True,
    )
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(base, data, tmp_path):
    settings = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(base(), LoraConfig(**settings)).save_pretrained(tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "start", is_trainable=True)
    wanted = curve(transformers.Trainer, theirs, data, tmp_path / "theirs")
    del theirs
    assert len(wanted) == STEPS and wanted[-1] != wanted[0]
    for trainer in (Trainer, transformers.Trainer):  # ours, and ours inside the plain one
        ours = PeftModel.from_pretrained(base(), tmp_path / "start", is_trainable=True)
        got = curve(trainer, ours, data, tmp_path / trainer.__module__)
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 1e-4, (trainer, got, wanted)


def test_same_curve_on_a_tiny_model(tmp_path):
    compare(lambda: make("llama").train(), rows(61), tmp_path)
