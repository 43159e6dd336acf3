"""Links of the documentation resolve, its commands parse, its fields are the real ones, and its pages are complete."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from helpers.markdown_pages import (
    PAGES,
    ROOT,
    anchors,
    blocks,
    command_lines,
    fields,
    links,
    name,
    prose,
    read,
    sentences_with_commands,
)
from lorakeet.cli import COMMANDS, function_of, main
from lorakeet.cli.shared import reference
from lorakeet.cli.shared.options import typer_command
from lorakeet.config import RunConfig, read_run
from lorakeet.files import cache_home
from lorakeet.setting_types import setting_names

each_page = pytest.mark.parametrize("page", PAGES, ids=name)
PYPROJECT = ROOT / "pyproject.toml"
VIETNAMESE = sorted((ROOT / "docs" / "vi").rglob("*.md"))


@each_page
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert ROOT in file.parents
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}"


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in links(index)}
    english = {page for page in PAGES if ROOT / "docs" in page.parents} - {index} - set(VIETNAMESE)
    assert english <= linked


# -- commands ---------------------------------------------------------------------------------------------------------


@each_page
def test_commands_parse(page: Path) -> None:
    for words in [*command_lines(page), *sentences_with_commands(page)]:
        check_command(words)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE)
        assert rest and set(rest) <= set(targets), words
    elif program == "python" and rest[0].endswith(".py"):
        check_script(rest)
    elif program == "torchrun":
        module = rest.index("-m")
        assert rest[module + 1] == "lorakeet"
        check_lorakeet(rest[module + 2 :])
    else:
        assert program == "lorakeet", f"a command that no test checks: {words}"
        check_lorakeet(rest)


def check_script(words: list[str]) -> None:
    script = read(ROOT / words[0])
    flags = re.findall(r"add_argument\(\"(--\w+)\"", script)
    assert {word for word in words if word.startswith("--")} <= set(flags), words


def check_lorakeet(words: list[str]) -> None:
    command, *rest = words
    if command.startswith("-") or command == "COMMAND":
        return
    assert command in COMMANDS, words
    function = function_of(command)
    if not rest or "--help" in rest or rest == ["section.key=value"]:  # named without arguments
        return
    context = typer_command(function).make_context(command, list(rest))
    overrides = [word for word in context.params.get("run") or [] if "=" in word]
    if overrides:
        read_run(None, overrides)


def test_a_wrong_command_would_be_seen() -> None:
    for wrong in ("lorakeet trian", "lorakeet train --rank 3", "lorakeet train lora.rank=3", "make everything"):
        with pytest.raises(Exception):  # noqa: B017 - whichever way it is wrong
            check_command(wrong.split())


def test_the_readme_tells_every_command_as_the_program_does() -> None:
    rows = re.findall(r"^\| `lorakeet (\w+)` \| (.+) \|$", read(ROOT / "README.md"), re.MULTILINE)
    assert dict(rows) == COMMANDS


@pytest.mark.parametrize("model", ["facebook/opt-6.7b", pytest.param(None, marks=pytest.mark.slow)])
def test_shown_plans_are_what_the_program_prints(model: str | None, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [
        block.splitlines() for page in PAGES for block in blocks(page, "console") if block.startswith("$ lorakeet plan")
    ]
    wanted = [lines for lines in shown if ("--model" in lines[0]) == bool(model) and (model or "") in lines[0]]
    assert wanted
    for line, output in {lines[0]: lines[1:] for lines in wanted}.items():
        assert main(line.split()[2:]) == 0
        assert capsys.readouterr().out.splitlines() == output
    assert all(lines == next(other for other in wanted if other[0] == lines[0]) for lines in wanted)


# -- what exists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", reference.pages())
def test_reference_pages_are_generated(page: str) -> None:
    committed = read(ROOT / "docs" / "reference" / page)
    assert committed == reference.pages()[page], "run `make docs`"


def test_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference.pages()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    assert reference.pages() == before
    assert all(f"`{key.rpartition('.')[2]}`" in before["config.md"] for key in setting_names(RunConfig))
    assert all(f"## lorakeet {command}\n" in before["commands.md"] for command in COMMANDS)


def test_reference_is_written_where_asked(tmp_path: Path) -> None:
    reference.main(str(tmp_path / "new"))
    assert {page.name: read(page) for page in (tmp_path / "new").iterdir()} == reference.pages()


def test_training_tells_every_file_and_field(furnished: Path) -> None:
    page, run = ROOT / "docs" / "training.md", furnished / "my-run"
    assert {file.rstrip("/") for file in fields(page, "## The run's folder") if "." in file or "/" in file} == {
        file.name for file in run.iterdir()
    }
    with_load_best = {"best_step"}  # which this run is not
    assert fields(page, "### summary.json") - with_load_best == set(json.loads(read(run / "summary.json")))
    lines = [json.loads(line) for line in read(run / "metrics.jsonl").splitlines()]
    told = fields(page, "### metrics.jsonl")
    assert told == {key for line in lines for key in line}


def test_the_artefact_page_tells_every_file(furnished: Path) -> None:
    told = fields(ROOT / "docs" / "artefact.md", "# The artefact: an adapter on disk")
    files = {file.name for file in (furnished / "my-run" / "adapter").iterdir()}
    assert files - {"tokenizer_config.json"} <= told


def test_the_readme_tells_where_files_lie(furnished: Path) -> None:
    told = fields(ROOT / "README.md", "## Where files lie")
    assert {f"my-run/{file.name}" for file in (furnished / "my-run").iterdir()} == {
        place.rstrip("/") for place in told if place.startswith("my-run")
    }
    assert cache_home.__doc__ and "LORAKEET_HOME" in cache_home.__doc__ and "LORAKEET_HOME" in read(ROOT / "README.md")


def test_every_environment_variable_is_told() -> None:
    page = ROOT / "docs" / "environment.md"
    sources = [*(ROOT / "src").rglob("*.py")]
    used = {name for file in sources for name in re.findall(r"[\"'](LORAKEET_[A-Z0-9_]+)[\"']", read(file))}
    assert used and used <= fields(page, "# Environment variables")


def test_ci_runs_the_targets_and_versions_that_are_there() -> None:
    ci, settings = yaml.safe_load(read(ROOT / ".github" / "workflows" / "ci.yml")), tomllib.loads(read(PYPROJECT))
    jobs = ci["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert {"make lint", "make test"} <= set(commands)
    for command in commands:
        check_command(command.split())
    versions = ci["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    classifiers = settings["project"]["classifiers"]
    assert [f"Programming Language :: Python :: {version}" in classifiers for version in versions] == [True] * 3
    assert settings["project"]["requires-python"] == f">={versions[0]}"


def test_house_words_are_those_of_the_glossary() -> None:
    (listed,) = re.findall(r"if the glossary defines them: \*(.+)\*", read(ROOT / "CONTRIBUTING.md"))
    glossary = read(ROOT / "docs" / "glossary.md").split("## Words of our own")[1].split("## ")[0]
    assert re.findall(r"^\| (\w+) \|", glossary, re.MULTILINE)[1:] == sorted(listed.split(", "))


def test_lab_entries_are_in_the_order_that_the_page_states() -> None:
    lab = read(ROOT / "docs" / "lab.md")
    assert "New entries go to the end" in lab
    dates = re.findall(r"^### (\d{4}-\d{2}-\d{2}): ", lab.split("## Entries")[1], re.MULTILINE)
    assert len(dates) > 40 and dates == sorted(dates)


def test_contributing_names_files_that_are_there() -> None:
    paths = re.findall(r"`((?:src|tests|docs|scripts)/[\w./-]+)`", read(ROOT / "CONTRIBUTING.md"))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert len(paths) > 30 and not missing


# -- Vietnamese -------------------------------------------------------------------------------------------------------


def without_comments(block: str) -> list[str]:
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.splitlines()) if line]


@pytest.mark.parametrize("page", VIETNAMESE, ids=name)
def test_a_translation_says_what_its_counterpart_says(page: Path) -> None:
    english = ROOT / "docs" / page.relative_to(ROOT / "docs" / "vi")
    assert english.exists()

    def shape(text: str) -> list[str]:
        return re.findall(r"^(?:#+(?= )|- (?=\S))", text, re.MULTILINE)

    assert shape(prose(page)) == shape(prose(english))
    for language in ("python", "console"):
        mine, theirs = ([without_comments(block) for block in blocks(file, language)] for file in (page, english))
        assert mine == theirs
    assert len(blocks(page, "text")) == len(blocks(english, "text"))

    def digits(text: str) -> list[str]:
        return re.findall(r"\d+", re.sub(r"(?<=\d)[.,](?=\d)", "", text))

    assert digits(prose(page)) == digits(prose(english))


def test_the_readme_leads_there() -> None:
    assert "docs/vi/index.md" in links(ROOT / "README.md")
    assert VIETNAMESE
