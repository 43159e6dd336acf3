"""Checkpoints: a resumed run equals the uninterrupted one bit for bit; complete or absent; refused by other runs."""

from __future__ import annotations

import contextlib
import json
import shutil

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft, tiny_tokenizer
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import TrainingError
from lorakeet.train.checkpoints import fingerprint, manifest, resumable
from lorakeet.train.checkpoints.steady_collator import SteadyCollator
from lorakeet.train.trainer import Trainer

ADALORA = {"target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 3}


class Killed(BaseException):
    """Stands for a killed process: no handler may clean up after it."""


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:  # in the middle of the next step
            raise Killed

    on_step_begin = on_substep_end


def run(args, data=None, kill_after=None, resume=None, make=tiny_peft, collator=None, **more):
    callbacks = [] if kill_after is None else [KillAfter(kill_after)]
    trainer = Trainer(
        make(), args, train_dataset=data or tiny_data(27), data_collator=collator, callbacks=callbacks, **more
    )
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer):
    kept = ("loss", "grad_norm", "learning_rate", "epoch", "step", "train_loss", "eval_loss")
    return [{key: entry[key] for key in kept if key in entry} for entry in trainer.state.log_history]


def adapter_bytes(trainer, folder):
    trainer.save_model(str(folder))
    files = list(folder.glob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("make", "logging", "kill", "save"),
    [
        (lambda: tiny_peft(dropout=0.3), 1, 5, 5),
        (lambda: tiny_peft(dropout=0.3), 3, 5, 2),  # the checkpoint of step 4 is between two lines of the log
        (lambda: tiny_peft(dropout=0.3), 4, 4, 4),  # an epoch has 4 steps: exactly at its end
        (lambda: tiny_llama(attention_dropout=0.3), 1, 5, 5),  # all weights, no adapter
        (lambda: tiny_peft(dropout=0.3, r=4, adalora_config=ADALORA), 1, 5, 5),
        (lambda: tiny_peft(dropout=0.3, r=4, adalora_config=ADALORA), 1, 8, 8),  # the ranks are chosen
    ],
    ids=["mid epoch", "between logs", "epoch boundary", "whole model", "AdaLoRA", "AdaLoRA at its end"],
)
def test_resumed_equals_uninterrupted(make, logging, kill, save, make_args, collator, tmp_path):
    def args(name, **changes):
        return make_args(
            output_dir=str(tmp_path / name),
            max_steps=10,
            logging_steps=logging,
            eval_strategy="steps",
            eval_steps=4,
            include_num_input_tokens_seen="non_padding",
            **changes,
        )

    more = {"make": make, "collator": collator, "eval_dataset": tiny_data(6, seed=9)}
    whole = run(args("whole"), **more)
    killed = run(args("parts", save_strategy="steps", save_steps=save), kill_after=kill, **more)
    assert killed.state.global_step == kill
    resumed = run(args("parts", save_strategy="steps", save_steps=save), resume=True, **more)
    assert history(resumed) == history(whole)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert adapter_bytes(resumed, tmp_path / "b") == adapter_bytes(whole, tmp_path / "a")


def test_a_random_collator_draws_the_same_masks_when_resumed(make_args, tmp_path):
    def parts(name, **changes):
        args = make_args(output_dir=str(tmp_path / name), max_steps=8, save_strategy="steps", save_steps=3)
        tokenizer = tiny_tokenizer()
        tokenizer.mask_token = "<unk>"
        return run(args, collator=DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.4), **changes)

    whole = parts("whole")
    parts("parts", kill_after=5)
    assert history(parts("parts", resume=True)) == history(whole)
    assert len({entry["loss"] for entry in whole.state.log_history if "loss" in entry}) == 8


def test_a_random_collator_draws_new_masks_in_each_epoch():
    steady = SteadyCollator(lambda samples: torch.rand(3).tolist(), seed=1)
    first, other = steady([1]), steady([2])
    assert steady([1]) == first != other
    steady.epoch = 1
    assert steady([1]) != first
    before = torch.rand(1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    steady([1])
    assert torch.equal(torch.rand(1), expected) and before is not None


def test_the_trainer_sets_the_epoch_of_its_collator(make_args, collator):
    drawn = []

    def at_random(samples):
        drawn.append(float(torch.rand(1)))
        return collator(samples)

    run(make_args(train_sampling_strategy="sequential", max_steps=8), data=tiny_data(32), collator=at_random)
    del drawn[:2]  # the rehearsal
    assert len(drawn) == len(set(drawn)) == 16  # two passes over eight batches


def saved(make_args, collator, **changes):
    args = make_args(save_strategy="steps", save_steps=2, max_steps=4)
    run(args, collator=collator, **changes)
    return args


def test_checkpoints_hold_the_adapter_alone(make_args, collator, tmp_path):
    saved(make_args, collator, processing_class=tiny_tokenizer())
    folder = tmp_path / "out" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "optimizer.safetensors"} <= names
    assert not any(name.startswith("model") or name.endswith((".bin", ".pt", ".pth")) for name in names)
    assert (folder / "adapter_model.safetensors").stat().st_size < 20_000
    again = PeftModel.from_pretrained(tiny_llama(), folder)
    assert any(p.any() for name, p in again.named_parameters() if "lora_B" in name)


