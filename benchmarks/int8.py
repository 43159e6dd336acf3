"""Accuracy, memory and speed of a base in 8 bits.

Usage::

    python benchmarks/int8.py                               # all parts but the two long ones
    python benchmarks/int8.py --parts accuracy generation
    python benchmarks/int8.py --parts train --keep runs     # six runs of the demo's job; runs/ allows to resume
    python benchmarks/int8.py --parts opt                   # the shape of facebook/opt-6.7b: 10 GB, half an hour

Training beside PEFT on an 8-bit base is in ``benchmarks/training.py``. Run it on an idle machine. Each part runs in its own
process; contenders alternate, and medians count. Accuracy does not depend on the machine: activations in 8 bits are
multiplied in fp32, which is exact for them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

PARTS = ("accuracy", "stress", "layer", "model", "generation", "memory", "train", "opt")
LONG = ("train", "opt")
PEER = "bitsandbytes int8, plain LoRA"
PEFT = "PEFT, bitsandbytes int8"
PROMPTS = (
    "Two things are infinite:", "Beware of", "The best way to predict the future", "A computer is", "Never argue with",
    "Love is", "In theory,", "The trouble with", "Money can", "If you want to be happy,", "Science is", "Old programmers",
)  # fmt: skip


# ---- rounding rules ----------------------------------------------------------------------------------------------


def rules() -> dict[str, Callable[[Any], Any]]:
    """Map each rule to a function that returns the columns of an activation to keep in full precision."""
    import torch

    none = torch.empty(0, dtype=torch.int64)
    return {
        "one scale for each token": lambda x: none,
        "columns above 6.0 apart": lambda x: (x.abs().amax(0) > 6.0).nonzero()[:, 0],
        "columns above 8 x rms apart": largest_columns,
    }


def largest_columns(x: Any) -> Any:
    """Return the columns of x [n, in] with a value above eight times its root mean square, at most a sixteenth."""
    largest = x.abs().amax(0)
    found = (largest > 8 * x.square().mean().sqrt()).nonzero()[:, 0]
    most = x.shape[1] // 16
    return found if len(found) <= most else largest.topk(most).indices


def rounded_product(rule: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a product with activations in 8 bits, except in the rule's columns; the same on all processors."""
    from lorakeet.kernels.int8.format import dequantize, outlier_columns, quantize_rows, split_scale

    def product(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        rows, even = split_scale(weight, scale)
        kept, whole = outlier_columns(weight, scale), x
        x = x if even is None else x * even
        columns = rule(x)
        inner = x.clone()
        inner[:, columns] = 0
        rounded, row_scale = quantize_rows(inner)
        h = (rounded.float() @ weight.float().T).mul_(row_scale.unsqueeze(1)).mul_(rows)
        h += x[:, columns].float() @ dequantize(weight[:, columns], rows).T
        if kept:
            h += whole[:, kept[0].long()].float() @ kept[1]
        return (h if bias is None else h + bias).to(x.dtype)

    return product


@contextmanager
def multiplied_by(product: Callable[..., Any]) -> Any:
    """Replace the product of every 8-bit layer."""
    from lorakeet.kernels.int8 import linear

    before, linear.product = linear.product, product
    try:
        yield
    finally:
        linear.product = before


# ---- parts -------------------------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace) -> list[dict]:
    """Measure the held-out loss on quotations in fp32 and in several 8-bit formats."""
    import lorakeet
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.collate import PaddingCollator
    from lorakeet.data.prepare import prepare
    from lorakeet.kernels.int8.registry import best_on
    from lorakeet.train.evaluate import evaluate

    full, tokenizer = lorakeet.load_base(dtype="fp32")
    rows = prepare(
        DataSettings(path="fortunes", eval_fraction=0.05), TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42
    ).held_out
    rows = rows.select(range(min(options.rows, len(rows))))

    def figure(model: Any) -> dict[str, Any]:
        return evaluate(model, rows, PaddingCollator(tokenizer.pad_token_id), 4)

    fp32 = figure(full)
    found = [{"": "fp32", "loss": fp32["loss"], "tokens": fp32["tokens"], "change %": 0.0}]

    def note(name: str, model: Any) -> None:
        got = figure(model)
        change = 100 * (got["loss"] / fp32["loss"] - 1)
        found.append({"": name, "loss": got["loss"], "tokens": got["tokens"], "change %": change})
        print(f"{name}: {got['loss']:.5f} ({change:+.3f} %)", file=sys.stderr, flush=True)

    del full
    for embeddings in (False, True):
        model = in_8_bits(embeddings)
        which = "layers, embedding, head" if embeddings else "layers"
        with multiplied_by(blocked()):
            note(f"{which}: weights alone", model)
        note(f"{which}: as this machine multiplies ({best_on('cpu').name})", model)
        for name, rule in rules().items():
            with multiplied_by(rounded_product(rule)):
                note(f"{which}: {name}", model)
        del model
    with columns_left_uneven():
        plain = in_8_bits(False)
    with multiplied_by(blocked()):
        note("plain absmax, layers: weights alone", plain)
    with multiplied_by(rounded_product(rules()["one scale for each token"])):
        note("plain absmax, layers: one scale for each token", plain)
    if not options.without_peers:
        note("bitsandbytes", bitsandbytes_model())
    return found


@contextmanager
def columns_left_uneven() -> Any:
    """Quantize weights by rows only, without balanced or outlier columns."""
    import torch

    from lorakeet.kernels.int8 import format as int8_format

    before = int8_format.balance_columns, int8_format.OUTLIERS
    int8_format.balance_columns, int8_format.OUTLIERS = lambda weight: torch.ones(weight.shape[1]), 0
    try:
        yield
    finally:
        int8_format.balance_columns, int8_format.OUTLIERS = before


def in_8_bits(embeddings: bool) -> Any:
    import lorakeet

    config = lorakeet.Int8Config(embeddings=embeddings)
    return lorakeet.load_base(dtype="fp32", model_options={"quantization_config": config}).model


def bitsandbytes_model() -> Any:
    import transformers

    from lorakeet.base.source import find_source, local_folder
    from lorakeet.config import DEFAULT_MODEL

    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    folder = local_folder(find_source(DEFAULT_MODEL))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype="float32")


