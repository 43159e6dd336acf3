"""Combined adapters against the dense definition of each method, in every layer type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny import make, shake, token_ids
from helpers.tiny_experts import EXPERTS, IDS, moe
from lorakeet import LoraConfig, get_peft_model
from lorakeet.errors import AdapterError
from lorakeet.lora.algebra import pruning
from lorakeet.lora.algebra.methods import METHODS, LayerUpdate, combine_layer, make_method
from lorakeet.lora.layer import LoraLayer

WEIGHTS = {"a": 0.7, "b": -1.3, "c": 0.4}
DENSITY = 0.3


class Layers(nn.Module):
    """A convolution and an attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 2, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x)).flatten(2).mT
        return self.attention(x, x, x)[0]


def linear_model() -> Any:
    return with_adapters(
        make("llama"),
        a={"r": 3, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
        b={"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 9}},
        c={"r": 4, "target_modules": ["q_proj"]},
    )


def with_adapters(base: Any, **adapters: dict[str, Any]) -> Any:
    model: Any = None
    for seed, (name, settings) in enumerate(adapters.items()):
        config = LoraConfig(**{"lora_alpha": 7, **settings})
        if model is None:
            model = get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        shake(model, name, seed)
    return model.eval()


MODELS: dict[str, Any] = {
    "linear": linear_model,
    "Conv1D": lambda: with_adapters(
        make("gpt2"), **{n: {"r": 2 + i, "target_modules": ["c_attn"]} for i, n in enumerate("abc")}
    ),
    "layers": lambda: with_adapters(
        Layers(), **{n: {"r": 2 + i, "target_modules": ["conv", "attention"]} for i, n in enumerate("abc")}
    ),
    "experts": lambda: with_adapters(moe(), **{n: {**EXPERTS, "r": 1 + i} for i, n in enumerate("abc")}),
}


def dense(name: str, updates: dict[str, Tensor], majority: str = "total") -> Tensor:
    """Combine dense matrices as the papers define it."""
    pruned = {}
    for adapter, update in updates.items():
        count = int(DENSITY * update.numel())
        order = update.abs().flatten().argsort(descending=True)[:count]
        mask = torch.zeros(update.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(update)
        pruned[adapter] = update if name in ("linear", "cat", "svd") else torch.where(mask, update, 0.0)
    if not name.startswith("ties"):
        return sum(WEIGHTS[adapter] * update for adapter, update in pruned.items())  # type: ignore[return-value]
    votes = sum((u if majority == "total" else u.sign()) for u in pruned.values())
    sign = torch.where(votes >= 0, 1.0, -1.0)  # type: ignore[arg-type]
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for adapter, update in pruned.items():
        agrees = update.sign() == sign
        total, count = total + WEIGHTS[adapter] * update * agrees, count + agrees
    return total / count.clamp(min=1)


def matrices(layer: LoraLayer, adapter: str) -> list[Tensor]:
    """Return ΔW of a layer as matrices: one, or one for each expert."""
    update = layer.delta(adapter).detach().double()
    return list(update) if update.ndim == 3 and "ParamWrapper" in layer.shown_as else [update.flatten(1)]


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" not in name])
@pytest.mark.parametrize("kind", MODELS)
def test_a_combination_is_its_dense_definition(kind: str, method: str) -> None:
    model = MODELS[kind]()
    settings: dict[str, Any] = {"density": DENSITY} if "ties" in method or "prune" in method else {}
    for rank in (3, 64) if method.endswith("svd") else (None,):
        name = f"{method}{rank}"
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), name, method, svd_rank=rank, **settings)
        for layer in model.lora_layers():
            here = {adapter: matrices(layer, adapter) for adapter in WEIGHTS if adapter in layer.r}
            for block, made in enumerate(matrices(layer, name)):
                expected = dense(method.removesuffix("_svd"), {adapter: each[block] for adapter, each in here.items()})
                best = nearest_of_rank(expected, rank or sum(layer.r[adapter] for adapter in here))
                torch.testing.assert_close(made, best, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * values[:rank]) @ Vh[:rank]


def test_the_majority_may_be_counted() -> None:
    model = MODELS["linear"]()
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    for majority in ("total", "frequency"):
        more: dict[str, Any] = {"density": DENSITY, "majority_sign_method": majority, "svd_rank": 32}
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), majority, "ties_svd", **more)
        expected = dense("ties", {adapter: matrices(layer, adapter)[0] for adapter in WEIGHTS}, majority)
        torch.testing.assert_close(matrices(layer, majority)[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer.delta("total"), layer.delta("frequency"))


def test_dare_drops_at_random_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    update = LayerUpdate(-0.5, 2.0, 60, torch.randn(60, 60), torch.eye(60))
    whole = -0.5 * 2.0 * update.A
    generator = torch.Generator().manual_seed(1)
    method = make_method("dare_linear", density=0.25, generator=generator)
    made = [combine_layer([update], method, 60) for _ in range(40)]
    found = torch.stack([layer.B @ layer.A for layer in made])
    kept = found.abs() > 1e-4
    torch.testing.assert_close(found, torch.where(kept, whole / 0.25, 0.0), rtol=1e-4, atol=2e-5)
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.corrcoef(torch.stack([found.mean(0).flatten(), whole.flatten()]))[0, 1] > 0.95
    again = make_method("dare_linear", density=0.25, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(combine_layer([update], again, 60).B, made[0].B)


def test_convolutions_with_groups_and_biases() -> None:
    base = Layers()
    one: dict[str, Any] = {"target_modules": ["conv", "grouped"], "lora_bias": True, "r": 4}
    model = with_adapters(base, a=one, b={**one, "r": 6}, c={**one, "lora_bias": False, "r": 2})
    x = torch.randn(2, 3, 6, 6)
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 1.0, 1.0], "sum", "linear")
    model.set_adapter(["a", "b", "c"])
    expected = model(x)
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "cut", "svd", svd_rank=5)
    assert model.grouped.r["cut"] == 4, "a multiple of the groups"


