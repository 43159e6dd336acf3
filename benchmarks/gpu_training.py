"""Training on a GPU beside PEFT and TRL: ``python benchmarks/gpu.py --parts training``.

The bases have the shapes of public models and random weights, created on the device. There are two jobs: full rows, and
samples as long as quotations. Equal for all: initial weights, samples of every optimizer step, r=16 on q_proj and v_proj
without dropout, AdamW. The adapter is in fp32 under autocast to bf16. Gradient checkpointing is off unless requested.

Contenders alternate, each in its own process; figures are medians over the rounds. TRL computes no padding where its
collator allows it (Llama; with flash-attn if installed), and uses its own fused loss. "tokens/s" counts real tokens after
``--warm`` steps. "peak" is torch's peak memory in training, with the base (on a CPU: of the process).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = {
    "lorakeet-bf16": "lorakeet",
    "lorakeet-int8": "lorakeet",
    "peft-bf16": "peft",
    "trl-bf16": "trl",
    "unsloth-bf16": "unsloth",
}
LLAMA = {
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
SHAPES: dict[str, dict[str, Any] | None] = {
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True, **LLAMA,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, **LLAMA,
    },
    "opt-6.7b": None,  # its configuration comes with Lorakeet
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip
JOBS = {"full": 1, "short": 4}  # rows of a micro-batch
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def add_options(parser: Any) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="full rows, short samples")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--row", type=int, default=4096, help="tokens of a full row; no more than the shape allows")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of an optimizer step")
    parser.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all of them")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="of the training; cpu to try the script"
    )
    parser.add_argument("--tiny", action="store_true", help="two layers of 64 channels and rows of 64 tokens")
    parser.add_argument("--one", nargs=3, metavar=("SHAPE", "JOB", "CONTENDER"), help=argparse.SUPPRESS)


# ---- what all are given ------------------------------------------------------------------------------------------


def make_config(shape: str, tiny: bool) -> Any:
    from transformers import LlamaConfig

    from lorakeet.base.meta_device import read_config

    values = SHAPES[shape]
    config = read_config("facebook/opt-6.7b") if values is None else LlamaConfig(**values)
    config.update({name: 0.0 for name in ("dropout", "attention_dropout") if hasattr(config, name)})
    if tiny:
        config.update({name: value for name, value in TINY.items() if hasattr(config, name)})
    return config


def make_base(config: Any, options: argparse.Namespace, attention: str = "sdpa") -> Any:
    """Create a frozen model in bf16 with random weights on the training device."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.requires_grad_(False).train()


def in_8_bits(model: Any) -> Any:
    """Quantize the layers of ``model`` that a base in 8 bits quantizes, in place."""
    from lorakeet.quant.quantize import quantize_

    quantize_(model)
    return model


def make_rows(job: str, config: Any, options: argparse.Namespace) -> list[list[int]]:
    """Draw the samples of all steps, in the order of the training."""
    import torch

    draw = torch.Generator().manual_seed(0)
    count = (options.warm + options.steps) * options.accumulate * JOBS[job]
    longest = min(64 if options.tiny else options.row, config.max_position_embeddings)
    lengths = [longest] * count
    if job == "short":  # median 30 tokens, mean 41
        lengths = torch.randn(count, generator=draw).mul(0.8).add(3.4).exp().int().clamp(8, min(512, longest)).tolist()
    return [torch.randint(4, config.vocab_size, (n,), generator=draw).tolist() for n in lengths]


