"""What the demo sees to before it says that it is done."""

from __future__ import annotations

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
    """Up to what another order of the same sums makes of it, in the base's number format."""
    monkeypatch.setattr(module, "_anew", lambda *words: [{"loss": 4.0 + off}])
    with nullcontext() if same else pytest.raises(LorakeetError, match="loaded again has a held-out loss of"):
        module._verify_anew(read_run(None, values=module.JOB), {"eval_loss_after": 4.0, "dtype": dtype}, Path("a"))
