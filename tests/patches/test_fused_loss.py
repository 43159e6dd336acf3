"""The loss without logits equals the model's own loss and gradients, for every type of head."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from helpers.small_models import adapted, assert_same, ragged, small
from lorakeet.adapter.peft_model import get_peft_model
from lorakeet.kernels import linear_cross_entropy as kernel
from lorakeet.lora.config import LoraConfig
from lorakeet.patches.causal_loss import sample_losses
from lorakeet.patches.fused_loss import fused_loss, fused_sample_losses, why_not_fused
from lorakeet.patches.padding_free import padding_free
from lorakeet.train.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "modernbert": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "stablelm": {},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 61 * 7)
    monkeypatch.setattr(kernel, "MIN_ROWS", 1)


def bloom() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4))


def language_model(kind: str, **changes: Any) -> tf.PreTrainedModel:
    return bloom() if kind == "bloom" else small(kind, **KINDS[kind] | changes)


def labelled() -> dict[str, Tensor]:
    """Return a ragged batch; padding, a prompt and a whole row have no targets."""
    batch = ragged()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :4] = labels[4] = -100
    return batch | {"labels": labels}


def outcome(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch)
    (output.loss * 3).backward()
    learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), **learned}


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
@pytest.mark.parametrize("count", [None, 50, torch.tensor(7)])
def test_loss_and_gradients_are_the_models_own(kind: str, count: Any) -> None:
    model = adapted(language_model(kind)).train()
    assert why_not_fused(model) is None
    batch = labelled() | ({} if count is None else {"num_items_in_batch": count})
    expected = outcome(model, batch)
    with fused_loss(model):
        assert model(**batch).get("logits") is None
        assert_same(outcome(model, batch), expected)
    assert model(**batch).logits.shape[-1] == 61
    assert_same(outcome(model, batch), expected, 0.0)


@pytest.mark.parametrize(
    "kind",
    ["albert", "bert", "camembert", "data2vec-text", "deberta-v2", "distilbert", "electra", "ernie", "eurobert"]
    + ["modernbert", "mpnet", "nomic_bert", "roberta", "roberta-prelayernorm", "xlm-roberta"],
)
def test_masked_language_models(kind: str) -> None:
    attention = "eager" if kind in ("albert", "deberta-v2", "mpnet") else None
    model = adapted(small(kind, attention=attention)).train()
    assert why_not_fused(model) is None
    expected = outcome(model, labelled())
    with fused_loss(model):
        assert model(**labelled()).get("logits") is None
        assert_same(outcome(model, labelled()), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("learns", ["adapter", "whole"])
def test_trainable_heads(kind: str, tied: bool, learns: str) -> None:
    model: Any = language_model(kind, tie_word_embeddings=tied)
    if learns == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.train()
    expected = outcome(model, labelled())
    with fused_loss(model):
        found = outcome(model, labelled())
    assert any("head" in name or tied for name in expected)
    assert_same(found, expected)


def test_together_with_layers_that_compute_no_padding_and_checkpointing() -> None:
    for kind in ("llama", "gemma2", "opt"):
        model = adapted(language_model(kind)).train()
        expected = outcome(model, labelled())
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        with padding_free(model), fused_loss(model):
            assert_same(outcome(model, labelled()), expected)


def test_without_targets_the_loss_is_a_zero_that_is_part_of_the_graph() -> None:
    model = adapted(language_model("llama")).train()
    batch = labelled()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with fused_loss(model):
        for count in (None, 5):
            found = outcome(model, batch if count is None else batch | {"num_items_in_batch": count})
            expected = {name for name, p in model.named_parameters() if p.requires_grad}
            assert found.pop("loss") == 0.0 and found.keys() == expected
            assert not any(gradient.any() for gradient in found.values())


def test_the_trainer_takes_a_micro_batch_without_targets(tmp_path: Path) -> None:
    """A mean over no targets is 0/0; without logits no other output depends on the trainable parameters."""
    model = adapted(language_model("modernbert")).train()
    trainer = Trainer(model, tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.model_accepts_loss_kwargs = False
    trainer.current_gradient_accumulation_steps = 2
    batch = labelled()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for context in (nullcontext(), fused_loss(model)):
        model.zero_grad()
        with context:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=5)
            assert loss == 0.0
            loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_labels_that_are_shifted_already() -> None:
    model = adapted(language_model("llama")).train()
    batch = labelled()
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].roll(1, 0)
    batch |= {"labels": shifted, "shift_labels": shifted}
    expected = outcome(model, batch)
    with fused_loss(model):
        assert_same(outcome(model, batch), expected)


def test_callers_that_need_logits_get_them() -> None:
    model = language_model("llama")
    with fused_loss(model):
        assert model(**labelled()).logits is not None  # evaluation mode
        model.train()
        assert model(**ragged()).logits is not None
        assert len(model(**labelled(), return_dict=False)) > 1
        assert "labels" in __import__("inspect").signature(model.forward).parameters
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    assert not hasattr(model, "_loss_function")


class Shouting(tf.LlamaForCausalLM):
    """Changes its logits in a way that no configuration describes."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = tf.LlamaForCausalLM.forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


