"""A sweep over every setting and every flag with wrong values: accepted, or one sentence with a hint, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakeet.cli import COMMANDS, function_of, main
from lorakeet.cli.shared.options import setting_field, typer_command
from lorakeet.config import RunConfig, make_run, read_run
from lorakeet.errors import ConfigError
from lorakeet.setting_types import plain_types, setting_names

#: Values as YAML: wrong types, bounds, infinities, patterns, empty and odd text, nesting, tags of other types.
YAML_VALUES = [
    *(
        "",
        "null",
        "~",
        "true",
        "no",
        "0",
        "-1",
        "1.5",
        "-0.0",
        "1e21",
        "1e400",
        "-1e400",
        ".inf",
        "-.inf",
        ".nan",
        "0x10",
    ),
    *(
        str(10**30),
        "9" * 5000,
        "1_0",
        "12:30:45",
        "2026-01-01",
        "2026-99-99",
        "''",
        "' '",
        '"\\0"',
        '"\\ud800"',
        '"\\u2028"',
    ),
    *("é漢字🙂", "x", "*", "*.x", "(x", "[", "{", "'['", "'x{2,1}'", "'(?P<x'", "all-linear", ",", "a,,b", "a" * 5000),
    *("[]", "[1]", "[-1]", "[true]", "[null]", "['']", "['*']", "[.nan]", "[[x]]", "[x, x]", "[1, 1]", "{}", "{a: 1}"),
    *("{a: null}", "{a: true}", "{a: .inf}", "{'(': 1}", "{'': 1}", "{1: 2}", "{a: [1]}", "{a: {b: c}}", "{? [a] : b}"),
    *("&a [*a]", "&a {b: *a}", "*a", "!!set {a, b}", "!!binary aGk=", "!!python/name:os.system", "!!int x", "!!bool x"),
    *("!!timestamp x", "!!float x", "!x y", "'", '"a', "a: b", "- a", "%", "@", "`", "\t", "\x07", "\udcff"),
]
#: Values that no number takes.
NO_NUMBERS = ("true", ".inf", "-.inf", ".nan", "1e400", "-1", "x", "'x'", "[]", "{a: 1}", "''", str(10**30))
#: Words after a flag, as a shell hands them over.
WORDS = [
    *("", " ", "\0", "\udcff", "x", "nan", "inf", "-inf", "1e400", "-1", "0", "1.5", "1e21", str(10**30), "9" * 5000),
    *(
        "1_0",
        "*",
        "(",
        "[",
        "x{2,1}",
        "é漢字🙂",
        "\u2028",
        ".",
        "~",
        "a" * 300,
        "a/" * 3000,
        "null",
        "{}",
        "--",
        "-x",
        "%s",
    ),
    *(
        "nowhere/at/all",
        "data.jsonl/x",
        "/proc/x",
        "a\nb",
        "http://localhost:1/x",
        "a=",
        "lora.r=x",
        "lora.r",
        "=",
        "[1]",
    ),
]


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        yield from (number for inner in value.values() for number in numbers_in(inner))
    elif isinstance(value, list):
        yield from (number for inner in value for number in numbers_in(inner))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def wrong_sentence(error: ConfigError) -> str | None:
    """Return the fault of an error as a sentence with a hint; None if it has none."""
    if "\n" in error.message.strip() or len(error.message) > 500:
        return "more than one sentence"
    return None if error.hint and "bug" not in error.hint else "no hint"


def reread(setting: str, run: RunConfig) -> RunConfig:
    """Write the value of a setting as YAML, and read it back."""
    value: Any = run.model_dump(mode="json")
    for part in setting.split("."):
        value = value[part]
    return make_run(nested(setting, yaml.safe_load(yaml.safe_dump(value, allow_unicode=True))))


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("setting", setting_names(RunConfig))
def test_every_setting_takes_any_value_or_says_what_it_expects(setting: str) -> None:
    wrong = []
    for value in YAML_VALUES:
        try:
            run = read_run(None, [f"{setting}={value}"])
        except ConfigError as error:
            wrong += [(value[:60], error.message, said)] if (said := wrong_sentence(error)) else []
            continue
        if not all(map(math.isfinite, numbers_in(run.model_dump()))) or reread(setting, run) != run:
            wrong.append((value[:60], "accepted", str(run)))
    assert wrong == []


@pytest.mark.parametrize("setting", setting_names(RunConfig))
def test_no_number_takes_what_is_none(setting: str) -> None:
    types = plain_types(setting_field(setting).annotation)
    if types & {int, float} and not types & {str, list, dict}:
        for value in NO_NUMBERS:
            if value != "true" or bool not in types:
                with pytest.raises(ConfigError, match=f"{setting} = "):
                    read_run(None, [f"{setting}={value}"])


def test_a_value_nested_without_end_is_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        read_run(None, ["lora.target_modules=" + "[" * 1500])
    (tmp_path / "run.yaml").write_text("lora: " + "{a: " * 1500, encoding="utf-8")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_run(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", "lora", "lora:", "lora: 3", "lora: [1]", "3: 4", "? [a]\n: b", "{", "\0"]
)
def test_any_file_of_settings_is_read_or_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_run(tmp_path / "run.yaml")
    assert wrong_sentence(caught.value) is None


# -- flags ------------------------------------------------------------------------------------------------------------

#: Words that make a command complete; a model or adapter that is not there ends every valid call early.
COMPLETE = {
    "demo": ["--out", "run"],
    "train": ["--model", "./none", "--data", "data.jsonl", "--out", "new"],
    "doctor": ["data.jsonl"],
    "eval": ["--model", "./none", "--data", "data.jsonl"],
    "generate": ["--model", "./none", "--prompt", "a"],
    "predict": ["--model", "./none", "--text", "a"],
    "merge": ["--model", "./none", "--adapter", "./none", "--out", "new"],
    "quantize": ["--model", "./none", "--out", "new"],
    "push": ["./none", "me/it"],
    "inspect": ["./none"],
    "rank": ["./none"],
    "compare": ["./none", "./none2"],
    "combine": ["./none", "./none2", "--out", "new"],
    "export": ["./none", "--for", "peft", "--out", "new"],
    "plan": ["--model", "./none"],
    "bench": ["--model", "./none"],
    "serve": ["--model", "./none", "--port", "0"],
    "extract": ["./none", "--model", "./none", "--rank", "4", "--out", "new"],
}
#: Flags of which a good value begins the work of the demo.
BEGINS = ("demo", "--out")


def calls(command: str, words: list[str]) -> Iterator[list[str]]:
    """Yield the words of a call for each flag and argument of a command, with each of ``words`` as its value."""
    parameters = typer_command(function_of(command)).params
    for parameter in parameters:
        flag, complete = parameter.opts[0], list(COMPLETE[command])
        if getattr(parameter, "is_flag", False) or (command, flag) == BEGINS:
            continue
        if flag in complete:
            del complete[complete.index(flag) : complete.index(flag) + 2]
        place = (
            [each.name for each in parameters if not each.opts[0].startswith("-")].index(parameter.name)
            if (not flag.startswith("-"))
            else None
        )
        for word in words:
            if place is None:
                yield [command, *complete, flag, word]
            else:
                given = (
                    [each for each in complete if not each.startswith("-")] if not complete[0].startswith("-") else []
                )
                rest = complete[len(given) :] if given else complete
                given[place : place + 1] = [word]
                yield [command, *given, *rest]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sweep(command: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run every call of a command in ``folder``, and return those that end in another way than success or one sentence."""
    (folder / "data.jsonl").write_text('{"text": "two things are infinite"}\n' * 3)
    (folder / "run").mkdir()
    (folder / "run" / "run.yaml").write_text("{}")
    before, wrong = tree(folder), []
    for call in calls(command, words):
        status = main(call)
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        sentence = len(errors) == 1 and "hint: " in said and tree(folder) == before
        refused = sentence or (call[0] == "doctor" and not errors)  # it has the same code for data that cannot be used
        if status not in (0, 2) or "bug" in said or "Traceback" in said or (status == 2 and not refused):
            wrong.append(f"{[word[:60] for word in call]}: {status} {said[-300:]}")
        if tree(folder) != before:
            before = tree(folder)
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_takes_any_word_or_says_what_it_expects(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep(command, WORDS[::4], tmp_path, capsys) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_with_every_word(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep(command, WORDS, tmp_path, capsys) == []
