"""The commands of every task's page run in order, on small data and tiny models of the same names."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from helpers.markdown_pages import ROOT, blocks, command_lines, name
from helpers.tiny_base import save_base
from helpers.tiny_tasks import NOUNS, rows_for, save_tiny, write_rows
from lorakeet.cli import main
from lorakeet.config import DEFAULT_MODEL

TASK_PAGES = sorted((ROOT / "docs" / "tasks").glob("*.md"))
#: Pages whose tasks other default tests train too.
SLOW = ("masked.md", "prompts.md", "translation.md")
DATA = {
    "tickets": "SEQ_CLS",
    "words": "TOKEN_CLS",
    "answers": "QUESTION_ANS",
    "pairs": "SEQ_2_SEQ_LM",
    "partners": "FEATURE_EXTRACTION",
    "texts": "MASKED_LM",
}
KEPT = 40  # rows of an example's output
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (page.name in SLOW)) for page in TASK_PAGES],
)
def test_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for folder, kind in (
        ("sentence-transformers/all-MiniLM-L6-v2", "bert"),
        ("google-bert/bert-base-uncased", "bert"),
        ("google-t5/t5-small", "t5"),
    ):
        save_tiny(tmp_path / folder, kind)
    save_base(tmp_path / DEFAULT_MODEL)
    (tmp_path / DEFAULT_MODEL / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    for file, task in DATA.items():
        write_rows(tmp_path / f"{file}.jsonl", rows_for(task, 60))
    turns = [[{"role": "user", "content": noun}, {"role": "assistant", "content": noun * 2}] for noun in NOUNS * 4]
    write_rows(tmp_path / "chat.jsonl", [{"messages": [*turn]} for turn in turns])
    commands = list(command_lines(page))
    assert sum(words[:2] == ["lorakeet", "train"] for words in commands)
    for words in commands:
        if words[0] == "python":
            run_script(words, monkeypatch)
            continue
        assert main(words[1:]) == 0, words
        out = capsys.readouterr().out
        assert words[1] not in ("eval", "predict", "generate") or out.strip(), words


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example that writes data, and keep only the first rows of its file."""
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    made = Path(words[2])
    made.write_text("".join(made.read_text(encoding="utf-8").splitlines(keepends=True)[:KEPT]), encoding="utf-8")


@pytest.mark.parametrize("page", TASK_PAGES, ids=name)
def test_rows_are_such(page: Path, tmp_path: Path) -> None:
    """Each row on a page fits its task."""
    from lorakeet.config import DataSettings, TaskSettings
    from lorakeet.data.doctor.examine import examine

    task = (
        next(words[words.index("--task") + 1] for words in command_lines(page) if "--task" in words)
        if any("--task" in words for words in command_lines(page))
        else "CAUSAL_LM"
    )
    shown = [json.loads(line) for block in blocks(page, "json") for line in block.splitlines()]
    assert shown
    for row in shown:
        path = write_rows(tmp_path / "row.jsonl", [row])
        found = examine(DataSettings(path=str(path)), TaskSettings(type=task))
        assert not {group.code for group in found.issues} - {"one_label"} and found.usable == 1, (row, found)