def training_arguments(job: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": options.warm + options.steps,
        "per_device_train_batch_size": JOBS[job],
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": 2e-4,
        "train_sampling_strategy": "sequential",
        "bf16": True,
        "use_cpu": options.device == "cpu",
        "gradient_checkpointing": options.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "seed": 42,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


# ---- contenders --------------------------------------------------------------------------------------------------


def lorakeet_trainer(config: Any, rows: list[list[int]], given: dict[str, Any], options: argparse.Namespace) -> Any:
    import datasets
    import transformers

    import lorakeet
    from lorakeet.data.collate import PaddingCollator

    base = make_base(config, options)
    base = in_8_bits(base) if options.one[2].endswith("int8") else base
    model = lorakeet.get_peft_model(base, lorakeet.LoraConfig(**LORA))
    data = datasets.Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    arguments = transformers.TrainingArguments(**given, remove_unused_columns=False)
    # one pass for short samples, and at most one full row in a pass, as in PEFT
    budget = min(options.row, config.max_position_embeddings)
    return lorakeet.Trainer(model, arguments, train_dataset=data, data_collator=PaddingCollator(0), token_budget=budget)


def peft_trainer(config: Any, rows: list[list[int]], given: dict[str, Any], options: argparse.Namespace) -> Any:
    import datasets
    import peft
    import transformers

    from lorakeet.data.collate import PaddingCollator

    model = peft.get_peft_model(make_base(config, options), peft.LoraConfig(**LORA))
    arguments = transformers.TrainingArguments(**given, remove_unused_columns=False)
    data = datasets.Dataset.from_dict({"input_ids": rows})
    return transformers.Trainer(model, arguments, train_dataset=data, data_collator=PaddingCollator(0))


def trl_trainer(config: Any, rows: list[list[int]], given: dict[str, Any], options: argparse.Namespace) -> Any:
    import datasets
    import peft
    import trl

    flash = options.device == "cuda" and importlib.util.find_spec("flash_attn")
    base = make_base(config, options, "flash_attention_2" if flash else "sdpa")
    padding_free = config.model_type == "llama" and given["per_device_train_batch_size"] > 1
    arguments = trl.SFTConfig(**given, max_length=None, padding_free=padding_free)
    data = datasets.Dataset.from_dict({"input_ids": rows})
    settings = {"train_dataset": data, "processing_class": two_word_tokenizer(), "peft_config": peft.LoraConfig(**LORA)}
    return trl.SFTTrainer(base, arguments, **settings)


def unsloth_trainer(config: Any, rows: list[list[int]], given: dict[str, Any], options: argparse.Namespace) -> Any:
    from unsloth import FastLanguageModel  # isort: skip # changes transformers and trl, so before them
    import datasets
    import torch
    import trl

    folder = f"{given['output_dir']}/base"  # it only reads models from disk
    make_base(config, options).save_pretrained(folder)
    two_word_tokenizer().save_pretrained(folder)
    torch.cuda.empty_cache()
    longest = max(map(len, rows))
    how = {"max_seq_length": longest, "dtype": torch.bfloat16, "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, **how)
    lora = {name: value for name, value in LORA.items() if name != "task_type"}
    model = FastLanguageModel.get_peft_model(model, **lora, use_gradient_checkpointing=options.checkpointing)
    arguments = trl.SFTConfig(**given, max_length=longest)
    data = datasets.Dataset.from_dict({"input_ids": rows})
    return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)


def two_word_tokenizer() -> Any:
    """Build a tokenizer because TRL requires one; the samples are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")


def train_one(options: argparse.Namespace) -> dict[str, float]:
    """Train one contender and return its figures."""
    shape, job, name = options.one
    config = make_config(shape, options.tiny)
    rows = make_rows(job, config, options)
    makers = {"lorakeet": lorakeet_trainer, "peft": peft_trainer, "trl": trl_trainer, "unsloth": unsloth_trainer}
    with tempfile.TemporaryDirectory() as folder:
        trainer = makers[CONTENDERS[name]](config, rows, training_arguments(job, folder, options), options)
        return timed(trainer, rows, name.startswith("lorakeet"), options)


def timed(trainer: Any, rows: list[list[int]], ours: bool, options: argparse.Namespace) -> dict[str, float]:
    from contextlib import ExitStack

    import torch
    import transformers

    from lorakeet.patches.fused_layers import fused_layers
    from lorakeet.patches.fused_loss import fused_loss
    from lorakeet.patches.padding_free import padding_free
    from lorakeet.runs.process_memory import peak_rss_bytes

    cuda, marks = options.device == "cuda", []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.remove_callback(transformers.PrinterCallback)
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as ways:
        for way in (padding_free, fused_loss, fused_layers) if ours else ():  # as a run has it
            ways.enter_context(way(trainer.model))
        trainer.train()
    took = marks[-1] - marks[options.warm - 1]
    tokens = sum(map(len, rows[len(rows) * options.warm // (options.warm + options.steps) :]))
    return {
        "tokens/s": tokens / took,
        "ms": 1000 * took / options.steps,
        "weights GB": weights / 1e9,
        "peak GB": (torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()) / 1e9,
        "first loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line),
    }


# ---- the table ---------------------------------------------------------------------------------------------------


def print_tables(options: argparse.Namespace) -> None:
    """Run every contender on every shape and job."""
    packages = sorted({"torch", "transformers", "flash_attn", *CONTENDERS.values()})
    there = [name for name in packages if importlib.util.find_spec(name)]
    print("training: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there))
    contenders = [name for name in options.contenders if CONTENDERS[name] in there]
    for name in sorted(set(options.contenders) - set(contenders)):
        print(f"{name} is left out: {CONTENDERS[name]} is not installed")
    for shape in options.shapes:
        for job in options.jobs:
            config = make_config(shape, options.tiny)
            lengths = [len(row) for row in make_rows(job, config, options)]
            print(
                f"\n{shape}{' (tiny)' if options.tiny else ''}, {job}: {options.accumulate} x {JOBS[job]} samples a step of "
                f"{statistics.mean(lengths):.0f} tokens (mean), at most {max(lengths)}; {options.device}"
            )
            print(
                f"{'':14}{'tokens/s':>10}{'ratio':>7}{'ms/step':>9}{'weights GB':>11}{'peak GB':>9}{'first loss':>12}"
            )
            print_contenders(shape, job, contenders, options)


def print_contenders(shape: str, job: str, contenders: list[str], options: argparse.Namespace) -> None:
    """Print one table; the ratio is to PEFT, or to the first contender without PEFT.

    Args:
        shape: Name of the base's shape.
        job: Name of the job.
        contenders: Names in the order of their turns.
        options: Command line.
    """
    numbers = ("row", "accumulate", "warm", "steps")
    words = [word for name in numbers for word in (f"--{name}", str(getattr(options, name)))]
    words += ["--device", options.device, *["--tiny"] * options.tiny, *["--checkpointing"] * options.checkpointing]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in contenders:
            command = [sys.executable, str(Path(__file__)), *words, "--one", shape, job, name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
            else:
                last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
                print(f"{name:14} failed: {last[:160]}", flush=True)
    speeds = {name: statistics.median(run["tokens/s"] for run in runs) for name, runs in found.items()}
    against = speeds.get("peft-bf16") or next(iter(speeds.values()), 1.0)
    for name, runs in found.items():
        one = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"{name:14}{one['tokens/s']:10.0f}{speeds[name] / against:7.2f}{one['ms']:9.1f}{one['weights GB']:11.2f}"
            f"{one['peak GB']:9.2f}{one['first loss']:12.4f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    given = parser.parse_args()
    if not given.one:
        parser.error("start it with: python benchmarks/gpu.py --parts training")
    print(json.dumps(train_one(given)))
