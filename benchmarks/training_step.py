"""Model, batch and optimizer step that the benchmarks of single steps share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

#: Settings of one measurement, by name (``cost.POINT``).
Point = dict[str, Any]


def make_model(point: Point) -> Any:
    import torch

    import lorakeet

    base = lorakeet.load_base(dtype="fp32", bits=8 if point["bits"] == 8 else None).model
    torch.manual_seed(42)
    settings = {"r": point["rank"], "lora_alpha": 2 * point["rank"], "lora_dropout": 0.05}
    config = lorakeet.LoraConfig(**settings, target_modules=point["layers"], task_type="CAUSAL_LM")
    return lorakeet.get_peft_model(base, config).train()


def make_batch(samples: int, length: int, spread: float) -> dict[str, Any]:
    """Draw random tokens; the lengths are spaced evenly over length·(1 ± spread)."""
    import torch

    from lorakeet.data.collate import PaddingCollator

    lengths = torch.linspace(length * (1 - spread), length * (1 + spread), samples).round().int().tolist()
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(100, 40_000, (max(n, 2),), generator=draw)} for n in lengths]
    return dict(PaddingCollator(0)(rows))


@contextmanager
def as_a_run(model: Any) -> Iterator[None]:
    """Apply the patches that :mod:`lorakeet.train.run` applies."""
    from lorakeet.patches.fused_layers import fused_layers
    from lorakeet.patches.fused_loss import fused_loss
    from lorakeet.patches.padding_free import padding_free

    with ExitStack() as ways:
        for way in (padding_free, fused_loss, fused_layers):
            ways.enter_context(way(model))
        yield


def make_step(model: Any, counted: bool = True) -> Callable[[dict[str, Any]], None]:
    """Build an optimizer step on one batch; ``counted`` passes the number of targets, else the model counts them."""
    import torch
    from torch.profiler import record_function

    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=2e-4, fused=True)

    def step(batch: dict[str, Any]) -> None:
        told = {"num_items_in_batch": batch["labels"][:, 1:].ne(-100).sum()} if counted else {}
        model(**batch, **told).loss.backward()
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step
