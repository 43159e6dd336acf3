"""Free memory of this machine, of a GPU, and of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakeet.plan.free_memory import _left_of_limits, free_memory


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux reports it")
def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    free = free_memory(cpu)
    assert free is not None and 10**6 < free < total * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shared = free_memory(cpu)
    assert shared is not None and shared == pytest.approx(free / 4, rel=0.3)
    assert free_memory(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_free_memory_of_a_gpu_includes_unused_memory_of_torch() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = free_memory(device)
    held = torch.ones(2**28, device=device)
    during = free_memory(device)
    del held
    after = free_memory(device)
    assert before is not None and during is not None and after is not None
    assert during < before - 2**29 and abs(after - before) < 2**28


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_limits_of_control_groups(tmp_path: Path) -> None:
    member, root = tmp_path / "cgroup", tmp_path / "fs"
    assert _left_of_limits(member, root) == []
    member.write_text("0::/a/b\n")
    assert _left_of_limits(member, root) == []
    group(root / "a" / "b", memory__max="max", memory__current="5", memory__stat="anon 3\ninactive_file 2")
    group(root / "a", memory__max="1000", memory__current="700", memory__stat="anon 3\ninactive_file 200")
    assert _left_of_limits(member, root) == [500]
    group(root, memory__max="100", memory__current="700", memory__stat="inactive_file 2")
    assert sorted(_left_of_limits(member, root)) == [0, 500]


def test_limits_of_the_first_version(tmp_path: Path) -> None:
    member, root = tmp_path / "cgroup", tmp_path / "fs"
    member.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    group(
        root / "memory" / "job",
        memory__limit_in_bytes="9000",
        memory__usage_in_bytes="4000",
        memory__stat="inactive_file 1\ntotal_inactive_file 500",
    )
    assert _left_of_limits(member, root) == [5500]
