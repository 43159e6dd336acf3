"""Losses and gradients of the Trainer, and settings that it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from helpers.tiny_training import PAD, tiny_data, tiny_llama, tiny_peft, tiny_tokenizer
from helpers.training_loop import bert, classes, masked, poisoned, train, with_poison
from lorakeet import files
from lorakeet.errors import OutputError, TrainingError
from lorakeet.train import evaluate
from lorakeet.train.guards import preflight
from lorakeet.train.trainer import Trainer

SHAPES = [(1, 16), (4, 4), (16, 1)]


def seq2seq(samples):
    """Return a batch of a T5 whose source and target are the sample itself."""
    batch = classes(samples)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def t5():
    set_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=PAD,
            decoder_start_token_id=PAD,
        )
    )


def span(samples):
    """Return a batch of a question answerer: starts and ends instead of labels, of one length, since it scores padding."""
    ids = torch.tensor([s["input_ids"] + [PAD] * (17 - len(s["input_ids"])) for s in samples])
    starts = torch.tensor([sum(s["input_ids"]) % 3 for s in samples])
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "start_positions": starts, "end_positions": starts}


MODELS = {
    "llama": lambda: (tiny_llama(initializer_range=0.3), None),
    "adapter": lambda: (tiny_peft(dropout=0.0, init_lora_weights=False), None),
    "bert masked lm": lambda: (bert(BertForMaskedLM), masked),
    "bert classifier": lambda: (bert(BertForSequenceClassification, num_labels=3), classes),
    "bert spans": lambda: (bert(BertForQuestionAnswering), span),
    "t5": lambda: (t5(), seq2seq),
}


@pytest.mark.parametrize("name", [*MODELS, "llama, smoothed", "bert classifier, smoothed"])
def test_loss_and_gradient_do_not_depend_on_accumulation(name, make_args, collator):
    name, _, smoothed = name.partition(", ")
    runs = {}
    for batch, accumulate in SHAPES:
        model, collate = MODELS[name]()
        args = make_args(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=2,
            max_grad_norm=0.0,
            label_smoothing_factor=0.1 if smoothed else 0.0,
        )
        runs[batch] = train(model, args, tiny_data(48), collate or collator)
    losses, grads, _ = runs[16]
    for batch in (1, 4):
        assert runs[batch][0] == pytest.approx(losses, abs=2e-5)
        for key, grad in grads[0].items():
            torch.testing.assert_close(
                runs[batch][1][0][key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_the_parent_is_wrong_for_a_model_that_ignores_the_count(make_args):
    """The reason for the subclass: the parent multiplies the gradient of this model by the number of micro-batches."""
    norms = []
    for batch, accumulate in [(16, 1), (4, 4)]:
        args = make_args(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1, max_grad_norm=0.0
        )
        model = bert(BertForSequenceClassification, num_labels=3)
        _, steps, _ = train(model, args, tiny_data(48), classes, transformers.Trainer)
        norms.append(float(torch.stack([g.norm() for g in steps[0].values()]).norm()))
    if norms[1] == pytest.approx(norms[0], rel=0.05):
        pytest.skip("this version of transformers handles it")
    model = bert(BertForSequenceClassification, num_labels=3)
    assert not train(model, args, tiny_data(48), classes)[2].model_accepts_loss_kwargs


@pytest.mark.parametrize("epochs", [False, True])
def test_equals_the_parent_on_a_language_model(make_args, collator, epochs):
    length = {"max_steps": -1, "num_train_epochs": 2} if epochs else {"max_steps": 6}
    ours, _, mine = train(tiny_peft(0.1), make_args(**length), tiny_data(27), collator)
    theirs, _, parent = train(tiny_peft(0.1), make_args(**length), tiny_data(27), collator, transformers.Trainer)
    assert ours == theirs
    assert mine.state.global_step == parent.state.global_step


def test_order_of_samples_is_a_function_of_the_seed_alone(make_args, collator):
    args = make_args(max_steps=3)
    first, _, _ = train(tiny_peft(0.0), args, tiny_data(), collator)
    trainer = Trainer(tiny_peft(0.0), args, train_dataset=tiny_data(), data_collator=collator)
    torch.manual_seed(99)  # another seed between construction and training
    trainer.train()
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == first
    other, _, _ = train(tiny_peft(0.0), make_args(max_steps=3, seed=4), tiny_data(), collator)
    assert other != first


def test_evaluation_is_per_token_and_leaves_training_alone(make_args, collator):
    held_out = tiny_data(11, seed=5)
    plain, _, _ = train(tiny_peft(0.3), make_args(), tiny_data(), collator)
    watched, _, trainer = train(
        tiny_peft(0.3), make_args(eval_strategy="steps", eval_steps=2), tiny_data(), collator, eval_dataset=held_out
    )
    assert watched == plain
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(measured) == 3
    found = evaluate.evaluate(trainer.model, held_out, collator, 3)
    assert measured[-1] == pytest.approx(found["loss"], abs=1e-6)
    assert trainer.evaluate()["eval_tokens"] == found["tokens"]
    assert trainer.evaluate({"a": held_out, "b": held_out})["eval_b_loss"] == pytest.approx(found["loss"], abs=1e-6)


def test_other_evaluations_stay_the_parents(make_args):
    model = bert(BertForSequenceClassification, num_labels=3)
    trainer = Trainer(
        model,
        make_args(eval_strategy="steps", eval_steps=3),
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(8),
        data_collator=classes,
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_right"] <= 1


def test_a_plain_transformers_model_and_collator(make_args, tmp_path):
    """The Trainer works without anything else of Lorakeet."""
    tokenizer = tiny_tokenizer()
    texts = Dataset.from_dict({"text": ["a green parrot sings </s>", "rain falls on the branch </s>"] * 16})
    data = texts.map(lambda batch: tokenizer(batch["text"]), batched=True)
    trainer = Trainer(
        model=tiny_llama(initializer_range=0.2),
        args=make_args(remove_unused_columns=True, max_steps=20, save_strategy="steps", save_steps=20),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2 and result.training_loss < losses[0]
    files = {path.name for path in (tmp_path / "out" / "checkpoint-20").iterdir()}
    assert {"model.safetensors", "tokenizer.json"} <= files and "training_args.bin" not in files


def test_a_micro_batch_without_targets_gives_zero_not_nan(make_args):
    def no_targets_for_short(samples):
        batch = masked(samples)
        if len(samples[0]["input_ids"]) < 10:
            batch["labels"].fill_(-100)
        return batch

    args = make_args(per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=2)
    losses, _, _ = train(bert(BertForMaskedLM), args, tiny_data(48), no_targets_for_short)
    assert all(loss > 0 for loss in losses)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_fp16_on_a_cpu_is_refused(make_args, collator):
    with pytest.raises(TrainingError, match="fp16 cannot train on a CPU"):
        Trainer(tiny_peft(), make_args(fp16=True), train_dataset=tiny_data(), data_collator=collator)
    with pytest.raises(TrainingError, match="fp16 cannot train on a CPU"):
        Trainer(tiny_llama().half(), make_args(), train_dataset=tiny_data(), data_collator=collator)


def test_bf16_trains(make_args, collator):
    losses, _, _ = train(tiny_peft(0.0), make_args(bf16=True, max_steps=2), tiny_data(), collator)
    plain, _, _ = train(tiny_peft(0.0), make_args(max_steps=2), tiny_data(), collator)
    assert losses == pytest.approx(plain, rel=0.01) and losses != plain


def test_a_parameter_without_gradient_is_named(make_args, collator):
    model = tiny_peft()
    model.model.layers[1].self_attn.q_proj.register_parameter("lora_lost", torch.nn.Parameter(torch.zeros(3)))
    trainer = Trainer(model, make_args(), train_dataset=tiny_data(), data_collator=collator)
    with pytest.raises(TrainingError, match=r"1 trainable parameters got no gradient.*layers\.1.*lora_lost"):
        trainer.train()


def test_a_parameter_without_gradient_in_a_plain_model_is_a_warning(make_args, collator, caplog):
    model = tiny_llama()
    model.register_parameter("lost", torch.nn.Parameter(torch.zeros(3)))
    Trainer(model, make_args(max_steps=1), train_dataset=tiny_data(), data_collator=collator).train()
    assert "got no gradient on the first step: lost" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_step_and_keeps_the_last_good_state(make_args, collator, tmp_path):
    args = make_args(train_sampling_strategy="sequential", max_steps=6, include_num_input_tokens_seen="non_padding")
    trainer = Trainer(
        poisoned(tiny_peft()),
        args,
        train_dataset=with_poison(21),
        data_collator=collator,
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)  # rows 16 to 23 are step 3, and 20 to 23 its second micro-batch
    assert "the loss of step 3 is not finite" in message and "micro-batch 2 of 2" in message
    assert (
        "micro-batch 1" not in message and "sample 1, train_dataset[21]:" in message and "non_finite='skip'" in message
    )
    folder = tmp_path / "out" / "checkpoint-2"
    assert str(folder) in message
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    good, _, reached = train(
        tiny_peft(), make_args(train_sampling_strategy="sequential", max_steps=6), with_poison(40), collator
    )
    # ... and resuming from it with non_finite="skip" equals the run that skipped
    skipped, _, passed_over = train(poisoned(tiny_peft()), args, with_poison(21), collator, non_finite="skip")
    resumed = Trainer(
        poisoned(tiny_peft()), args, train_dataset=with_poison(21), data_collator=collator, non_finite="skip"
    )
    resumed.train(resume_from_checkpoint=True)
    later = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert later == skipped and len(later) == 6
    assert skipped[:2] == good[:2] and skipped[3:] != good[3:]
    assert resumed.state.global_step == reached.state.global_step
    assert resumed.state.num_input_tokens_seen == passed_over.state.num_input_tokens_seen > 0


def test_a_skipped_step_changes_nothing(make_args, collator, caplog):
    args = make_args(train_sampling_strategy="sequential", max_steps=1)
    model = poisoned(tiny_peft(init_lora_weights=False))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, args, with_poison(0), collator, non_finite="skip")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert "step skipped: the loss of step 1 is not finite" in caplog.text


def test_a_gradient_that_is_not_finite_stops_too(make_args, collator):
    model = tiny_peft()
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    trainer = Trainer(model, make_args(max_grad_norm=0.0), train_dataset=tiny_data(), data_collator=collator)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match="gradient of step 1 is not finite"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_full_disk_is_noticed_before_the_first_step(make_args, collator, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    model = tiny_peft()
    args = make_args(save_strategy="steps", save_steps=2)
    with pytest.raises(OutputError, match="0 MB free, and .* will be written"):
        Trainer(model, args, train_dataset=tiny_data(), data_collator=collator).train()
    assert not any(p.grad is not None for p in model.parameters())


def test_evaluation_is_rehearsed_with_the_longest_samples(make_args):
    sizes = []

    class Collator:
        def __call__(self, samples):
            sizes.append([len(sample["input_ids"]) for sample in samples])
            raise MemoryError

    held_out = tiny_data(20, seed=5)
    args = make_args(eval_strategy="steps", eval_steps=3)
    with pytest.raises(TrainingError, match="memory ran out during the rehearsal of an evaluation"):
        Trainer(tiny_peft(), args, train_dataset=tiny_data(), eval_dataset=held_out, data_collator=Collator()).train()
    assert sizes == [sorted((len(row["input_ids"]) for row in held_out), reverse=True)[:4]]


def test_fsdp_that_is_not_applied_is_an_error(make_args, collator, monkeypatch):
    args = make_args()
    preflight.check_sharded(tiny_llama(), args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="FSDP is configured"):
        preflight.check_sharded(tiny_llama(), args)


def test_learning_rates_fall_linearly_after_the_warm_up(make_args, collator):
    _, _, trainer = train(tiny_peft(), make_args(max_steps=6, warmup_steps=2), tiny_data(), collator)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert [a - b for a, b in pairwise(rates[2:])] == pytest.approx([0.0025] * 3)
