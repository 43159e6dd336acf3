"""Every Python block of the documentation runs; those of the tour are parts of the example."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.markdown_pages import PAGES, ROOT, blocks, name, read
from lorakeet.config import DEFAULT_MODEL

TOURS = [page for page in PAGES if page.name == "tour.md"]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page not in TOURS]


def run(page: Path, change: tuple[str, str] = ("", "")) -> str:
    """Run a page's blocks in order in one namespace, and return their output."""
    said = io.StringIO()
    space: dict = {"__name__": "__main__"}
    with contextlib.redirect_stdout(said):
        for number, block in enumerate(blocks(page, "python"), start=1):
            exec(compile(block.replace(*change), f"{name(page)}, block {number}", "exec"), space)
    return said.getvalue()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_runs(page: Path, here: Path) -> None:
    assert run(page)


def test_the_readmes_snippet_is_code_for_peft_with_its_import_changed(here: Path) -> None:
    run(ROOT / "README.md")
    ours = load_file("my-adapter/adapter_model.safetensors")
    run(ROOT / "README.md", ("from lorakeet import", "from peft import"))
    theirs = load_file("my-adapter/adapter_model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert not torch.equal(
        *(next(iter(tensors.values())) for tensors in (ours, theirs))
    )  # two runs, not the same one twice
    base = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL)
    peft.PeftModel.from_pretrained(base, "my-run/adapter")  # an adapter of lorakeet train loads in peft


@pytest.mark.parametrize("page", TOURS, ids=name)
def test_the_tour_shows_the_example(page: Path) -> None:
    """Each block under a numbered heading is part of the same step of the script, comments aside."""
    script = re.split(r"^# ---- (\d+)\. .*$", read(ROOT / "examples" / "ten_steps.py"), flags=re.MULTILINE)
    steps = {number: bare(code) for number, code in zip(script[1::2], script[2::2], strict=True)}
    chapters = re.split(r"^## (\d+)\. .*$", read(page), flags=re.MULTILINE)
    told = dict(zip(chapters[1::2], chapters[2::2], strict=True))
    assert list(told) == list(steps) == [str(number) for number in range(1, 11)]
    for number, text in told.items():
        shown = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert shown, f"step {number} shows no code"
        for block in shown:
            assert bare(block) in steps[number], f"step {number} shows what the script does not say:\n{block}"


def bare(code: str) -> str:
    """Return code without comments, indentation and empty lines."""
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in code.splitlines())
    return "\n".join(line for line in lines if line)
