"""Latency of the base, of an unmerged and of a merged adapter, and the time of switching adapters.

One process with the same weights and prompts; contenders alternate, and medians count. Run: ``python benchmarks/latency.py``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

import lorakeet
from lorakeet import LoraConfig, get_peft_model, load_base
from lorakeet.lora.layer import LoraLayer


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def with_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """Add an adapter of the demo's shape with random B: r=16 on q_proj and v_proj."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for layer in adapted.lora_layers():
            layer.lora_B["default"].weight.normal_(std=0.02)
    return adapted.eval()


@torch.inference_mode()
def forward_times(models: dict[str, torch.nn.Module], tokens: int, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of one forward pass over ``tokens`` tokens at batch one, for each model."""
    ids = torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 3):  # the first three warm up
        for name, model in models.items():
            took = milliseconds(lambda m=model: m(ids, use_cache=False))
            if turn >= 3:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def switch_time(model: torch.nn.Module, repeats: int = 200) -> tuple[float, int]:
    """Return the median milliseconds of ``set_adapter``, and the number of LoRA layers."""
    model.add_adapter("second", LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    names = ["second", "default"] * (repeats // 2)
    return statistics.median(milliseconds(lambda n=n: model.set_adapter(n)) for n in names), len(model.lora_layers())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    base, _ = load_base()
    adapted = with_adapter(base)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    models = {"base": base, "adapter": adapted, "merged": merged}
    print(f"lorakeet {lorakeet.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, fp32")
    print(f"{'tokens':>7} {'base ms':>9} {'adapter ms':>11} {'merged ms':>10} {'adapter/base':>13} {'merged/base':>12}")
    for tokens in (1, 32, 256):
        t = forward_times(models, tokens, repeats)
        ratios = f"{t['adapter'] / t['base']:13.3f} {t['merged'] / t['base']:12.3f}"
        print(f"{tokens:7} {t['base']:9.1f} {t['adapter']:11.1f} {t['merged']:10.1f} {ratios}")
    took, layers = switch_time(adapted)
    print(f"set_adapter over {layers} layers: {took:.3f} ms, {100 * took / layers:.3f} ms a hundred layers")


if __name__ == "__main__":
    main()