def blocked() -> Callable[..., Any]:
    """Return the product in which only the weight is rounded, the same on all processors."""
    from lorakeet.kernels.int8.reference import int8_linear_reference

    return int8_linear_reference


def stress(options: argparse.Namespace) -> list[dict]:
    """Measure the product's error if some input columns are a hundred times as large, without their own part."""
    import torch

    from lorakeet.kernels.int8.format import quantize_weight

    torch.manual_seed(0)
    found = []
    for columns in (0, 1, 8, 32):
        x, dense = torch.randn(512, 1024), torch.randn(1024, 1024) / 32
        large = torch.randperm(1024)[:columns]
        x[:, large] *= 100
        weight, scale = quantize_weight(dense)
        exact = x.double() @ dense.double().T
        ordinary = x.clone()
        ordinary[:, large] = 0
        size = (ordinary.double() @ dense.double().T).norm()
        for name, rule in {"weights alone": None, **rules()}.items():
            multiply = blocked() if rule is None else rounded_product(rule)
            error = float((multiply(x, weight, scale).double() - exact).norm() / size)
            found.append({"columns of 100 x": columns, "": name, "error / ordinary part": error})
    return found


def layer(options: argparse.Namespace) -> list[dict]:
    """Time forward and backward of one layer with LoRA, r=16, 512 tokens."""
    found = []
    for out, inner in ((4096, 4096), (576, 1536), (1536, 576)):
        times = layer_times(out, inner, options)
        for name, took in times.items():
            line = {"layer": f"{out} x {inner}", "": name, "ms": took, "fp32 / this": times["lorakeet fp32"] / took}
            peer = {} if options.without_peers else {"bitsandbytes / this": times[PEER] / took}
            found.append({**line, **peer})
    return found


