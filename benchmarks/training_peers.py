"""Training by PEFT with ``transformers.Trainer``, or by TRL's ``SFTTrainer``, as their users write it.

    python benchmarks/training_peers.py {peft,trl} RUN.yaml START OUT

RUN.yaml holds Lorakeet's settings of the same run; START is the adapter to begin with. OUT gets adapter/ and metrics.jsonl: a
line for each step with ``step``, ``loss``, ``tokens`` (real ones so far) and ``seconds`` (since the training began).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import yaml

from training_rows import encode

#: TRL packs a micro-batch end to end; position ids that restart separate the samples, and sdpa gets a mask.
#: TRL's own packing would change the samples of a step. Rows must be cut beforehand.
TRL = {"padding_free": True, "max_length": None}


def load_model(run: dict[str, Any], start: str) -> Any:
    """Load the base with the adapter that all start from."""
    base = run["base"]
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if base["dtype"] == "bf16" else torch.float32}
    if base["bits"] == 8:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base["model"], **settings)
    if base["bits"] == 8:
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=run["train"]["gradient_checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    return peft.PeftModel.from_pretrained(model, start, is_trainable=True)


def load_samples(run: dict[str, Any], tokenizer: Any) -> datasets.Dataset:
    rows = datasets.load_dataset("json", data_files=run["data"]["path"], split="train")

    def samples(batch: dict[str, list[str]]) -> dict[str, Any]:
        ids = encode(batch["text"], tokenizer, run["data"]["max_length"])
        return {"input_ids": ids, "labels": ids}

    return rows.map(samples, batched=True, remove_columns=rows.column_names)


def arguments(run: dict[str, Any]) -> dict[str, Any]:
    """Return the run's settings as arguments of ``transformers.TrainingArguments``."""
    train = run["train"]
    return {
        "max_steps": train["steps"],
        "per_device_train_batch_size": train["batch_size"],
        "gradient_accumulation_steps": train["grad_accum"],
        "learning_rate": train["lr"],
        "warmup_steps": train["warmup"],
        "lr_scheduler_type": train["schedule"],
        "weight_decay": train["weight_decay"],
        "max_grad_norm": train["max_grad_norm"],
        "seed": train["seed"],
        "data_seed": train["seed"],
        "bf16": run["base"]["dtype"] == "bf16",
        "gradient_checkpointing": train["gradient_checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


class Steps(transformers.TrainerCallback):
    """Recorder of the end of each step, in seconds and in real tokens so far."""

    def __init__(self) -> None:
        self.began = 0.0
        self.tokens = 0
        self.marks: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append({"tokens": self.tokens, "seconds": time.perf_counter() - self.began})

    def counting(self, trainer_class: Any) -> Any:
        """Return a subclass that counts real tokens: the trainer's own count misses end tokens if they also pad."""
        steps = self

        class Counting(trainer_class):
            def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
                mask = inputs.get("attention_mask")
                steps.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
                return super().training_step(model, inputs, *rest, **more)

        return Counting


def train(library: str, run: dict[str, Any], start: str, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(run["base"]["model"])
    samples, model, steps = load_samples(run, tokenizer), load_model(run, start), Steps()
    settings = {"model": model, "train_dataset": samples, "processing_class": tokenizer, "callbacks": [steps]}
    if library == "trl":
        import trl

        args = trl.SFTConfig(str(out), **arguments(run), **TRL)
        trainer = steps.counting(trl.SFTTrainer)(args=args, **settings)
    else:
        args = transformers.TrainingArguments(str(out), **arguments(run))
        collator = transformers.DataCollatorForSeq2Seq(tokenizer)  # the one for language models would mask end tokens
        trainer = steps.counting(transformers.Trainer)(args=args, data_collator=collator, **settings)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    model.save_pretrained(out / "adapter")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    lines = [
        json.dumps({"step": step, "loss": loss, **mark}) + "\n"
        for step, (loss, mark) in enumerate(zip(losses, steps.marks, strict=True), 1)
    ]
    (out / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    name, settings_file, adapter, folder = sys.argv[1:]
    train(name, yaml.safe_load(Path(settings_file).read_text(encoding="utf-8")), adapter, Path(folder))
