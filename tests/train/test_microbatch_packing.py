"""Micro-batches that share a pass: the same losses and gradients in fewer passes, only where that is exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.small_models import small
from helpers.task_runs import run_of
from helpers.tiny_training import PAD, tiny_data, tiny_llama, tiny_peft, tiny_tokenizer
from helpers.training_loop import Forget, bert, classes, learn, masked, poisoned, train, with_poison
from lorakeet.data.collate import PairsCollator
from lorakeet.errors import TrainingError
from lorakeet.patches.fused_loss import fused_loss
from lorakeet.patches.padding_free import padding_free
from lorakeet.runs.metrics_log import read_metrics
from lorakeet.tasks.task import Task
from lorakeet.train.evaluate import evaluate
from lorakeet.train.microbatch_packing import POSITIONS_PER_TOKEN, batches_per_pass, join_batches, sample_prefix
from lorakeet.train.run import run_training
from lorakeet.train.task_trainer import TaskTrainer
from lorakeet.train.trainer import Trainer

PLENTY = 10_000
SCARCE = 60  # tokens: two to four of the micro-batches below


def tags(samples: list[Any]) -> dict[str, Tensor]:
    """Return a batch of a tagger; some tokens have no tag."""
    batch = classes(samples)
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["input_ids"] % 5 == 0, -100)
    return batch


def several(samples: list[Any]) -> dict[str, Tensor]:
    """Return a batch with five binary labels per sample, as many as some batches have columns."""
    batch = classes(samples)
    batch["labels"] = torch.tensor([[float((sum(s["input_ids"]) + k) % 2) for k in range(5)] for s in samples])
    return batch


def numbers(samples: list[Any]) -> dict[str, Tensor]:
    """Return a batch of a regression."""
    return classes(samples) | {"labels": torch.tensor([len(s["input_ids"]) / 7 for s in samples])}


def left(samples: list[Any]) -> dict[str, Tensor]:
    """Return a batch of a language model, padded on the left."""
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.tensor([[PAD] * (longest - len(s["input_ids"])) + s["input_ids"] for s in samples])
    mask = torch.tensor([[0] * (longest - len(s["input_ids"])) + [1] * len(s["input_ids"]) for s in samples])
    labels = ids.masked_fill(
        mask.cumsum(1) <= 1, -100
    )  # the first token is no target: padding would have to predict it
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def llama_classifier() -> tf.PreTrainedModel:
    config = tiny_llama().config
    tf.set_seed(0)
    config.num_labels, config.initializer_range = 3, 0.3
    return tf.LlamaForSequenceClassification(config)


MULTI = {"num_labels": 5, "problem_type": "multi_label_classification"}
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (lambda: tiny_llama(initializer_range=0.3), None),
    "llama, padded on the left": (lambda: tiny_llama(initializer_range=0.3), left),
    "adapter": (lambda: tiny_peft(dropout=0.0, init_lora_weights=False), None),
    "gpt2": (lambda: small("gpt2"), None),
    "gemma3": (lambda: small("gemma3_text"), None),
    "bert gaps": (lambda: bert(tf.BertForMaskedLM), masked),
    "bert classes": (lambda: bert(tf.BertForSequenceClassification, num_labels=3), classes),
    "bert labels": (lambda: bert(tf.BertForSequenceClassification, **MULTI), several),
    "bert numbers": (lambda: bert(tf.BertForSequenceClassification, num_labels=1), numbers),
    "bert tags": (lambda: bert(tf.BertForTokenClassification, num_labels=3), tags),
    "llama classes": (llama_classifier, classes),
}


def assert_same_gradients(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for step, (mine, true) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == true.keys()
        whole = torch.stack([g.norm() for g in true.values()]).norm()
        for name, gradient in true.items():
            assert (mine[name] - gradient).norm() <= 1e-6 * (gradient.norm() + whole), (step, name)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_every_step_are_those_of_separate_passes(name, make_args, collator):
    make, collate = CASES[name]
    windows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "max_steps": -1}
    args = make_args(**windows, num_train_epochs=1, learning_rate=0.0, max_grad_norm=0.0)
    data = tiny_data(27)  # steps of 10, 10 and 7 samples, the last micro-batch of one
    losses, gradients, passes, trainer = learn(make(), args, data, collate or collator, None)
    assert [rows for rows, _ in passes] == [2] * 13 + [1]
    for budget in (PLENTY, SCARCE):
        found, mine, fewer, other = learn(make(), args, data, collate or collator, budget)
        assert found == pytest.approx(losses, rel=1e-6)
        assert_same_gradients(mine, gradients)
        ends = list(accumulate(rows for rows, _ in fewer))
        assert {10, 20, 27} <= set(ends)  # no pass has samples of two steps
        assert sum(tokens for _, tokens in fewer) == sum(tokens for _, tokens in passes)
        if budget == PLENTY:
            assert len(fewer) == 3
        else:
            assert 3 < len(fewer) < 14 and max(tokens for _, tokens in fewer) <= SCARCE
            assert len({rows for rows, _ in fewer}) > 2
        assert other.state.global_step == trainer.state.global_step == 3
        norms = [[line["grad_norm"] for line in t.state.log_history if "grad_norm" in line] for t in (trainer, other)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_ten_steps_are_those_of_the_plain_trainer(make_args, collator):
    args = make_args(max_steps=10, gradient_accumulation_steps=4, include_num_input_tokens_seen="non_padding")
    data = tiny_data(70)
    theirs, _, parent = train(tiny_llama(), args, data, collator, tf.Trainer)
    for budget in (PLENTY, 100):
        ours, _, passes, mine = learn(tiny_llama(), args, data, collator, budget)
        assert ours == pytest.approx(theirs, abs=1e-5) and len(passes) < 40
        assert mine.state.num_input_tokens_seen == parent.state.num_input_tokens_seen > 0
        rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (mine, parent)]
        assert rates[0] == rates[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_of_a_step_is_the_mean_over_its_targets(kind, make_args, collator):
    """The class name of GPT-2 has no loss type that tells that labels are shifted."""
    args = make_args(max_steps=1, gradient_accumulation_steps=4, train_sampling_strategy="sequential")
    data = tiny_data(16)
    expected = evaluate(small(kind), data, collator)["loss"]
    for budget in (PLENTY, None):
        assert learn(small(kind), args, data, collator, budget)[0] == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("rows", [1, 27, 30])
def test_an_evaluation_joins_its_batches_without_another_loss(rows, make_args, collator):
    """The last batch may be smaller than the others; no row is lost or counted twice."""
    data = tiny_data(rows)
    args = make_args(max_steps=1, per_device_eval_batch_size=4)
    found = []
    for budget in (None, SCARCE, PLENTY):
        model = small("llama")
        sizes: list[int] = []
        model.register_forward_pre_hook(
            lambda _m, _a, given, to=sizes: to.append(len(given["input_ids"])), with_kwargs=True
        )
        trainer = Trainer(
            model, args, train_dataset=data, eval_dataset=data, data_collator=collator, token_budget=budget
        )
        with padding_free(model), fused_loss(model):
            sizes.clear()
            figures = trainer.evaluate()
        found.append((figures["eval_loss"], figures["eval_perplexity"]))
        assert sum(sizes) == rows
        assert len(sizes) == (1 if budget == PLENTY else -(-rows // 4)) or (budget == SCARCE and 1 <= len(sizes) < 8)
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)


def test_half_precision(make_args, collator):
    args = make_args(bf16=True, max_steps=3)
    apart, _, _, _ = learn(tiny_peft(0.0), args, tiny_data(), collator, None)
    together, _, passes, _ = learn(tiny_peft(0.0), args, tiny_data(), collator, PLENTY)
    assert together == pytest.approx(apart, rel=2e-3) and len(passes) == 3


# ---- stopping, going on, what is not finite -------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(make_args, collator, tmp_path):
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 8}
    args = make_args(**settings, save_strategy="steps", save_steps=3)
    data = tiny_data(27)  # an epoch ends between two checkpoints
    losses, _, passes, whole = learn(tiny_peft(0.2), args, data, collator, SCARCE)
    kept = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    model, again = tiny_peft(0.2), []
    handle = model.register_forward_pre_hook(
        lambda m, _, given: again.append(len(given["input_ids"])) if m.training else None, with_kwargs=True
    )
    trainer = Trainer(
        model, args, train_dataset=data, data_collator=collator, token_budget=SCARCE, callbacks=[Forget(again)]
    )
    with padding_free(model), fused_loss(model):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    handle.remove()
    assert [line["loss"] for line in trainer.state.log_history if "loss" in line] == losses
    assert again == [rows for rows, _ in passes][-len(again) :] and len(again) < len(passes)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    other = Trainer(tiny_peft(0.2), args, train_dataset=data, data_collator=collator, token_budget=PLENTY)
    with pytest.raises(TrainingError, match="token_budget was 60, is 10000"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_an_interrupted_step_leaves_no_batches_for_the_next(make_args, collator):
    class Stop(tf.TrainerCallback):
        def on_substep_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step == 1 and not broken_off
            if control.should_epoch_stop:
                broken_off.append(state.global_step)

    broken_off: list[int] = []
    args = make_args(gradient_accumulation_steps=4, max_steps=4)  # three steps an epoch
    model, rows = tiny_peft(0.0), []
    model.register_forward_pre_hook(
        lambda m, _, given: rows.append(len(given["input_ids"])) if m.training else None, with_kwargs=True
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=tiny_data(48),
        data_collator=collator,
        token_budget=PLENTY,
        callbacks=[Stop(), Forget(rows)],
    )
    with padding_free(model), fused_loss(model):
        trainer.train()
    assert rows == [16] * 4 and trainer.state.global_step == 4 and broken_off


def test_samples_whose_loss_is_not_finite_are_named(make_args, collator, tmp_path):
    args = make_args(train_sampling_strategy="sequential", gradient_accumulation_steps=4, per_device_train_batch_size=2)
    with pytest.raises(TrainingError) as caught:
        learn(poisoned(tiny_peft()), args, with_poison(21), collator, PLENTY, processing_class=tiny_tokenizer())
    message = str(caught.value)  # rows 16 to 23 are step 3, and 20 and 21 its third micro-batch
    assert "the loss of step 3 is not finite" in message and "micro-batch 3 of 4, loss nan" in message
    assert "sample 1, train_dataset[21]:" in message and all(f"micro-batch {i} of" not in message for i in (1, 2, 4))
    assert str(tmp_path / "out" / "checkpoint-2") in message
    skipped, _, passes, trainer = learn(
        poisoned(tiny_peft()), args, with_poison(21), collator, PLENTY, non_finite="skip"
    )
    assert len(skipped) == trainer.state.global_step == 6
    assert [rows for rows, _ in passes] == [8, 8, 8, 2, 2, 2, 2, 8, 8, 8]  # the third step was run again, one by one


def test_a_gradient_that_is_not_finite_shows_all_samples(make_args, collator):
    model = tiny_peft(0.0)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    args = make_args(gradient_accumulation_steps=3, train_sampling_strategy="sequential")
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite") as caught:
        learn(model, args, tiny_data(), collator, PLENTY)
    apart = tiny_peft(0.0)
    next(p for p in apart.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError) as expected:
        learn(apart, args, tiny_data(), collator, None)
    found, true = (
        [float(x) for x in re.findall(r"micro-batch . of 3, loss (.*):", str(e.value))] for e in (caught, expected)
    )
    assert len(found) == 3 and found == pytest.approx(true, rel=1e-5)


# ---- where it would not be exact ------------------------------------------------------------------------------------


class Contrast(nn.Module):
    """Encoder whose loss compares the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert(tf.BertModel)

    @property
    def config(self) -> Any:
        return self.encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        vectors = self.encoder(input_ids, attention_mask).last_hidden_state[:, 0]
        scores = vectors @ vectors.T
        return {"loss": nn.functional.cross_entropy(scores, torch.arange(len(scores))), "scores": scores}