def layer_times(out: int, inner: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the median milliseconds of one layer [out, inner], by format and library."""
    import torch

    from lorakeet.kernels.int8.format import quantize_weight
    from lorakeet.kernels.lora_linear import lora_linear
    from lorakeet.quant.int8 import Int8Weight

    torch.manual_seed(0)
    dense = torch.randn(out, inner) / inner**0.5
    weight, scale = quantize_weight(dense)
    x = torch.randn(512, inner, requires_grad=True)
    a = (torch.randn(16, inner) / inner**0.5).requires_grad_()
    b = torch.zeros(out, 16, requires_grad=True)
    g = torch.randn(512, out)

    def ours(weight: Any, scale: Any = None) -> None:
        torch.autograd.grad(lora_linear(x, Int8Weight(weight, scale), None, a, b, 2.0), (x, a, b), g)

    def plain(base: Callable[[Any], Any]) -> None:
        torch.autograd.grad(base(x) + 2.0 * (x @ a.T) @ b.T, (x, a, b), g)

    ways: dict[str, Callable[[], None]] = {
        "torch fp32, plain LoRA": lambda: plain(lambda x: torch.nn.functional.linear(x, dense)),
        "lorakeet fp32": lambda: ours(dense),
        "lorakeet int8": lambda: ours(weight, scale),
    }
    if not options.without_peers:
        peer = bitsandbytes_layer(dense)
        ways[PEER] = lambda: plain(peer)
    return alternate(ways, options.repeats)


def bitsandbytes_layer(dense: Any) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(dense.shape[1], dense.shape[0], bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(dense.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu").train()


def model(options: argparse.Namespace) -> list[dict]:
    """Time a training step of a whole model: 512 tokens without padding, LoRA r=16 on q_proj and v_proj."""
    import lorakeet

    full = lorakeet.load_base(dtype="fp32").model
    found = whole_model("SmolLM2-135M", full, options)
    del full
    return found + whole_model("Llama 1.1B, random weights", random_llama(), options)


def random_llama() -> Any:
    """Build a random Llama in the size of TinyLlama: hidden 2,048, 22 layers."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)


def whole_model(name: str, full: Any, options: argparse.Namespace) -> list[dict]:
    """Time steps of one base in fp32, in 8 bits, and by PEFT on bitsandbytes, on the same tokens."""
    import lorakeet
    from lorakeet.quant.quantize import quantize_
    from training_step import as_a_run, make_batch, make_step

    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    batch = {key: value % full.config.vocab_size for key, value in make_batch(16, 32, 0.0).items()}
    rounded = copy.deepcopy(full)
    quantize_(rounded)
    bases, peers = {"lorakeet int8": rounded}, {}
    if not options.without_peers:
        import peft

        by_peer = copy.deepcopy(full)
        for inner, linear in list(by_peer.base_model.named_modules()):
            if type(linear).__name__ == "Linear":
                by_peer.base_model.set_submodule(inner, bitsandbytes_layer(linear.weight.detach()))
        by_peer.requires_grad_(False).is_loaded_in_8bit = True
        peers = {PEFT: peft.get_peft_model(by_peer, peft.LoraConfig(**settings))}
    with ExitStack() as runs:
        ways = {}
        for way, base in {"lorakeet fp32": full, **bases}.items():
            made = lorakeet.get_peft_model(base, lorakeet.LoraConfig(**settings)).train()
            runs.enter_context(as_a_run(made))
            ways[way] = functools.partial(make_step(made), batch)
        for way, made in peers.items():
            ways[way] = functools.partial(make_step(made.train(), counted=False), batch)
        times = alternate(ways, min(options.repeats, 3), warm_up=1)
    lines = []
    for way, took in times.items():
        line = {
            "model": name,
            "": way,
            "ms": took,
            "tokens/s": 512_000 / took,
            "fp32 / this": times["lorakeet fp32"] / took,
        }
        lines.append({**line, **({f"{PEFT} / this": times[PEFT] / took} if peers else {})})
    return lines


def alternate(ways: dict[str, Callable[[], None]], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Return the median milliseconds of each, in turns; the first few turns are warm-up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + warm_up):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn >= warm_up:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(took) for name, took in times.items()}


def generation(options: argparse.Namespace) -> list[dict]:
    """Generate greedily at batch one: tokens per second in fp32 and in 8 bits, and how far the texts agree."""
    import torch

    import lorakeet
    from lorakeet.inference.fast_decode import fast_decode

    full, tokenizer = lorakeet.load_base(dtype="fp32")
    models = {"transformers fp32": full, "lorakeet int8": in_8_bits(True)}
    if not options.without_peers:
        models["bitsandbytes int8"] = bitsandbytes_model()
    speeds: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[list[int]]] = {name: [] for name in models}
    for number, prompt in enumerate((PROMPTS[0], *PROMPTS)):  # the first twice: warm-up
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for name, model in models.items():
            began = time.perf_counter()
            with torch.inference_mode(), fast_decode(model):  # as in `lorakeet generate`; no effect on other models
                new = model.generate(ids, do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
            took = time.perf_counter() - began
            if number:
                speeds[name].append((new.shape[1] - ids.shape[1]) / took)
                texts[name].append(new[0, ids.shape[1] :].tolist())
    found = []
    for name, speed in speeds.items():
        pairs = list(zip(texts[name], texts["transformers fp32"], strict=True))
        same = [
            next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), options.tokens) for pair in pairs
        ]
        median = statistics.median(speed)
        found.append(
            {
                "": name,
                "tokens/s": median,
                "ratio": median / statistics.median(speeds["transformers fp32"]),
                "same text": f"{sum(n == options.tokens for n in same)} of {len(same)}",
                "tokens alike (median)": statistics.median(same),
            }
        )
    return found


