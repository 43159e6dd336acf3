"""Layers without padding equal the padded model, for every architecture in the list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from helpers.small_models import (
    _SMALL,
    COLUMNS,
    LENGTHS,
    ROWS,
    TOTAL,
    adapted,
    assert_same,
    outcome,
    ragged,
    small,
)
from lorakeet.errors import TrainingError
from lorakeet.kernels.attention.segment import segment_attention
from lorakeet.patches.padding_free import PROVEN, padding_free, why_padded


def rows_computed(model: nn.Module) -> tuple[list[int], Callable[[], None]]:
    """Count the rows of each linear layer; return the counts and a function that stops counting."""
    seen: list[int] = []
    inside = [m for layers in model.modules() if isinstance(layers, nn.ModuleList) for m in layers.modules()]
    leaves = {m for m in inside if type(m).__name__ in ("Linear", "Conv1D") and m.weight.shape.numel() > 256}
    handles = [m.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel())) for m in leaves]
    return seen, lambda: [handle.remove() for handle in handles] and None


@pytest.mark.parametrize("kind", sorted(PROVEN))
def test_outputs_and_gradients_are_those_of_the_padded_model(kind: str) -> None:
    model = adapted(small(kind))
    for batch in (ragged(), ragged(left=True), ragged(lengths=[COLUMNS] * 2)):
        expected = outcome(model, batch)
        with padding_free(model):
            found = outcome(model, batch)
        assert_same(found, expected, 2e-5)  # in BERT both are 8e-5 from the gradient in fp64, to either side
        assert_same(outcome(model, batch), expected, 0.0)  # restored afterwards


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "gemma3_text", "llama", "modernbert", "opt"])
def test_layers_get_the_real_positions_and_nothing_else(kind: str) -> None:
    model = adapted(small(kind))
    seen, stop = rows_computed(model)
    model(**ragged())
    assert set(seen) == {ROWS * COLUMNS}
    padded = len(seen)
    seen.clear()
    with padding_free(model):
        outcome(model, ragged())
    stop()
    assert set(seen) == {TOTAL} and len(seen) == padded


def test_rows_without_padding_are_packed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small("llama"), []

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *rest: Any) -> Tensor:
        seen.append(lengths)
        return segment_attention(q, k, v, lengths, *rest)

    monkeypatch.setattr("lorakeet.patches.padding_free.segment_attention", attention)
    with padding_free(model):
        model(**ragged(lengths=[5, 5]))
    assert seen == [(5, 5)] * model.config.num_hidden_layers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "gemma2", "gemma3_text", "gpt2", "llama", "opt"])
def test_gradient_checkpointing_inside_the_context(kind: str, reentrant: bool) -> None:
    model = adapted(small(kind))
    expected = outcome(model, ragged())
    model.train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen, stop = rows_computed(model)
    with padding_free(model):
        found = outcome(model, ragged())
    stop()
    assert_same(found, expected)
    assert set(seen) == {TOTAL}


def test_further_forward_passes_before_the_backward_pass() -> None:
    model = adapted(small("llama")).train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [ragged(), ragged(left=True, lengths=[3, 8], seed=2), ragged(lengths=[5, 5, 5], seed=3)]

    def gradients(context: Any) -> dict[str, Tensor]:
        model.zero_grad()
        with context:
            losses = [model(**b).logits[b["attention_mask"].bool()].square().mean() for b in batches]
            sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(torch.enable_grad())
    assert_same(gradients(padding_free(model)), expected)


def test_a_sample_never_sees_another() -> None:
    model = small("llama")
    batch = ragged()
    with padding_free(model), torch.no_grad():
        together = model(**batch).logits
        batch["input_ids"][0, 0] = 2 + (batch["input_ids"][0, 0] + 1) % 59
        changed = model(**batch).logits
        alone = [model(input_ids=batch["input_ids"][i : i + 1, :n]).logits[0] for i, n in enumerate(LENGTHS)]
    assert not torch.equal(changed[0], together[0]) and torch.equal(changed[1:], together[1:])
    for row, n, expected in zip(changed, LENGTHS, alone, strict=True):
        torch.testing.assert_close(row[:n], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "gemma2"])
def test_dropout_of_attention_weights(kind: str) -> None:
    changes = {"attention_probs_dropout_prob": 0.3} if kind == "bert" else {"attention_dropout": 0.3}
    model = small(kind, **changes).train()

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with padding_free(model), torch.no_grad():
            return model(**ragged()).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2))
    mean = torch.stack([logits(seed) for seed in range(60)]).mean(0)
    model.eval()
    assert (mean - logits(0)).abs().mean() < 0.35 * (logits(1) - logits(2)).abs().mean() + 0.05


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "qwen3"])
def test_classifiers_with_their_loss(kind: str) -> None:
    model = adapted(small(kind, head="class", num_labels=3))
    batch = ragged() | {"labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    expected = model(**batch).loss
    with padding_free(model):
        assert_same(outcome(model, ragged()), outcome_outside(model))
        torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def outcome_outside(model: nn.Module) -> dict[str, Tensor]:
    """Return the outcome of a pass that is not packed, because it returns hidden states."""
    return outcome(model, ragged(), output_hidden_states=True)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_empty_rows_and_rows_of_one(kind: str) -> None:
    model = adapted(small(kind))
    for lengths in ([0, 5, 1, 0], [6, 0], [1, 1, 2]):
        batch = ragged(lengths=lengths)
        expected = outcome(model, batch)
        with padding_free(model):
            assert_same(outcome(model, batch), expected)
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"] * 0)  # no real position


def test_gaps_between_real_positions_are_computed() -> None:
    holes = ragged()
    holes["attention_mask"][3, 5] = holes["attention_mask"][0, :2] = 0
    model = adapted(small("mistral"))  # its window counts positions, real or not
    expected = outcome(model, holes)
    with padding_free(model):
        assert_same(outcome(model, holes), expected, 0.0)


def test_outputs_that_a_packed_row_does_not_have_come_from_the_padded_model() -> None:
    model = small("llama", attention="eager")
    batch, full = ragged(), {"input_ids": ragged()["input_ids"]}
    wanted: list[dict[str, Any]] = [
        batch | {"output_hidden_states": True},
        batch | {"output_attentions": True},
        batch | {"use_cache": True},
        full,
    ]
    for given in wanted:
        expected = model(**given)
        with padding_free(model):
            found = model(**given)
        assert torch.equal(found.logits, expected.logits)
        for name in ("hidden_states", "attentions"):
            assert (found.get(name) is None) == (expected.get(name) is None)
            assert all(map(torch.equal, found.get(name) or (), expected.get(name) or ()))
    with padding_free(model):
        assert model(**batch).past_key_values is None
        cached = model(**batch, use_cache=True).past_key_values
        assert cached.get_seq_length() == COLUMNS


def test_generating_inside_the_context() -> None:
    model = small("llama")
    batch = ragged(left=True)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**batch, **settings)
    with padding_free(model):
        assert torch.equal(model.generate(**batch, **settings), expected)


def test_the_model_is_restored_also_after_an_error() -> None:
    model = small("llama")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(IndexError), padding_free(model):
        assert "lorakeet" not in str(model.config.to_dict())
        model(input_ids=torch.tensor([[3, 99], [1, 1]]), attention_mask=torch.tensor([[1, 1], [1, 0]]))
    assert model.config._attn_implementation == "sdpa"
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_under_autocast() -> None:
    model = adapted(small("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model, ragged())
        with padding_free(model):
            found = outcome(model, ragged())
    assert_same(found, expected, 0.05)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=61, d_model=32, num_layers=1, d_ff=8)),
            "2 stacks",
        ),
        (
            lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)),
            "bloom is not",
        ),
        (lambda: tf.MPNetForMaskedLM(tf.MPNetConfig(**_SMALL)), "mpnet has no stack"),
        (lambda: small("opt", layerdrop=0.1), "layerdrop 0.1"),
        (lambda: small("bert", chunk_size_feed_forward=2), "chunks of 2"),
        (lambda: small("gpt2", add_cross_attention=True), "another row"),
        (lambda: small("bert", position_embedding_type="relative_key"), "relative_key"),
        (lambda: small("gemma3_text", use_bidirectional_attention=True), "both ways"),
        (lambda: small("gpt2", reorder_and_upcast_attn=True), "its own order"),
        (lambda: small("gemma2", attention="sdpa"), "soft-cap"),
        (lambda: nn.Linear(2, 2), "no stack"),
    ],
)
def test_models_that_need_padding_are_refused_with_the_reason(model: Callable[[], nn.Module], reason: str) -> None:
    made = model()
    assert reason in str(why_padded(made))
    with pytest.raises(TrainingError, match=reason), padding_free(made):
        pass