def summed() -> nn.Module:
    """Return a language model whose loss is divided by samples instead of targets."""
    model: Any = bert(tf.BertForTokenClassification, num_labels=3)
    own = model.forward

    def forward(**given: Any) -> Any:
        output = own(**given)
        output.loss = output.loss * given["labels"].ne(-100).sum() / len(given["labels"])
        return output

    model.forward = forward
    return model


def unknown_column(samples: list[Any]) -> dict[str, Tensor]:
    batch = classes(samples)
    return batch | {"inputs_embeds": torch.zeros(*batch["input_ids"].shape, 16)}


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "contrastive": (Contrast, classes, {}, "is not the mean of their losses"),
    "summed": (summed, tags, {}, "is not the mean of their losses"),
    "smoothed": (CASES["llama"][0], None, {"label_smoothing_factor": 0.1}, "not the model's own"),
    "noise": (CASES["llama"][0], None, {"neftune_noise_alpha": 5.0}, "NEFTune"),
    "experts": (lambda: small("mixtral", output_router_logits=True), None, {}, "balance of its experts"),
    "no padding token": (
        lambda: without_padding_token(),
        classes,
        {"per_device_train_batch_size": 1},
        "cannot be joined",
    ),
}


def without_padding_token() -> nn.Module:
    model = llama_classifier()
    model.config.pad_token_id = None
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_cannot_be_joined_exactly_runs_one_by_one_with_a_message(name, make_args, collator, caplog):
    make, collate, changes, reason = REFUSED[name]
    caplog.set_level("INFO", logger="lorakeet")
    args = make_args(**{"gradient_accumulation_steps": 3, "max_steps": 2, **changes})
    losses, _, passes, _ = learn(make(), args, tiny_data(), collate or collator, PLENTY)
    assert len(passes) == 6 and reason in caplog.text and caplog.text.count("passes     ") == 1
    assert learn(make(), args, tiny_data(), collate or collator, None)[0] == losses


