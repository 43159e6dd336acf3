"""Latency at batch one: base, merged and unmerged adapters, and two neighbors of LoRA; and the time of switching adapters.

Usage::

    python benchmarks/latency.py            # about ten minutes, on an idle machine
    python benchmarks/latency.py --short    # one or two, to see it run

One process with the same weights and prompts; contenders alternate, and medians count. Two measurements: a prompt, and one
new token after a prompt, whose keys and values are in the cache. Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751)
and prefix tuning (Li and Liang 2021, arXiv:2101.00190) are here for comparison only. They have as many trained parameters as
the demo's adapter (r=16 on q_proj and v_proj), of random values: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import lorakeet
from int8 import show
from lorakeet import LoraConfig, get_peft_model, load_base
from lorakeet.lora.layer import LoraLayer

#: Settings of the demo's adapter.
ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
#: Adapters of the contenders with several.
SEVERAL = 3
#: Calls of each contender before the timed ones.
WARM_UP = 3


# ---- contenders ------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A model, and the keys and values that are before every prompt of it.

    Attributes:
        model: The model.
        prefix: Keys and values [1, heads, tokens, head size] of each layer; empty but for prefix tuning.
        trained: Number of its trained parameters.
    """

    model: Any
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    trained: int = 0

    def cache(self) -> DynamicCache:
        """Return a cache that holds the prefix."""
        return DynamicCache(self.prefix) if self.prefix else DynamicCache()


class Bottleneck(nn.Module):
    """A layer of Houlsby et al. 2019, section 2.1: h ← h + W_up·GELU(W_down·h + b_down) + b_up."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, size), nn.Linear(size, features)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(nn.functional.gelu(self.down(h)))


def with_lora(base: nn.Module, adapters: int = 1, acting: int = 1) -> Contender:
    """Add adapters with random B; of several, the first ``acting`` act, and their updates are summed."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**ADAPTER))
    names = ["default", *(f"adapter{number}" for number in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**ADAPTER))
    with torch.no_grad():
        for layer in model.lora_layers():
            for name in names:
                layer.lora_B[name].weight.normal_(std=0.02)
    model.set_adapter(names[:acting])
    return Contender(model.eval(), trained=model.get_nb_trainable_parameters()[0])


def merged(contender: Contender) -> Contender:
    model = copy.deepcopy(contender.model).merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    return Contender(model)


def with_bottlenecks(base: nn.Module, budget: int) -> Contender:
    """Put a bottleneck behind the last projection of each attention and feed-forward network."""
    model = copy.deepcopy(base)
    features, places = model.config.hidden_size, 2 * len(model.model.layers)
    size = max(round((budget / places - features) / (2 * features + 1)), 1)
    for layer in model.model.layers:
        for owner, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            setattr(owner, name, nn.Sequential(getattr(owner, name), Bottleneck(features, size)))
    added = [module for module in model.modules() if isinstance(module, Bottleneck)]
    return Contender(model.eval(), trained=sum(p.numel() for module in added for p in module.parameters()))


def with_prefix(base: Any, budget: int) -> Contender:
    """Give each layer's attention trained keys and values of some virtual tokens."""
    config = base.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    tokens = max(round(budget / (2 * config.num_hidden_layers * heads * size)), 1)
    shape = (config.num_hidden_layers, 2, 1, heads, tokens, size)
    prefix = tuple((keys, values) for keys, values in torch.randn(shape))
    return Contender(base, prefix, sum(k.numel() + v.numel() for k, v in prefix))


def contenders(base: Any) -> dict[str, Contender]:
    lora = with_lora(base)
    return {
        "base": Contender(base),
        "LoRA, merged": merged(lora),
        "LoRA": lora,
        f"LoRA, 1 of {SEVERAL} acts": with_lora(base, SEVERAL),
        f"LoRA, {SEVERAL} of {SEVERAL} act": with_lora(base, SEVERAL, SEVERAL),
        "bottleneck adapters": with_bottlenecks(base, lora.trained),
        "prefix tuning": with_prefix(base, lora.trained),
    }


# ---- measurements ----------------------------------------------------------------------------------------------------


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def latencies(models: dict[str, Contender], prompt: int, new: int, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a forward pass, for each contender.

    Args:
        models: The contenders, by name.
        prompt: Tokens that are in the cache already, beside a prefix.
        new: Tokens of the pass.
        repeats: Timed passes of each contender.
    """
    draw = torch.Generator().manual_seed(0)
    before, ids = (torch.randint(100, 40_000, (1, count), generator=draw) for count in (max(prompt, 1), new))
    caches = {name: contender.cache() for name, contender in models.items()}
    for name, contender in models.items() if prompt else ():
        contender.model(before, past_key_values=caches[name], use_cache=True)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + WARM_UP):
        for name, contender in models.items():
            cache = copy.deepcopy(caches[name])
            settings = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            took = milliseconds(partial(contender.model, ids, **settings))
            if turn >= WARM_UP:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def switch_time(model: Any, repeats: int) -> tuple[float, int]:
    """Return the median milliseconds of ``set_adapter``, and the number of LoRA layers."""
    names = ["adapter1", "default"] * (repeats // 2)
    return statistics.median(milliseconds(lambda n=n: model.set_adapter(n)) for n in names), len(model.lora_layers())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed passes of each contender")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256], help="tokens of the prompts")
    parser.add_argument("--short", action="store_true", help="3 passes and the shortest prompt, to see it run")
    options = parser.parse_args()
    repeats, prompts = (3, [min(options.prompts)]) if options.short else (options.repeats, options.prompts)
    models = contenders(load_base().model)
    print(f"lorakeet {lorakeet.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, fp32")
    for prompt in prompts:
        for cached, new, what in ((0, prompt, f"a prompt of {prompt}"), (prompt, 1, f"one new token after {prompt}")):
            found = latencies(models, cached, new, repeats)
            print(f"\n{what} tokens" if new > 1 else f"\n{what}")
            show(
                [
                    {
                        "": name,
                        "trained": models[name].trained,
                        "ms": f"{ms:.2f}",
                        "/ base": f"{ms / found['base']:.3f}",
                    }
                    for name, ms in found.items()
                ]
            )
    took, layers = switch_time(models[f"LoRA, 1 of {SEVERAL} acts"].model, 200)
    print(f"\nset_adapter over {layers} layers: {took:.3f} ms, {100 * took / layers:.3f} ms a hundred layers")


if __name__ == "__main__":
    main()
