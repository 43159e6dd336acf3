"""``LowRankWeight`` gives the results of the dense weight, and forms it only where it must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (registers the grouped product's fallback)
from transformers import MixtralConfig, MixtralForCausalLM

from lorakeet.kernels.low_rank_weight import LowRankWeight


def low_rank_weight(*shape: int, r: int = 3) -> LowRankWeight:
    generator = torch.Generator().manual_seed(2)
    sizes = shape, (*shape[:-1], r), (*shape[:-2], r, shape[-1])
    return LowRankWeight(*(torch.randn(size, generator=generator) for size in sizes))


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))
OFFSETS = torch.tensor([1, 1, 4], dtype=torch.int32)
PRODUCTS = {
    "linear": (lambda m: F.linear(X, m[1], torch.arange(8.0)), (3, 8, 6)),
    "linear of one matrix": (lambda m: F.linear(X, m), (8, 6)),
    "matmul": (lambda m: X @ m, (3, 6, 8)),
    "matmul of a transpose": (lambda m: X @ m.transpose(1, 2), (3, 8, 6)),
    "transpose of a matrix": (lambda m: X @ m.T, (8, 6)),
    "from the left": (lambda m: m @ X.mT, (3, 8, 6)),
    "batched": (lambda m: torch.bmm(m[torch.tensor([2, 0, 0])], X.mT), (3, 8, 6)),
    "batched from the right": (lambda m: torch.bmm(X, m.mT), (3, 8, 6)),
    "grouped": (lambda m: F.grouped_mm(torch.ones(4, 8), m.mT, offs=OFFSETS), (3, 12, 8)),
    "grouped fallback": (lambda m: torch.ops.transformers.grouped_mm_fallback(X[0], m.mT, offs=OFFSETS), (3, 8, 6)),
    "a slice": (lambda m: F.linear(X, m[1:2][0]), (3, 8, 6)),
}
OTHERS = {
    "addition": (lambda m: m + 1.0, (3, 8, 6)),
    "einsum": (lambda m: torch.einsum("bij,bkj->bik", X, m), (3, 8, 6)),
    "chunks": (lambda m: torch.cat(m.chunk(2, 1), 2), (3, 8, 6)),
    "a part of every expert": (lambda m: m[:, :2], (3, 8, 6)),
    "rows": (lambda m: F.embedding(torch.tensor([2, 5]), m), (8, 6)),
    "two sums": (lambda m: m @ m.mT, (3, 8, 6)),
    "other dimensions": (lambda m: m.transpose(0, 1), (3, 8, 6)),
    "a reduction": (lambda m: m.sum(-1), (3, 8, 6)),
}


@pytest.mark.parametrize("name", PRODUCTS | OTHERS)
def test_operations_give_the_results_of_the_dense_weight(name, monkeypatch):
    ask, shape = (PRODUCTS | OTHERS)[name]
    both = low_rank_weight(*shape)
    wanted = ask(both.weight + both.left @ both.right)
    if name in PRODUCTS:  # and these never form it
        monkeypatch.setattr(LowRankWeight, "dense", lambda self: pytest.fail("the dense weight was formed"))
    torch.testing.assert_close(ask(both), wanted, rtol=1e-5, atol=1e-4)
    assert (both.shape, both.dtype, both.size(-1), both.ndim) == (shape, torch.float32, shape[-1], len(shape))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_of_transformers_compute_with_the_factors(implementation, monkeypatch):
    """Fails if transformers reads stacked experts in a way that forms the dense weight."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=11, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2, **sizes)
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    experts, ids = model.model.layers[0].mlp.experts, torch.tensor([[3, 4, 5, 6]])
    weights = {name: low_rank_weight(*experts.get_parameter(name).shape, r=4) for name in ("gate_up_proj", "down_proj")}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.weight, weight.left = weight.weight * 0.1, weight.left * 0.1
            experts.get_parameter(name).copy_(weight.dense())
        expected = model(ids).logits
        experts.__dict__.update(weights)  # found before the parameters of these names
        monkeypatch.setattr(LowRankWeight, "dense", lambda self: pytest.fail("the dense weight was formed"))
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