@pytest.mark.parametrize("without", ["padding_free", "fused_loss"])
def test_outside_of_the_fast_paths(without, make_args, collator, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    model, args = tiny_llama(), make_args(max_steps=2)
    with ExitStack() as stack:
        stack.enter_context(fused_loss(model) if without == "padding_free" else padding_free(model))
        found, _, _ = train(model, args, tiny_data(), collator, token_budget=PLENTY)
        reason = "padding is computed" if without == "padding_free" else "logits are computed whole"
        assert reason in caplog.text
    with ExitStack() as stack:
        other = tiny_llama()
        stack.enter_context(fused_loss(other) if without == "padding_free" else padding_free(other))
        assert train(other, args, tiny_data(), collator)[0] == found


def test_unknown_columns(make_args, caplog):
    caplog.set_level("INFO", logger="lorakeet")

    class Extra(tf.BertForSequenceClassification):
        def forward(self, *args: Any, inputs_embeds: Any = None, **given: Any) -> Any:
            return super().forward(*args, **given)

    args = make_args(max_steps=2)
    _, _, passes, _ = learn(bert(Extra, num_labels=3), args, tiny_data(), unknown_column, PLENTY)
    assert len(passes) == 4 and "inputs_embeds cannot be joined" in caplog.text


def test_pairs_never_share_a_pass(make_args, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    rows = tiny_data(48)["input_ids"]
    pairs = Dataset.from_list([{"input_ids": a, "positive_ids": b} for a, b in zip(rows[::2], rows[1::2], strict=True)])
    found = []
    for budget in (PLENTY, None):
        model = bert(tf.BertModel)
        with padding_free(model):
            losses, _, _ = train(
                model, make_args(max_steps=3), pairs, PairsCollator(PAD), TaskTrainer,
                task=Task("FEATURE_EXTRACTION"), token_budget=budget,
            )  # fmt: skip
        found.append(losses)
    assert found[0] == found[1] and "the loss of a pair depends on the others" in caplog.text


# ---- the parts ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5), st.integers(1, 50)), max_size=12),
    st.integers(1, 120),
)
def test_a_pass_holds_as_much_as_its_budget_allows(sizes, budget):
    counts = batches_per_pass(sizes, budget)
    assert sum(counts) == len(sizes) and all(counts)
    ends = list(accumulate(counts))

    def fits(some: list[tuple[int, int, int]]) -> bool:
        tokens, rows, columns = (list(values) for values in zip(*some, strict=True))
        return sum(tokens) <= budget and sum(rows) * max(columns) <= POSITIONS_PER_TOKEN * budget

    for count, end in zip(counts, ends, strict=True):
        inside = sizes[end - count : end]
        assert count == 1 or fits(inside)
        assert end == len(sizes) or not fits([*inside, sizes[end]])


def test_the_prefix_of_a_sample_keeps_all_of_its_labels():
    ids = torch.arange(18).view(2, 9)
    mask = torch.ones(2, 9).long()
    mask[1, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask.flip(0), "labels": torch.ones(2, 9)}
    little = sample_prefix(batch, 4)
    assert little["input_ids"].tolist() == [[9, 10, 11, 12]] and little["labels"].shape == (1, 9)
    tokens = sample_prefix(batch | {"labels": ids - 10}, 4)
    assert tokens["labels"].tolist() == [[0, 0, 1, 2]]
    assert sample_prefix(batch | {"attention_mask": mask}, 4)["input_ids"].tolist() == [[0, 1, 2, 3]]


def test_joined_batches_keep_positions_and_pad_each_column_with_its_value():
    ids = [torch.tensor([[7, 8, 9], [5, 6, 0]]), torch.tensor([[0, 4]])]
    masks = [torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[0, 1]])]
    batches = [
        {"input_ids": i, "attention_mask": m, "labels": i, "token_type_ids": m, "shift_labels": i}
        for i, m in zip(ids, masks, strict=True)
    ]
    made = join_batches(batches, pad_token_id=3)
    assert made["input_ids"].tolist() == [[7, 8, 9], [5, 6, 0], [0, 4, 3]]
    assert made["attention_mask"].tolist() == made["token_type_ids"].tolist() == [[1, 1, 1], [1, 1, 0], [0, 1, 0]]
    assert made["labels"].tolist() == made["shift_labels"].tolist() == [[7, 8, 9], [5, 6, 0], [0, 4, -100]]
    fractions = [b | {"labels": torch.ones(i.shape)[:, :2]} for b, i in zip(batches, ids, strict=True)]
    assert join_batches(fractions, 3)["labels"].shape == (3, 2)


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, rows", [("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
def test_a_run_logs_what_it_joins_and_has_the_same_losses(kind, rows, tmp_path: Path, caplog):
    caplog.set_level("INFO", logger="lorakeet")
    lines, weights = [], []
    for budget in (None, 0):  # left out: a micro-batch of four samples of 512 tokens
        folder = tmp_path / str(budget)
        folder.mkdir()
        settings = {"train__batch_size": 4, "train__grad_accum": 4, "train__steps": 4, "train__token_budget": budget}
        config = run_of(folder, kind, rows, **settings)
        run_training(config)
        lines.append(read_metrics(Path(config.out) / "metrics.jsonl"))
        weights.append(load_file(Path(config.out) / "adapter" / "adapter_model.safetensors"))
        assert caplog.text.count("passes     the 4 micro-batches of a step run as one, up to 768 tokens") == 1
    for mine, true in zip(*lines, strict=True):
        assert mine.keys() == true.keys() and mine.get("tokens") == true.get("tokens")
        for key in {"loss", "grad_norm", "eval_loss"} & true.keys():
            assert mine[key] == pytest.approx(true[key], rel=1e-4)
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-4)
