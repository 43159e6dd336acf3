"""Loss, bytes and speed of a base in 4 bits, beside fp32, 8 bits, and 4 bits by bitsandbytes.

Usage::

    python benchmarks/nf4.py                           # all parts
    python benchmarks/nf4.py --parts accuracy --rows 40
    python benchmarks/nf4.py --parts step generation --without-peers

Run it on an idle machine. Each part runs in its own process; contenders alternate, and medians count. Accuracy does not
depend on the machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from int8 import PROMPTS, show

PARTS = ("accuracy", "step", "generation", "layer")
PEER = "bitsandbytes nf4, vocabulary in fp32"


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Map the name of each contender to a function that loads the embedded base in its format."""
    import lorakeet
    from lorakeet.base.load import load_base

    def load(**settings: Any) -> Callable[[], Any]:
        return lambda: load_base(dtype="fp32", **settings).model

    kept = {"quantization_config": lorakeet.Nf4Config(embeddings=False)}
    found = {
        "fp32": load(),
        "int8": load(bits=8),
        "nf4, vocabulary in int8": load(bits=4),
        "nf4, vocabulary in fp32": load(model_options=kept),
    }
    return found if options.without_peers else {**found, PEER: bitsandbytes_model}


def bitsandbytes_model() -> Any:
    import transformers

    from lorakeet.base.source import find_source, local_folder
    from lorakeet.config import DEFAULT_MODEL

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float32",
    )
    folder = local_folder(find_source(DEFAULT_MODEL))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype="float32")


def vocabulary_in_nf4() -> Any:
    """Return the base with layers in NF4, and a vocabulary of NF4's values."""
    import torch

    import lorakeet
    from lorakeet.kernels.nf4.format import dequantize, quantize

    model = lorakeet.load_base(
        dtype="fp32", model_options={"quantization_config": lorakeet.Nf4Config(embeddings=False)}
    ).model
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(dequantize(quantize(embedding)))
    return model


# ---- parts -------------------------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace) -> list[dict]:
    """Measure the held-out loss on quotations, and the bytes of all weights."""
    import lorakeet
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.collate import PaddingCollator
    from lorakeet.data.prepare import prepare
    from lorakeet.train.evaluate import evaluate

    tokenizer = lorakeet.load_base(dtype="fp32").tokenizer
    data = DataSettings(path="fortunes", eval_fraction=0.05)
    rows = prepare(data, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=42).held_out
    rows = rows.select(range(min(options.rows, len(rows))))
    found: list[dict] = []
    for name, load in {**contenders(options), "nf4, vocabulary in nf4 (values only)": vocabulary_in_nf4}.items():
        model = load()
        got = evaluate(model, rows, PaddingCollator(tokenizer.pad_token_id), 4)
        change = 100 * (got["loss"] / found[0]["loss"] - 1) if found else 0.0
        size = sum(p.nbytes for p in model.parameters()) / 1e6
        found.append({"": name, "loss": got["loss"], "tokens": got["tokens"], "change %": change, "weights MB": size})
        print(f"{name}: {got['loss']:.5f} ({change:+.3f} %)", file=sys.stderr, flush=True)
    return found


def step(options: argparse.Namespace) -> list[dict]:
    """Time a training step: 512 tokens without padding, LoRA r=16 on q_proj and v_proj; bitsandbytes by PEFT."""
    import lorakeet
    from training_step import as_a_run, make_batch, make_step

    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    batch = make_batch(16, 32, 0.0)
    steps: dict[str, Callable[[], Any]] = {}
    with ExitStack() as runs:
        for name, load in contenders(options).items():
            if name == PEER:
                import peft

                model = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).train()
            else:
                model = lorakeet.get_peft_model(load(), lorakeet.LoraConfig(task_type="CAUSAL_LM", **settings)).train()
                runs.enter_context(as_a_run(model))
            steps[name] = functools.partial(make_step(model, counted=name != PEER), batch)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(options.repeats + 1):
            for name, run in steps.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[name].append(time.perf_counter() - began)
    return speeds({name: [512 / each for each in taken] for name, taken in times.items()})


def generation(options: argparse.Namespace) -> list[dict]:
    """Generate greedily at batch one."""
    import torch

    import lorakeet
    from lorakeet.inference.fast_decode import fast_decode

    tokenizer = lorakeet.load_base(dtype="fp32").tokenizer
    models = {name: load() for name, load in contenders(options).items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for turn, prompt in enumerate((PROMPTS[0], *PROMPTS)):  # the first twice: warm-up
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for name, model in models.items():
            began = time.perf_counter()
            with torch.inference_mode(), fast_decode(model):
                model.generate(ids, do_sample=False, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
            if turn:
                rates[name].append(options.tokens / (time.perf_counter() - began))
    return speeds(rates)


def layer(options: argparse.Namespace) -> list[dict]:
    """Time the products of one weight of 1,536 x 576 and of 4,096 x 4,096, in both directions, in microseconds."""
    import torch

    from lorakeet.kernels.frozen_linear import linear_out
    from lorakeet.kernels.nf4 import linear
    from lorakeet.kernels.nf4.format import quantize
    from lorakeet.quant.int8 import quantize_dense

    found = []
    for out, inner in ((1536, 576), (4096, 4096)):
        dense = torch.randn(out, inner) / inner**0.5
        four, eight = quantize(dense), quantize_dense(dense)
        for tokens in (1, 16, 512):
            x, g = torch.randn(tokens, inner), torch.randn(tokens, out)
            runs: dict[str, Callable[[], Any]] = {
                "fp32": lambda x=x, w=dense: linear_out(x, w.T, None),
                "int8": lambda x=x, w=eight: w.product(x),
                "nf4": lambda x=x, w=four: linear.product(x, w),
                "fp32 back": lambda g=g, w=dense: linear_out(g, w, None),
                "int8 back": lambda g=g, w=eight: w.input_gradient(g),
                "nf4 back": lambda g=g, w=four: linear.input_gradient(g, w),
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(options.repeats + 1):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    if turn:
                        times[name].append(1e6 * (time.perf_counter() - began))
            medians = {name: statistics.median(each) for name, each in times.items()}
            found.append({"weight": f"{out} x {inner}", "tokens": tokens, **medians})
    return found


def speeds(rates: dict[str, list[float]]) -> list[dict]:
    """Return the median rate of each contender, and its ratio to the first one."""
    medians = {name: statistics.median(each) for name, each in rates.items()}
    first = next(iter(medians.values()))
    return [{"": name, "tokens/s": median, "ratio": median / first} for name, median in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--without-peers", action="store_true", help="no bitsandbytes")
    parser.add_argument("--rows", type=int, default=100, help="held-out quotations of the accuracy")
    parser.add_argument("--repeats", type=int, default=11, help="turns of the times")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(globals()[options.one](options)))
        return
    for part in options.parts:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", part]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        print(f"\n{part}: {(globals()[part].__doc__ or '').splitlines()[0]}")
        show(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