def test_unknown_changes_of_the_logits_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = Shouting(language_model("llama").config).train()
    expected = outcome(model, labelled())
    with caplog.at_level("INFO", logger="lorakeet"), fused_loss(model):
        for _ in range(2):
            assert_same(outcome(model, labelled()), expected, 0.0)
    assert caplog.text.count("changes them in a way") == 1


def test_models_with_another_loss_are_unchanged() -> None:
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=61, d_model=32, num_layers=1, d_ff=8, decoder_start_token_id=0)
    )
    classifier = small("llama", head="class")
    own = language_model("llama")
    own.loss_function = lambda logits, labels, **_: logits.sum()
    reasons = {"inside its forward": t5, "no language-modelling head": classifier, "of its own": own}
    for reason, model in reasons.items():
        assert reason in str(why_not_fused(model))
    assert why_not_fused(nn.Linear(2, 2)) is not None
    for model in (t5, own):
        model.eval().train()
        torch.manual_seed(1)
        expected = model(**labelled()).loss
        with fused_loss(model):
            torch.manual_seed(1)
            assert torch.equal(model(**labelled()).loss, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "bloom"])
def test_losses_of_samples_without_logits(kind: str) -> None:
    model = adapted(language_model(kind)).eval()
    batch = labelled()
    expected, counts = sample_losses(model, batch)
    found, found_counts = fused_sample_losses(model, batch)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found_counts, counts)
    shifted = batch["labels"].roll(-1, 1)
    moved = {name: value for name, value in batch.items() if name != "labels"} | {"shift_labels": shifted}
    torch.testing.assert_close(fused_sample_losses(model, moved)[0], sample_losses(model, moved)[0].detach())


def test_an_error_restores_the_model() -> None:
    model = language_model("llama").train()
    with pytest.raises(IndexError), fused_loss(model):
        model(input_ids=torch.tensor([[99]]), labels=torch.tensor([[1]]))
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    assert not hasattr(model, "_loss_function")


@pytest.mark.parametrize("change", ["none", "hook", "forward", "bias"])
def test_only_a_plain_head_is_one_call_of_c(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else happens in a head must happen: it is then called."""
    model = language_model("llama").requires_grad_(False)
    head, called = model.get_output_embeddings(), []
    if change == "hook":
        head.register_forward_hook(lambda *_: called.append(1))
    elif change == "forward":
        own = head.forward
        head.forward = lambda x: called.append(1) or own(x)
    elif change == "bias":
        head.bias = nn.Parameter(torch.ones(61), requires_grad=False)
    found: list[Tensor | None] = []
    real = kernel.linear_cross_entropy

    def spy(*given: Any) -> Tensor:
        found.append(given[5])
        return real(*given)

    monkeypatch.setattr("lorakeet.patches.fused_loss.linear_cross_entropy", spy)
    with fused_loss(model.train()):
        model(**labelled())
    assert len(found) == 1 and (found[0] is head.weight if change == "none" else found[0] is None)
    assert bool(called) == (change in ("hook", "forward"))
