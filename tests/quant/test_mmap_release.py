"""What is resident of the files that a base is read from while it is rounded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.tiny_tasks import save_tiny
from lorakeet.base.load import load_base
from lorakeet.quant import mmap_release
from lorakeet.quant.quantize import quantize_

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def resident(path: Path) -> int:
    """Bytes of this file's mappings that are in memory."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            mine = words[-1] == str(path)
        elif mine and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


def test_read_pages_are_given_back_and_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "a.safetensors"
    values = torch.arange(1 << 19, dtype=torch.float32)  # 2 MB
    save_file({"a": values}, path)
    with safe_open(path, "pt") as other, safe_open(path, "pt") as mine:
        theirs = other.get_tensor("a")
        theirs.zero_()  # in memory alone, as training does
        mapped = mmap_release.MappedFiles([str(path)])
        ours = mine.get_tensor("a")
        assert mapped.others and not mapped._mappings() - mapped.others  # both were mapped before
        mapped.count(mmap_release.EVERY)
        assert float(theirs.abs().max()) == 0
    with safe_open(path, "pt") as mine:
        ours = mine.get_tensor("a")
        assert float(ours.sum()) > 0
        held = resident(path)
        mapped.count(mmap_release.EVERY - 1)
        assert resident(path) == held >= values.nbytes
    del ours, theirs


def test_a_mapping_made_since_is_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "a.safetensors"
    values = torch.arange(1 << 19, dtype=torch.float32)
    save_file({"a": values}, path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)  # as the hub's cache has them
    mapped = mmap_release.MappedFiles([str(link)])
    with safe_open(link, "pt") as mine:
        ours = mine.get_tensor("a")
        assert torch.equal(ours, values)
        mapped.count(mmap_release.EVERY - 1)
        assert resident(path) >= values.nbytes
        mapped.count(1)
        assert resident(path) == 0
        assert torch.equal(ours, values)
    mmap_release.MappedFiles(()).count(mmap_release.EVERY)


def test_a_base_is_the_same_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    monkeypatch.setattr(mmap_release, "EVERY", 1)
    base = load_base(str(folder), bits=8, dtype="fp32").model
    full = load_base(str(folder), dtype="fp32").model
    assert base.hf_quantizer.files.own
    quantize_(full)
    wanted = full.state_dict()
    assert base.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in base.state_dict().items())
