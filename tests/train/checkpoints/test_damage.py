"""Checkpoints that were damaged since they were written: named, left out, and the one before is taken."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_training import tiny_data, tiny_llama, tiny_peft
from lorakeet.errors import TrainingError
from lorakeet.train.checkpoints.fingerprint import base_hash
from lorakeet.train.checkpoints.manifest import (
    MANIFEST,
    checkpoints,
    keep_checkpoints,
    latest_checkpoint,
    read_manifest,
)
from lorakeet.train.trainer import Trainer


@pytest.fixture
def fit(make_args, collator) -> Callable[..., Trainer]:
    def run(resume: Any = None, model: Any = None, **changes: Any) -> Trainer:
        more = {name: changes.pop(name) for name in ("any_checkpoint", "callbacks", "eval_dataset") if name in changes}
        args = make_args(**{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes})
        trainer = Trainer(model or tiny_peft(), args, train_dataset=tiny_data(27), data_collator=collator, **more)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints."""
    from transformers import TrainingArguments

    from helpers.tiny_training import PAD
    from lorakeet.data.collate import PaddingCollator

    folder = tmp_path_factory.mktemp("written")
    args = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, save_strategy="steps", report_to="none", disable_tqdm=True, use_cpu=True
    )
    args.remove_unused_columns = False
    Trainer(tiny_peft(), args, train_dataset=tiny_data(27), data_collator=PaddingCollator(PAD)).train()
    return folder


def test_every_flipped_bit_is_found(written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(written, tmp_path / "run")
    drawn = random.Random(0)
    newest = tmp_path / "run" / "checkpoint-4"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert latest_checkpoint(tmp_path / "run") == newest and len(files) >= 8
    for file in files:
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole + b"0", *(flipped(whole, drawn) for _ in range(3))):
            file.write_bytes(damaged)
            caplog.clear()
            assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2", file
            assert "the one before is taken" in caplog.text and file.name in caplog.text
        file.unlink()
        assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
        file.write_bytes(whole)
    assert latest_checkpoint(tmp_path / "run") == newest


def flipped(whole: bytes, drawn: random.Random) -> bytes:
    place = drawn.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ (1 << drawn.randrange(8))]) + whole[place + 1 :]


def test_files_of_another_checkpoint_are_found(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "run")
    for name in ("optimizer.safetensors", "process_0.json", MANIFEST):
        shutil.copy(written / "checkpoint-2" / name, tmp_path / "run" / "checkpoint-4" / name)
        assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
        shutil.copy(written / "checkpoint-4" / name, tmp_path / "run" / "checkpoint-4" / name)


def test_a_manifest_that_was_edited_is_found(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "checkpoint-4", tmp_path / "checkpoint-4")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["progress"]["logged"] += 1.0
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match="no readable"):
        read_manifest(folder)


def test_a_checkpoint_with_pickles_is_refused_by_name(fit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit()
    folder = tmp_path / "out" / "checkpoint-2"
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    torch.save({"runs": print}, folder / "optimizer.pt")
    with pytest.raises(TrainingError, match=r"holds pickles, which can run code: optimizer\.pt, expected safetensors"):
        fit(resume=str(folder))
    fit(resume=str(folder), any_checkpoint=True)
    assert "optimizer.pt; they are not read" in caplog.text


def test_an_optimizer_of_other_parameters_is_refused(fit, tmp_path: Path) -> None:
    fit()
    folder = tmp_path / "out" / "checkpoint-2"
    file = folder / "optimizer.json"
    saved = json.loads(file.read_text())
    saved["parameters"][0].reverse()  # the shapes of many fit each other
    file.write_text(json.dumps(saved))
    (folder / MANIFEST).unlink()
    with pytest.raises(TrainingError, match="has other parameters, or in another order"):
        fit(resume=str(folder), any_checkpoint=True)


def test_another_base_is_refused(fit, tmp_path: Path) -> None:
    fit()
    other = tiny_peft()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-6
    with pytest.raises(TrainingError, match="base was .*, is "):
        fit(resume=True, model=other)
    assert base_hash(tiny_peft()) == base_hash(tiny_peft()) != base_hash(tiny_peft().to(torch.bfloat16))
    assert base_hash(tiny_llama()) == base_hash(tiny_llama(seed=1))  # no parameter is frozen


def test_other_versions_warn(fit, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    fit()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    fit(resume=str(tmp_path / "out" / "checkpoint-2"))
    assert "may not equal an uninterrupted one: torch was" in caplog.text and "is 2.99.0" in caplog.text


@pytest.mark.parametrize(
    ("steps", "newest", "best", "most", "left"),
    [
        ([1, 2, 3], 3, None, None, [1, 2, 3]),
        ([1, 2, 3], 3, None, 2, [2, 3]),
        ([1, 2, 3], 3, 1, 2, [1, 3]),
        ([1, 2, 3], 3, 1, 1, [1, 3]),
        ([1, 2, 3], 3, 3, 1, [3]),
        ([9, 10, 11], 11, None, 1, [11]),  # 9 is no later than 11
        ([2, 3, 8], 3, None, 2, [2, 3]),  # 8 is of another training
    ],
)
def test_the_newest_and_the_best_are_kept(steps, newest, best, most, left, tmp_path: Path) -> None:
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    keep_checkpoints(tmp_path, newest, best, most)
    assert sorted(checkpoints(tmp_path)) == left and (tmp_path / "checkpoint-mine").is_dir()
    assert not list(tmp_path.glob(".*"))
