"""The checks of the demo before it reports success."""

from __future__ import annotations

import json
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

import lorakeet.cli.demo as module
from lorakeet.config import read_run
from lorakeet.errors import LorakeetError


@pytest.mark.parametrize(
    ("dtype", "off", "same"),
    [("float32", 5e-5, True), ("float32", 5e-4, False), ("bfloat16", -5e-4, True), ("bfloat16", -2e-2, False)],
)
def test_the_adapter_loaded_again_must_have_the_loss_of_its_training(
    dtype: str, off: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance is the rounding error of another order of sums, in the number format of the base."""
    started: list[str] = []

    def start(*words: str) -> subprocess.Popen[str]:
        started.append(words[0])
        line = {"eval": {"loss": 4.0 + off}, "generate": {"text": "so it goes"}}[words[0]]
        assert words[words.index("--bits") + 1] == "8"
        return subprocess.Popen(["echo", json.dumps(line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(module, "_start", start)
    summary = {"eval_loss_after": 4.0, "dtype": dtype}
    with nullcontext() if same else pytest.raises(LorakeetError, match="reloaded adapter has a held-out loss of"):
        assert module._verify_saved(read_run(None, values=module.JOB), summary, Path("a")) == ["so it goes"]
    assert started == ["generate", "eval"]


def test_a_new_process_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(LorakeetError, match=r"(?s)`lorakeet inspect` failed in a new process: .*nowhere"):
        module._read_output(module._start("inspect", "nowhere"), "inspect")
