"""The folder of a run: read, checked, claimed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakeet.config import make_run
from lorakeet.errors import OutputError
from lorakeet.runs.run_folder import check_run_folder, claim_folder, read_summary


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
    with pytest.raises(OutputError, match="already holds a run"):
        check_run_folder(folder)
    check_run_folder(folder, resume=True)
    claim_folder(folder, config, resume=False)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.txt", "run.yaml"]
    with pytest.raises(OutputError, match="is a file|cannot write|holds no run"):
        check_run_folder(tmp_path / "other", resume=True)


def test_the_folder_is_checked_without_touching_it(tmp_path):
    check_run_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "run"):
        with pytest.raises(OutputError, match="Not a directory"):
            check_run_folder(folder)
    with pytest.raises(OutputError, match="holds no run to resume"):
        check_run_folder(tmp_path / "new", resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_run_folder(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_a_read_only_file_system_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write to /proc"):
        check_run_folder(Path("/proc/run/deep"))
