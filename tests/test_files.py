"""Writes of files and folders: complete or absent, on disks and paths as people have them."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.disk import files_of_at_most
from lorakeet.errors import OutputError
from lorakeet.files import check_room, not_removed, write_elsewhere, write_file, write_folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o600)
    link = tmp_path / "link.txt"
    link.symlink_to("real.txt")
    with write_file(link) as aside:
        aside.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["link.txt", "real.txt"]


def test_a_dangling_link_is_filled(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(tmp_path / "there.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "run")
    with write_file(tmp_path / "file") as aside:
        aside.write_text("new")
    with write_folder(tmp_path / "folder") as aside:
        (aside / "a").write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert (tmp_path / "there.txt").read_text() == (tmp_path / "disk" / "run" / "a").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    with write_file(pipe) as aside:
        aside.write_text("new")
    reader.join(10)
    assert got == ["new"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("place", [".", "link", "plain"])
def test_a_folder_that_is_there_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    real = tmp_path / "real"
    (real / "sub").mkdir(parents=True)
    (real / "old.txt").write_text("old")
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    before = real.stat().st_ino
    path = {".": Path(), "link": tmp_path / "link", "plain": real}[place]
    with write_folder(path) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "a.txt").write_text("new")
    assert real.stat().st_ino == before
    assert names(real) == ["deep", "deep/a.txt"]
    assert (tmp_path / "link").is_symlink()
    assert Path("deep/a.txt").read_text() == "new"


def test_a_folder_is_as_it_was_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.txt").write_text("old")
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "b.txt" and target.parent == tmp_path:
            raise OSError(errno.ENOSPC, "full")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="No space left"), write_folder(tmp_path) as aside:
        (aside / "a.txt").write_text("new")
        (aside / "b.txt").write_text("new")
    assert names(tmp_path) == ["old.txt"]


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_disk_that_refuses_is_an_output_error_of_any_library(tmp_path: Path, library: str) -> None:
    (tmp_path / "file").write_text("old")
    tensors = {"a": torch.zeros(50_000)}
    write = {
        "python": lambda path: path.write_bytes(bytes(200_000)),
        "safetensors": lambda path: save_file(tensors, path),
        "torch": lambda path: torch.save(tensors, path),
    }[library]
    with files_of_at_most(100_000):
        with (
            pytest.raises(OutputError, match=r"cannot write .*file: ") as caught,
            write_file(tmp_path / "file") as aside,
        ):
            write(aside)
        assert caught.value.hint
        with pytest.raises(OutputError, match=r"cannot write .*folder: "), write_folder(tmp_path / "folder") as aside:
            write(aside / "a")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_folder(tmp_path / "folder"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), write_file(tmp_path / "file"):
        (tmp_path / "nothing").read_text()
    assert names(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path in (tmp_path, tmp_path / "file" / "deep"):
        with pytest.raises(OutputError, match="cannot write"), write_file(path):
            pass
    with pytest.raises(OutputError, match="Not a directory"), write_folder(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file"]


def test_room_is_checked_before_the_folder_exists(tmp_path: Path) -> None:
    check_room(tmp_path / "new" / "deep", 1)
    with pytest.raises(OutputError, match="MB free"):
        check_room(tmp_path / "new" / "deep", 10**18)
    assert names(tmp_path) == []


def test_a_folder_is_written_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("LORAKEET_HOME", str(home))
    place = write_elsewhere("run", lambda folder: (folder / "a").write_text("kept") and None)
    assert place is not None and place.parent == home / "rescued" and (place / "a").read_text() == "kept"
    home.rename(tmp_path / "other")
    home.write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = write_elsewhere("run", lambda folder: (folder / "a").write_text("kept") and None)
    assert place is not None and place.parent == tmp_path / "lorakeet-rescued"


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again by the next file"])
def test_a_folder_that_is_removed_while_it_is_written_is_an_error(again: bool, tmp_path: Path) -> None:
    out = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    with (
        pytest.raises(OutputError, match=f"cannot write {out}: its folder was removed meanwhile"),
        write_folder(out) as aside,
    ):
        (aside / "weights").write_text("first")
        shutil.rmtree(tmp_path / "run")
        if again:
            with write_file(aside / "config") as file:
                file.write_text("second")
    assert not out.exists()


def test_an_error_in_a_folder_that_was_removed_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(OutputError, match="was removed meanwhile"), not_removed(folder):
        folder.rmdir()
        (folder / "log").write_text("x")
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), not_removed(folder):
        _ = 1 / 0


def test_a_file_of_a_folder_is_named_by_its_final_path(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=f"cannot write {tmp_path}/adapter/config"),
        files_of_at_most(10),
        write_folder(tmp_path / "adapter") as aside,
        write_file(aside / "config") as file,
    ):
        file.write_text("x" * 100)
