"""Merging and quantizing on a disk without room, or one that fills up: one error, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf

from helpers.tiny import shake
from helpers.tiny_tasks import save_tiny
from lorakeet import LoraConfig, get_peft_model
from lorakeet.base.storage import bytes_to_store
from torture.failing_disk import can_mount, fill, limit_files, small_disk
from torture.operations import at_number
from torture.sessions import Ended, fork

needs_mount = pytest.mark.skipif(not can_mount(), reason="this process may not mount file systems")


class Export:
    """A command that writes a model, on a tiny base with a tiny adapter."""

    def __init__(self, folder: Path, command: str) -> None:
        self.base, self.log = save_tiny(folder / "base", "llama"), folder / "log"
        self.words = [command, "--model", str(self.base)]
        if command == "merge":
            model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(self.base), LoraConfig(r=2))
            shake(model)
            model.save_pretrained(folder / "adapter")
            self.words += ["--adapter", str(folder / "adapter")]

    def __call__(self, out: Path, before: Callable[[], None] | None = None) -> Ended:
        return fork([*self.words, "--out", str(out)], self.log, before).wait()


@pytest.fixture(params=["merge", "quantize"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Export:
    return Export(tmp_path, request.param)


def is_refused(ended: Ended, disk: Path) -> bool:
    """Whether the command ended with one error of the disk, and left nothing there."""
    left = [path.name for path in disk.iterdir() if path.name != "ballast"]
    told = "error: cannot write" in ended.said or "MB will be written" in ended.said
    return ended.code == 2 and told and not ended.crashed and left == []


def test_a_limit_of_a_files_size_is_one_error(export: Export, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = export(disk / "out", at_number(disk, 3, limit_files))
    assert is_refused(ended, disk), ended.said


@needs_mount
def test_a_disk_that_fills_up_is_one_error(export: Export, tmp_path: Path) -> None:
    for number in (3, 9):  # before the check of the room, and after it
        with small_disk(tmp_path / "disk") as disk:
            ended = export(disk / "out", at_number(disk, number, lambda disk=disk: fill(disk)))
            assert is_refused(ended, disk), ended.said


@needs_mount
def test_a_disk_without_room_is_refused_before_the_base_is_loaded(export: Export, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**14) as disk:
        ended = export(disk / "out")
        assert ended.code == 2 and "MB will be written" in ended.said and "parameters" not in ended.said
        assert list(disk.iterdir()) == []


def test_the_bytes_to_store_are_those_of_the_files(export: Export, tmp_path: Path) -> None:
    assert export(tmp_path / "out").code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    bits = 8 if "quantize" in export.words else None
    headers = 8_000
    assert written - headers < bytes_to_store(export.base, None, bits) < written
    assert bytes_to_store(export.base, "bf16") == pytest.approx(bytes_to_store(export.base) / 2)