# ---- memory ------------------------------------------------------------------------------------------------------


class Peak(threading.Thread):
    """Peak of the anonymous and of the whole resident memory of this process, in bytes, sampled every 5 ms (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begin = self.now()
        self.anonymous, self.whole, self.over = *self.begin, False
        self.start()

    @staticmethod
    def now() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
        return int(sizes["RssAnon"]) * 1024, int(sizes["VmRSS"]) * 1024

    def run(self) -> None:
        while not self.over:
            anonymous, whole = self.now()
            self.anonymous, self.whole = max(self.anonymous, anonymous), max(self.whole, whole)
            time.sleep(0.005)

    def stop(self) -> dict[str, float]:
        self.over = True
        self.join()
        return {"peak MB": (self.anonymous - self.begin[0]) / 1e6, "with files MB": (self.whole - self.begin[1]) / 1e6}


def memory(options: argparse.Namespace) -> list[dict]:
    """Measure the bytes of the weights and the additional memory while loading, each in its own process."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        saved = f"{folder}/int8"
        words = [sys.executable, "-m", "lorakeet", "quantize", "--dtype", "fp32", "--out", saved]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, settings in (
            ("fp32", {}),
            ("int8, rounded while read", {"bits": 8}),
            ("int8, as saved", {"model": saved}),
        ):
            words = [sys.executable, __file__, "--load", json.dumps(settings)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found.append({"": name, **json.loads(done.stdout.splitlines()[-1])})
    for line in found:
        line["of fp32"] = line["weights MB"] / found[0]["weights MB"]
    return found


def load(settings: dict[str, Any]) -> dict[str, float]:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - not to be counted

    import lorakeet
    from lorakeet.base import load as _  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)
    peak, began = Peak(), time.perf_counter()
    model = lorakeet.load_base(dtype="fp32", **settings).model
    took = time.perf_counter() - began
    figures = peak.stop()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    largest = max(p.numel() * 4 for p in model.parameters())
    return {
        "weights MB": sum(sizes) / 1e6,
        **figures,
        "limit MB": (sum(sizes) + 2 * largest) / 1e6 + 300,
        "seconds": took,
    }


def opt(options: argparse.Namespace) -> list[dict]:
    """Train the shape of facebook/opt-6.7b on quotations; its random weights are quantized layer by layer."""
    import torch
    import transformers

    import lorakeet
    from lorakeet.base.meta_device import read_config
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.collate import PaddingCollator
    from lorakeet.data.prepare import prepare
    from lorakeet.quant.int8 import int8_layer, quantize_dense
    from lorakeet.quant.layer_selection import layers_to_quantize
    from lorakeet.quant.replace import dense_shape
    from lorakeet.runs.process_memory import peak_rss_bytes

    peak, began = Peak(), time.perf_counter()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(read_config("facebook/opt-6.7b"), dtype=torch.float32)
    tied: dict[str, Any] = {}
    for name, module in layers_to_quantize(model).items():
        rows, columns = dense_shape(module)
        vocabulary = rows == model.config.vocab_size
        if not (vocabulary and tied):
            weight, scale = quantize_dense(torch.randn(rows, columns).mul_(0.02), vocabulary=vocabulary)
        made = int8_layer(module, weight, scale, torch.float32)
        if vocabulary:  # embedding and head share them
            made.weight, made.scale = tied.setdefault("weight", made.weight), tied.setdefault("scale", made.scale)
        if getattr(made, "bias", None) is not None:
            made.bias = torch.nn.Parameter(torch.zeros(rows), requires_grad=False)
        model.set_submodule(name, made)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                start = torch.ones if isinstance(module, torch.nn.LayerNorm) and name == "weight" else torch.zeros
                setattr(module, name, torch.nn.Parameter(start(parameter.shape), requires_grad=False))
    loaded = time.perf_counter() - began
    tokenizer = lorakeet.load_base(dtype="fp32").tokenizer  # 49,152 tokens, all below this vocabulary's 50,272
    data = prepare(
        DataSettings(path="fortunes", eval_fraction=0.01), TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42
    ).train
    settings = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = lorakeet.get_peft_model(model, lorakeet.LoraConfig(**settings))
    marks: list[tuple[float, int]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append((time.perf_counter(), state.num_input_tokens_seen))
            print(f"step {len(marks)}", file=sys.stderr, flush=True)

    from lorakeet.patches.fused_loss import fused_loss
    from lorakeet.patches.gradient_checkpointing import gradient_checkpointing
    from lorakeet.patches.padding_free import padding_free

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=options.steps or 2, per_device_train_batch_size=4, gradient_accumulation_steps=4,
            learning_rate=2e-4, logging_steps=1, seed=42, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, include_num_input_tokens_seen="non_padding", use_cpu=True,
        )  # fmt: skip
        collator = PaddingCollator(tokenizer.pad_token_id)
        trainer = lorakeet.Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[Clock()])
        started = time.perf_counter()
        with padding_free(model), fused_loss(model), gradient_checkpointing(model):  # else activations exceed weights
            trainer.train()
    steps = [marks[0][0] - started, *(b[0] - a[0] for a, b in itertools.pairwise(marks))]
    figures = peak.stop()
    return [
        {
            "weights GB": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
            "made in s": loaded,
            "seconds a step": statistics.median(steps),
            "tokens a step": marks[-1][1] / len(marks),
            "200 steps, hours": 200 * statistics.median(steps) / 3600,
            "peak anonymous GB": figures["peak MB"] / 1e3,
            "peak resident GB": peak_rss_bytes() / 1e9,
            "losses": " ".join(f"{line['loss']:.3f}" for line in trainer.state.log_history if "loss" in line),
        }
    ]


