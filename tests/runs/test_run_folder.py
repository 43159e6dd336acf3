"""The folder of a run: read, checked, claimed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakeet.config import make_run
from lorakeet.errors import OutputError
from lorakeet.runs.run_folder import (
    check_run_folder,
    claim_folder,
    folder_of,
    is_finished,
    is_run,
    read_summary,
    refuse_other_settings,
)


def test_the_summary_of_a_run_that_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no finished run.*--resume"):
        try:
            read_summary(tmp_path)
        except OutputError as error:
            raise OutputError(str(error).replace("\n", " ")) from None


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_run_folder(folder)
    assert not folder.exists()
    config = make_run({"data": {"path": "a.jsonl"}, "out": str(folder)})
    claim_folder(folder, config, resume=False)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "mine.txt").write_text("stays")
    check_run_folder(folder)
    with pytest.raises(OutputError, match=r"already holds a run with other settings: train\.lr was None, is 0\.1"):
        refuse_other_settings(make_run({"data": {"path": "a.jsonl"}, "train": {"lr": 0.1}}), folder, resume=False)
    claim_folder(folder, config, resume=False)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "run.yaml"]
    (folder / "run.yaml").unlink()
    (folder / "metrics.jsonl").write_text("{}\n")
    for resume in (True, False):
        with pytest.raises(OutputError, match="no run.yaml"):
            check_run_folder(folder, resume=resume)


def test_a_run_that_was_killed_before_it_began_is_resumed_from_nothing(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "other", resume=True)
    assert not is_run(tmp_path / "other")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [
        ".adapter.x1.tmp/a.safetensors",
        ".run.yaml.x2.tmp",
        "checkpoints/.rehearsal.x3.tmp/b",
        "checkpoints/.checkpoint-2.x.tmp/c",
    ]
    mine = [".mine.tmp", ".adapter", "checkpoints/checkpoint-2/d"]
    for name in left + mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    claim_folder(tmp_path, make_run({"data": {"path": "a.jsonl"}}), resume=True)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*mine, "run.yaml"}


def test_a_run_is_finished_with_figures_and_an_adapter(tmp_path: Path) -> None:
    claim_folder(tmp_path, make_run({"data": {"path": "a.jsonl"}}), resume=False)
    (tmp_path / "summary.json").write_text("[1")
    assert not is_finished(tmp_path)
    (tmp_path / "adapter").mkdir()
    assert is_finished(tmp_path)
    with pytest.raises(OutputError, match="is damaged, expected the figures of a run"):
        read_summary(tmp_path)


def test_a_moved_run_is_resumed_where_it_is(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    claim_folder(old, make_run({"data": {"path": "a.jsonl"}, "out": str(old)}), resume=False)
    assert folder_of(old / "run.yaml", str(old)) == str(old)
    (old / "checkpoints").mkdir()
    old.rename(new)
    assert folder_of(new / "run.yaml", str(old)) == str(new)
    assert folder_of(tmp_path / "settings.yaml", str(old)) == str(old)


def test_links_of_a_run_stay_links(tmp_path: Path) -> None:
    folder, disk = tmp_path / "run", tmp_path / "disk"
    (disk / "adapter").mkdir(parents=True)
    (disk / "adapter" / "old.safetensors").write_text("old")
    (disk / "metrics.jsonl").write_text("{}\n")
    folder.mkdir()
    for name in ("adapter", "metrics.jsonl"):
        (folder / name).symlink_to(disk / name)
    claim_folder(folder, make_run({"data": {"path": "a.jsonl"}, "out": str(folder)}), resume=False)
    assert sorted(path.name for path in folder.iterdir() if path.is_symlink()) == ["adapter", "metrics.jsonl"]
    assert sorted(path.name for path in disk.rglob("*")) == ["adapter"]


def test_a_disk_without_room_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="will be written"):
        claim_folder(tmp_path, make_run({"data": {"path": "a.jsonl"}}), resume=False, need=10**18)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_folder_is_checked_without_touching_it(tmp_path):
    check_run_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "run"):
        with pytest.raises(OutputError, match="Not a directory"):
            check_run_folder(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_run_folder(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_read_only_file_system_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write to /proc"):
        check_run_folder(Path("/proc/run/deep"))