def test_experts_keep_their_outputs() -> None:
    model = MODELS["experts"]()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    model.set_adapter(["a", "b"])
    expected = model(IDS).logits
    model.set_adapter("sum")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_no_update_and_a_sum_that_cancels() -> None:
    model = MODELS["linear"]()
    base = model.get_base_model()
    with model.disable_adapter():
        expected = base(token_ids()).logits
    for name, weights, method in [("zero", [0.0, 0.0], "ties"), ("none", [0.0, 0.0], "svd"), ("off", [0.0, 0], "cat")]:
        model.add_weighted_adapter(["a", "b"], weights, name, method, density=0.5)
        model.set_adapter(name)
        torch.testing.assert_close(model(token_ids()).logits, expected)


def test_equal_updates_cancel_exactly() -> None:
    torch.manual_seed(0)
    updates = [LayerUpdate(w, 2.0, 3, torch.randn(3, 50), torch.randn(40, 3)) for w in (0.3, 1.0)]
    again = LayerUpdate(-0.3, 2.0, 3, updates[0].A.clone(), updates[0].B.clone())
    made = combine_layer([*updates, again], make_method("linear"), 3)
    assert not made.B[:, :3].any() and not made.B[:, 6:].any(), "exactly zero"
    torch.testing.assert_close(made.B @ made.A, 2.0 * updates[1].B @ updates[1].A)


def test_a_large_layer_is_pruned_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    updates = [LayerUpdate(w, 2.0, 3, torch.randn(3, 50), torch.randn(40, 3)) for w in (1.0, -2.0)]
    method = make_method("ties", density=0.2)
    whole = combine_layer(updates, method, 3)
    monkeypatch.setattr(pruning, "_ENTRIES", 128)
    by_rows = combine_layer(updates, method, 3)
    torch.testing.assert_close(by_rows.B @ by_rows.A, whole.B @ whole.A)
    assert 0 < whole.energy_kept < 1


def test_a_clamp_bounds_the_factors() -> None:
    torch.manual_seed(0)
    update = LayerUpdate(1.0, 2.0, 3, torch.randn(3, 50), torch.randn(40, 3))
    plain, clamped = (combine_layer([update], make_method("svd", clamp=q), 3) for q in (None, 0.9))
    limit = torch.cat([plain.A.flatten(), plain.B.flatten()]).quantile(0.9)
    torch.testing.assert_close(clamped.B, plain.B.clamp(-limit, limit))
    assert clamped.B.abs().max() < plain.B.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ties", "density": 0.0}, "density 0.0, expected the share"),
        ({"name": "dare_linear"}, "density None"),
        ({"name": "tie"}, "unknown combination_type 'tie'"),
        ({"name": "ties", "density": 0.5, "majority_sign_method": "loud"}, "expected total or frequency"),
        ({"name": "svd", "clamp": 2.0}, "expected a quantile"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make_method(**settings)


def test_adapters_that_cannot_be_combined() -> None:
    model = with_adapters(moe(), a=EXPERTS, b={"target_modules": ["q_proj"], "lora_bias": True})
    with pytest.raises(AdapterError, match="lora_bias and one has target_parameters"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
