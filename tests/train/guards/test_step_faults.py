"""Steps that must not count: what a run does with them, what it says, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.tiny_training import tiny_llama, tiny_peft, tiny_tokenizer
from helpers.training_loop import poisoned, spiking, train, with_poison, with_spike
from lorakeet.cli import main
from lorakeet.errors import TrainingError
from lorakeet.train.callbacks.step import MOST_SKIPPED
from lorakeet.train.trainer import Trainer

SPIKE_AT = 325  # in step 41, of 8 samples each


def arguments(make_args: Any, **changes: Any) -> Any:
    return make_args(**{"train_sampling_strategy": "sequential", "max_steps": 43, "learning_rate": 1e-3, **changes})


def fit(args: Any, collator: Any, resume: bool = False, **settings: Any) -> Trainer:
    model = spiking(tiny_peft())
    trainer = Trainer(model, args, train_dataset=with_spike(SPIKE_AT), data_collator=collator, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_spike_stops_the_run_and_skipping_it_goes_on(make_args: Any, collator: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(arguments(make_args), collator, processing_class=tiny_tokenizer())
    message = str(caught.value)
    assert "the loss of step 41 is a spike" in message and "--resume --on-spike skip" in message
    assert "micro-batch 2 of 2" in message and "micro-batch 1 of" not in message
    assert f"sample 1, train_dataset[{SPIKE_AT}]:" in message
    saved = tmp_path / "out" / "checkpoint-40"
    assert str(saved) in message and saved.is_dir()
    resumed = fit(arguments(make_args), collator, resume=True, spike="skip")
    whole = fit(arguments(make_args, output_dir=str(tmp_path / "whole")), collator, spike="skip")
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 43
    assert resumed.spikes.history == whole.spikes.history and len(whole.spikes.history["loss"]) == 42
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_spike_is_applied_with_a_warning(make_args: Any, collator: Any, caplog: Any) -> None:
    warned = fit(arguments(make_args), collator, spike="warn")
    assert "the loss of step 41 is a spike" in caplog.text and "skipped" not in caplog.text
    assert len(warned.spikes.history["loss"]) == 43


def test_the_guard_changes_no_bit_of_a_healthy_run(make_args: Any, collator: Any, monkeypatch: Any) -> None:
    def run() -> list[Any]:
        data = with_spike(SPIKE_AT).select(range(300))
        _, _, trainer = train(tiny_peft(0.1), arguments(make_args, max_steps=35), data, collator)
        return [losses(trainer), *(p.clone() for p in trainer.model.parameters())]

    guarded = run()
    monkeypatch.setattr("lorakeet.train.callbacks.step.find_fault", lambda *_: None)
    monkeypatch.setattr("lorakeet.train.guards.guarded_trainer.rehearse", lambda _: None)
    plain = run()
    assert guarded[0] == plain[0]
    assert all(torch.equal(mine, other) for mine, other in zip(guarded[1:], plain[1:], strict=True))


def test_a_run_that_only_skips_stops(make_args: Any, collator: Any, tmp_path: Path) -> None:
    model = tiny_peft(0.0)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match=f"{MOST_SKIPPED} steps in a row were skipped, the last because") as caught:
        train(model, arguments(make_args), with_poison(1), collator, non_finite="skip")
    assert "the model may be damaged" in str(caught.value)


def test_parameters_that_are_not_finite_are_no_good_state(make_args: Any, collator: Any, tmp_path: Path) -> None:
    model = poisoned(tiny_peft(0.0))

    class Damage(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer = Trainer(model, arguments(make_args), train_dataset=with_poison(40), data_collator=collator)
    trainer.add_callback(Damage())
    with pytest.raises(TrainingError, match="1 trainable parameters are not finite themselves: .*lora_A"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_the_last_good_state_is_finite(make_args: Any, collator: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        train(poisoned(tiny_peft()), arguments(make_args), with_poison(21), collator)
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("sampling", ["sequential", "random", "lengths"])
@pytest.mark.parametrize("at", [5, 47, 95])
def test_rows_are_named_in_every_order_and_epoch(sampling: str, at: int, make_args: Any, collator: Any) -> None:
    """48 samples are 6 steps of an epoch; the sample becomes poison in the second epoch where its number is above 48."""
    data = with_poison(at % 48)
    if sampling == "lengths":
        data = data.add_column("length", [len(ids) for ids in data["input_ids"]])
    order = "sequential" if sampling == "sequential" else "random"
    args = make_args(train_sampling_strategy=order, max_steps=12)
    model = tiny_peft(0.0)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
    begins = 6 if at >= 48 else 0

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == begins:
                poisoned(model)

    trainer.add_callback(Poison())
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    found = caught.value.message
    assert f"train_dataset[{at % 48}]" in found and found.count("train_dataset[") == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_names_lines_of_the_file_and_goes_on_with_skip(
    stream: bool, settings: Any, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    """The word `rain` has no finite vector; it stands in one line of the data."""
    base = tiny_llama(initializer_range=0.2)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        base.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("rain")] = float("nan")
    base.save_pretrained(tmp_path / "base")
    lines = [f"a bird sings the {word} song {word}" for word in ("green", "one", "parrot", "its") for _ in range(12)]
    lines[17] = "then the rain falls"
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = settings(data__eval_fraction=0.0, data__stream=stream, train__steps=6, train__save_minutes=0.0)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert main(["train", str(file)]) == 2
    told = capfd.readouterr().err
    assert f"{tmp_path}/texts.txt:18: 5 tokens, 'then the rain falls </s>'" in told
    assert "the last good state is in" in told and "--resume --on-nonfinite skip" in told
    assert main(["train", str(file), "--resume", "--on-nonfinite", "skip"]) == 0
    assert "step skipped: the loss of step" in caplog.text
