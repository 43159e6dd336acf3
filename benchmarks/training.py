"""Training beside PEFT: the demo's job on a base in fp32 and in 8 bits: real tokens per second, peak memory, losses.

Equal for both: base, starting adapter, samples of every optimizer step, optimizer, learning rate, batch 4 × 4, r=16 on
q_proj and v_proj, threads. Each contender runs in its own process, alternating; the first step of each is warm-up and left
out; medians over the rounds. PEFT's base in 8 bits is that of bitsandbytes. Run ``python benchmarks/training.py`` on a
machine that does nothing else; ``--contenders lorakeet lorakeet-int8`` for some of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

CONTENDERS = ("peft", "peft-int8", "lorakeet", "lorakeet-int8")
SETTINGS = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def run_one(name: str, start: str, steps: int) -> dict:
    """Train one contender from the adapter in ``start``; its figures."""
    import torch
    import transformers

    import lorakeet
    from lorakeet.base.find import find_source, local_folder
    from lorakeet.base.load import look_at
    from lorakeet.config import DEFAULT_MODEL, BaseSettings, DataSettings, TaskSettings
    from lorakeet.data.collate import PaddingCollator
    from lorakeet.data.prepare import prepare
    from lorakeet.train.fused_loss import fused_loss
    from lorakeet.train.padding_free import padding_free
    from lorakeet.train.report import peak_rss_bytes

    tokenizer = look_at(BaseSettings()).tokenizer
    data = prepare(
        DataSettings(path="fortunes", eval_fraction=0.01), TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42
    ).train
    bits = 8 if name.endswith("int8") else None
    if name.startswith("peft"):
        import peft

        settings = {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)} if bits else {}
        folder = local_folder(find_source(DEFAULT_MODEL))
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **settings)
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False) if bits else base
        model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
        trainer_class, rows = transformers.Trainer, data.remove_columns("length")
    else:
        base, _ = lorakeet.load_base(dtype="fp32", bits=bits)
        model = lorakeet.PeftModel.from_pretrained(base, start, is_trainable=True)
        trainer_class, rows = lorakeet.Trainer, data
    marks: list[tuple[float, int]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            marks.append((time.perf_counter(), state.num_input_tokens_seen))

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            warmup_steps=2,
            logging_steps=1,
            seed=42,
            data_seed=42,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            use_cpu=not torch.cuda.is_available(),
        )
        collator = PaddingCollator(tokenizer.pad_token_id)
        trainer = trainer_class(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        with ExitStack() as ways:
            if name.startswith("lorakeet"):  # as a run has it
                ways.enter_context(padding_free(model))
                ways.enter_context(fused_loss(model))
            trainer.train()
    (began, tokens_before), (ended, tokens_after) = marks[0], marks[-1]
    return {
        "tokens_per_second": (tokens_after - tokens_before) / (ended - began),
        "tokens": tokens_after,
        "peak_rss_gb": peak_rss_bytes() / 1e9,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.start, options.steps)))
        return
    print_table(options.steps, options.rounds, options.contenders)


def print_table(steps: int, rounds: int, contenders: Sequence[str]) -> None:
    """Alternate the contenders and print medians and ratios."""
    import peft
    import torch
    import transformers

    import lorakeet

    found: dict[str, list[dict]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as start:
        base, _ = lorakeet.load_base(dtype="fp32")
        lorakeet.get_peft_model(base, lorakeet.LoraConfig(**SETTINGS)).save_pretrained(start)
        del base
        for _ in range(rounds):
            for name in contenders:
                words = [sys.executable, str(Path(__file__)), "--one", name, "--start", start, "--steps", str(steps)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"lorakeet {lorakeet.__version__}, peft {peft.__version__}, transformers {transformers.__version__}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{steps} steps of 4 x 4 quotations, {rounds} rounds")
    print(f"{'':13} {'tokens/s':>9} {'ratio':>6} {'peak GB':>8} {'last loss':>10}")
    speeds = {name: statistics.median(one["tokens_per_second"] for one in runs) for name, runs in found.items()}
    for name, runs in found.items():
        memory = statistics.median(one["peak_rss_gb"] for one in runs)
        ratio = speeds[name] / speeds[contenders[0]]
        print(f"{name:13} {speeds[name]:9.1f} {ratio:6.2f} {memory:8.2f} {runs[0]['losses'][-1]:10.4f}")


if __name__ == "__main__":
    main()
