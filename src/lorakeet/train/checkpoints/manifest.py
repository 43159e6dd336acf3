"""Manifest of a checkpoint: its files with their sizes, and the fingerprint of the run that wrote it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments

from lorakeet.adapter.peft_model import PeftModel
from lorakeet.errors import TrainingError

#: Name of the file that lists a checkpoint's files and the run's fingerprint.
MANIFEST = "lorakeet_checkpoint.json"

#: TrainingArguments that the result depends on. Logging, saving and evaluating may change freely.
SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
)

#: Rows of a data set that are read for its hash; a larger data set is sampled evenly.
HASHED_ROWS = 50_000


def data_hash(dataset: Any) -> str:
    """Return a hash of the samples and their order; of other types than ``Dataset`` and list, of type and length."""
    digest = hashlib.sha256(type(dataset).__name__.encode())
    rows = len(dataset) if hasattr(dataset, "__len__") else -1
    digest.update(str(rows).encode())
    if isinstance(dataset, datasets.Dataset):
        if rows > HASHED_ROWS:
            dataset = dataset.select([i * rows // HASHED_ROWS for i in range(HASHED_ROWS)])
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            digest.update(json.dumps(table.to_pydict(), default=str).encode())
    elif isinstance(dataset, (list, tuple)):
        for row in dataset:
            digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def trainable_hash(model: nn.Module) -> str:
    """Return a hash of names and shapes of all trainable parameters, and of the adapter's settings if there is one."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    adapters = (
        {name: model.peft_config[name].to_dict() for name in model.active_adapters}
        if isinstance(model, PeftModel)
        else {}
    )
    return hashlib.sha256(json.dumps([sorted(shapes), adapters], sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_fingerprint(args: TrainingArguments, model: nn.Module, dataset: Any) -> dict[str, Any]:
    """Return what must be equal for a run to resume exactly."""
    settings = {name: str(getattr(args, name)) for name in SETTINGS if hasattr(args, name)}
    return {
        **settings,
        "processes": str(args.world_size),
        "data": data_hash(dataset),
        "trainable parameters": trainable_hash(model),
    }


def write_manifest(folder: Path, fingerprint: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint: its files with their sizes, the run's fingerprint and its progress."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {"files": files, "fingerprint": dict(fingerprint), "progress": dict(progress)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def clear_aside(run_folder: Path) -> None:
    """Remove partial checkpoints of a killed process."""
    for leftover in run_folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    Raises:
        TrainingError: The folder is no checkpoint of Lorakeet, or files in it are missing or truncated.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{folder} has no readable {MANIFEST}, so it is not a complete checkpoint of Lorakeet",
            "resume from another one, or start again",
        ) from None
    broken = [
        f"{name} (expected {size} bytes, got {(folder / name).stat().st_size if (folder / name).is_file() else 'none'})"
        for name, size in files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if broken:
        raise TrainingError(f"checkpoint {folder} is incomplete: {', '.join(broken)}", "resume from an earlier one")
    return manifest


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step below ``run_folder``; damaged checkpoints are skipped."""
    found = []
    for folder in Path(run_folder).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            try:
                read_manifest(folder)
            except TrainingError:
                continue
            found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def refuse_other_run(folder: Path, now: Mapping[str, Any]) -> None:
    """Compare the run that wrote ``folder`` with the run that resumes.

    Raises:
        TrainingError: The runs differ; the message names every difference.
    """
    then = read_manifest(folder)["fingerprint"]
    differences = [
        f"{name} was {then.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise TrainingError(
            f"checkpoint {folder} comes from another run: {'; '.join(differences)}",
            "resume with the run's own settings and data, or pass Trainer(..., any_checkpoint=True)",
        )