# ---- training ----------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> list[dict]:
    """Run the demo's job by seed: held-out loss before and after, with a base in fp32 and in 8 bits, from equal starts."""
    found = []
    with ExitStack() as undo:
        kept = options.keep or Path(undo.enter_context(tempfile.TemporaryDirectory()))
        for seed in options.seeds:
            bits = {"fp32": None, "int8": 8}
            runs = {name: one_run(kept / f"{name}-{seed}", seed, bits[name], options.steps or 200) for name in bits}
            line: dict[str, Any] = {"seed": seed}
            for when in ("before", "after"):
                losses = {name: run[f"eval_loss_{when}"] for name, run in runs.items()}
                line |= {f"{name} {when}": f"{loss:.4f}" for name, loss in losses.items()}
                line[f"change {when} %"] = 100 * (losses["int8"] / losses["fp32"] - 1)
            line |= {f"{name} tokens/s": run["tokens_per_second"] for name, run in runs.items()}
            print(line, file=sys.stderr, flush=True)
            found.append(line)
    return found


def one_run(folder: Path, seed: int, bits: int | None, steps: int) -> dict[str, Any]:
    """Return the summary of ``lorakeet train`` on the demo's job, run in its own process.

    Args:
        folder: Folder of the run; a finished run in it is reused.
        seed: Seed of the run.
        bits: 8, or None for fp32.
        steps: Optimizer steps.
    """
    from lorakeet.cli.demo import JOB

    told = folder / "summary.json"
    if not told.exists() or json.loads(told.read_text())["steps"] != steps:
        settings = {
            **JOB, "base.dtype": "fp32", "base.bits": bits, "train.steps": steps, "train.warmup": min(100, steps // 2),
            "train.eval_every": None, "train.seed": seed, "out": str(folder),
        }  # fmt: skip
        words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        command = [sys.executable, "-m", "lorakeet", "train", *words, "--overwrite"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    summary: dict[str, Any] = json.loads(told.read_text())
    names = ("eval_loss_before", "eval_loss_after", "tokens_per_second", "wall_seconds", "peak_rss_bytes")
    print(folder.name, {name: summary[name] for name in names}, file=sys.stderr, flush=True)
    return summary


# ---- the table ---------------------------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    """Print rows of equal keys in columns."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    cells.insert(0, list(rows[0]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part not in LONG])
    parser.add_argument("--without-peers", action="store_true", help="no bitsandbytes")
    parser.add_argument("--rows", type=int, default=100, help="held-out quotations of the accuracy")
    parser.add_argument("--repeats", type=int, default=11, help="turns of the layers' times")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--steps", type=int, help="optimizer steps; left out: 200 in train, 2 of the largest shape")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the trainings")
    parser.add_argument("--keep", type=Path, help="folder for the runs; finished ones are reused")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        print(json.dumps(load(options.load)))
    elif options.one:
        print(json.dumps(globals()[options.one](options)))
    else:
        table(options)


def table(options: argparse.Namespace) -> None:
    """Run each part in its own process, one after the other."""
    import torch
    import transformers

    import lorakeet
    from lorakeet.kernels.int8.registry import best_on

    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    fast = sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"})
    print(f"lorakeet {lorakeet.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{torch.get_num_threads()} threads, {' '.join(fast)}; products in 8 bits: {best_on('cpu').name}")
    for part in options.parts:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", part]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        print(f"\n{part}: {(globals()[part].__doc__ or '').splitlines()[0]}")
        show(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