def test_old_checkpoints_are_deleted_and_the_best_is_kept(make_args, collator, tmp_path):
    args = make_args(
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=8,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=0.5,  # high enough that the first checkpoint is the best
    )
    trainer = run(args, collator=collator, eval_dataset=tiny_data(6, seed=9))
    best = trainer.state.best_model_checkpoint
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert (
        best == str(tmp_path / "out" / f"checkpoint-{min(losses, key=losses.get)}") and min(losses, key=losses.get) < 8
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize("at", ["model", "optimizer", "state", "manifest"])
def test_killed_while_writing_leaves_no_checkpoint(at, make_args, collator, tmp_path, monkeypatch):
    places = {
        "model": (Trainer, "_save"),
        "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
        "state": (Trainer, "_export_callbacks"),
        "manifest": (resumable, "write_manifest"),
    }
    where, name = places[at]
    real = getattr(where, name)

    def torn(*args, **kwargs):
        if trainer_step() == 4:
            raise Killed
        return real(*args, **kwargs)

    steps = []
    trainer_step = lambda: steps[-1] if steps else 0  # noqa: E731

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    args = make_args(save_strategy="steps", save_steps=2, max_steps=6)
    monkeypatch.setattr(where, name, torn)
    trainer = Trainer(tiny_peft(), args, train_dataset=tiny_data(27), data_collator=collator, callbacks=[Count()])
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.setattr(where, name, real)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    whole = run(make_args(output_dir=str(tmp_path / "whole"), max_steps=6), collator=collator)
    assert history(run(args, collator=collator, resume=True)) == history(whole)


def test_partial_checkpoints_are_removed(make_args, collator, tmp_path):
    torn = tmp_path / "out" / ".checkpoint-2.abc.tmp"
    torn.mkdir(parents=True)
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    saved(make_args, collator)
    assert not torn.exists()


def test_an_incomplete_checkpoint_is_skipped_and_refused_by_name(make_args, collator, tmp_path):
    args = saved(make_args, collator)
    out = tmp_path / "out"
    assert manifest.latest_checkpoint(out) == out / "checkpoint-4"
    weights = out / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert manifest.latest_checkpoint(out) == out / "checkpoint-2"
    with pytest.raises(TrainingError, match=r"incomplete: adapter_model\.safetensors \(expected \d+ bytes, got \d+\)"):
        run(args, collator=collator, resume=str(out / "checkpoint-4"))
    (out / "checkpoint-2" / manifest.MANIFEST).unlink()
    assert manifest.latest_checkpoint(out) is None
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        run(args, collator=collator, resume=True)
    shutil.rmtree(out)
    with pytest.raises(TrainingError, match="no complete checkpoint"):
        run(args, collator=collator, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
            "per_device_train_batch_size was 4, is 8",
        ),
        ({"max_steps": 40}, "max_steps was 4, is 40"),
        ({"seed": 5}, "seed was 3, is 5"),
    ],
)
def test_other_settings_are_refused(changes, named, make_args, collator):
    saved(make_args, collator)
    with pytest.raises(TrainingError) as caught:
        run(make_args(**{"max_steps": 4, **changes}), collator=collator, resume=True)
    assert named in str(caught.value) and "any_checkpoint=True" in str(caught.value)


def test_other_data_and_another_adapter_are_refused_without_any_checkpoint(make_args, collator):
    args = saved(make_args, collator)
    changed = [dict(row) for row in tiny_data(27)]
    changed[13]["input_ids"][0] = 38 if changed[13]["input_ids"][0] != 38 else 37
    other = datasets.Dataset.from_list(changed)
    with pytest.raises(TrainingError, match="data was .*, is "):
        run(args, data=other, collator=collator, resume=True)
    with pytest.raises(TrainingError, match="trainable parameters was .*, is "):
        run(args, make=lambda: tiny_peft(dropout=0.2), collator=collator, resume=True)
    longer = make_args(max_steps=6)
    assert run(longer, data=other, collator=collator, resume=True, any_checkpoint=True).state.global_step == 6


def test_settings_that_do_not_change_the_result_may_differ(make_args, collator):
    saved(make_args, collator)
    args = make_args(max_steps=4, logging_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=1)
    assert run(args, collator=collator, resume=True, eval_dataset=tiny_data(3)).state.global_step == 4


def test_number_of_processes_is_part_of_the_fingerprint(make_args):
    args = make_args()
    one = fingerprint.run_fingerprint(args, tiny_peft(), tiny_data(4))
    assert one["processes"] == "1"
    assert json.loads(json.dumps(one)) == one


def test_the_data_hash_depends_on_order_content_and_selection():
    data = tiny_data(30)
    assert fingerprint.data_hash(data) == fingerprint.data_hash(datasets.Dataset.from_list(list(data)))
    assert fingerprint.data_hash(data) == fingerprint.data_hash(data.select(range(30)))
    assert fingerprint.data_hash(data) != fingerprint.data_hash(data.select([1, 0, *range(2, 30)]))
    assert fingerprint.data_hash(data) != fingerprint.data_hash(data.select(range(29)))
    assert fingerprint.data_hash(list(data)) != fingerprint.data_hash(list(data)[1:])


def test_the_data_hash_of_a_stream_reads_its_beginning():
    streams = [tiny_data(40, seed=seed).to_iterable_dataset() for seed in (0, 0, 1)]
    hashes = [fingerprint.data_hash(stream) for stream in streams]
    assert hashes[0] == hashes[1] == fingerprint.data_hash(streams[0]) != hashes[2]


def test_data_hash_of_a_large_set_reads_a_part(monkeypatch):
    monkeypatch.setattr(fingerprint, "HASHED_ROWS", 10)
    assert fingerprint.data_hash(tiny_data(25)) != fingerprint.data_hash(tiny_data(26))
