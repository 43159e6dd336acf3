"""Settings: bounds, files and overrides; every mistake is one sentence before anything expensive begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakeet import LoraConfig, config
from lorakeet.config import BaseSettings, RunConfig, read_run
from lorakeet.errors import ConfigError

OUT_OF_BOUNDS = {
    "train.seed=-1": "train.seed = -1: expected greater than or equal to 0",
    "train.seed=4294967296": "train.seed = 4294967296: expected less than 4294967296",
    "train.steps=1e21": "train.steps = 1e+21: expected",
    "train.steps=true": "train.steps = True: expected a number",
    "train.lr=.inf": "train.lr = inf: expected a finite number",
    "train.lr=.nan": "train.lr = nan: expected",
    "lora.r=true": "lora.r = True: expected a number",
    "lora.lora_alpha=yes": "lora.lora_alpha = True: expected a number",
    "base.bits=7": "base.bits = 7: expected 4, 8, 16 or 32",
    "base.bits=true": "base.bits = True: expected a number",
    "out=": "out = None: expected",
    'out=""': "out = '': expected text that is not empty",
    "out=' '": "out = ' ': expected text that is not empty",
    "lora.trainable_token_indices=[3, 3]": "expected a list without repeated tokens",
    "lora.rank_pattern=true": "lora.rank_pattern = True: expected a valid dictionary",
    "lora.rank_pattern={q_proj: true}": "lora.rank_pattern.q_proj = True: expected a number",
    "lora.layers_to_transform=[true]": "expected a number",
    "lora.layers_to_transform=-1": "or greater than or equal to 0",
    "lora.target_modules=['']": "expected text that is not empty",
    "lora.target_modules=''": "or text that is not empty",
    "base.model=''": "base.model = '': expected text that is not empty",
    'data.path="a\\0b"': "expected text in UTF-8 without a null character",
    "train.lr=1e30": "train.lr = 1e+30: expected less than or equal to 1000",
}


@pytest.mark.parametrize("override", OUT_OF_BOUNDS)
def test_a_value_out_of_bounds_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(None, [override])
    assert OUT_OF_BOUNDS[override] in caught.value.message


REGEX_SETTINGS = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
BAD_REGEXES = ["*.q_proj", "(q_proj", "[", "q{2,1}", "a**", "(?P<a", "q\\", "a{99999999999999999999}"]


@pytest.mark.parametrize("setting", REGEX_SETTINGS)
@pytest.mark.parametrize("pattern", BAD_REGEXES)
def test_a_bad_regular_expression_is_refused_when_the_settings_are_made(setting: str, pattern: str) -> None:
    value = {pattern: 4} if setting in ("rank_pattern", "alpha_pattern") else pattern
    for make in (lambda **values: config.make_run({"lora": values}), LoraConfig):
        with pytest.raises(
            ConfigError, match=f"{setting}.*expected.*a regular expression or a list of names"
        ) as caught:
            make(**{setting: value})
        assert setting in (caught.value.hint or "")


def test_a_pattern_must_also_be_valid_in_the_form_in_which_it_is_used() -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match="global flags not at the start"):
            LoraConfig(**{setting: {"(?i)q_proj": 4}})


def test_comma_separated_names_are_a_list_wherever_names_belong() -> None:
    for setting in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        assert getattr(config.make_run({"lora": {setting: "q_proj, v_proj"}}).lora, setting) == ["q_proj", "v_proj"]
        assert getattr(config.make_run({"lora": {setting: "q_proj"}}).lora, setting) == ["q_proj"]
        assert getattr(LoraConfig(**{setting: "q_proj,v_proj"}), setting) == ["q_proj", "v_proj"]
    assert LoraConfig(target_modules="q_proj").target_modules == "q_proj"  # PEFT's regular expression
    assert read_run(None, [r"lora.target_modules=.*\.(q|v)_proj"]).lora.target_modules == r".*\.(q|v)_proj"
    assert read_run(None, ["lora.target_modules=all-linear"]).lora.target_modules == "all-linear"
    assert LoraConfig(target_modules={"v_proj", "q_proj"}).target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r".*\.q_proj", "layers_to_transform": [0]},
        {"target_modules": r".*\.q_proj", "layers_to_transform": 0},
        {"target_modules": r".*\.q_proj", "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"layers_pattern": ["layers", "h"]},
    ],
)
def test_layers_are_chosen_in_one_way(values: dict[str, Any]) -> None:
    for make in (lambda **values: config.make_run({"lora": values}), LoraConfig):
        with pytest.raises(ConfigError, match=r"layers_(to_transform|pattern)") as caught:
            make(**values)
        assert caught.value.hint
    LoraConfig(target_modules="all-linear", layers_to_transform=[0], layers_pattern="layers")
    LoraConfig(target_modules=r".*\.q_proj", layers_to_transform=[])


def test_values_at_the_bounds_are_taken() -> None:
    run = read_run(None, ["train.seed=4294967295", "train.steps=1000000000", "lora.r=1", "base.bits=16"])
    assert (run.train.seed, run.train.steps, run.lora.r, run.base.bits) == (4294967295, 10**9, 1, 16)
    assert read_run(None, ["train.gradient_checkpointing=true"]).train.gradient_checkpointing is True
    assert read_run(None, ["train.lr=1e-4"]).train.lr == 1e-4


def test_a_quantized_format_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected 4, 8, 16 or 32"):
        read_run(None, ["base.bits=3"])
    monkeypatch.setitem(config.QUANTIZED_FORMATS, 3, "int3")
    assert BaseSettings(bits=3).bits == 3 and read_run(None, ["base.bits=3"]).base.bits == 3
    with pytest.raises(ConfigError, match="expected 3, 4, 8, 16 or 32"):
        read_run(None, ["base.bits=7"])


@pytest.mark.parametrize("override", ["lora.target_modules=[q_proj", "data.path={", 'out="a'])
def test_an_override_that_is_not_yaml(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(None, [override])
    assert caught.value.message == f"the value of override {override!r} is not YAML"
    assert caught.value.hint and "\n" not in str(caught.value.hint)


def test_a_key_given_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  steps: 3\n  lr: 1\n  steps: 4\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: key 'steps' of line 2 is given again in line 4"):
        read_run(file)
    file.write_text("train: {steps: 3}\nlora: {r: 4}\ntrain: {lr: 1}\n")
    with pytest.raises(ConfigError, match="key 'train' of line 1 is given again in line 3"):
        read_run(file)
    file.write_text("train: {steps: 3, lr: 1}\nlora: {r: 4}\n")
    assert read_run(file).train.steps == 3


@pytest.mark.parametrize("text", ["Once: upon: a time", "Once upon a time there was a run.", "[", "\ttab"])
def test_data_in_the_place_of_the_settings_is_recognized(tmp_path: Path, text: str) -> None:
    story = tmp_path / "story.txt"
    story.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_run(story)
    assert f"--data {story}" in (caught.value.hint or "")
    settings = tmp_path / "run.yaml"
    settings.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_run(settings)
    assert "--data" not in (caught.value.hint or "")
    settings.write_text("- text: a row")
    with pytest.raises(ConfigError, match="holds list") as caught:
        read_run(settings)
    assert f"--data {settings}" in (caught.value.hint or "")


def test_a_missing_file_and_a_section_that_is_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file"):
        read_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="'r' is 3, expected a section with keys of its own"):
        read_run(None, ["lora.r=3", "lora.r.x=4"])
    with pytest.raises(ConfigError, match="has no '='"):
        read_run(None, ["lora.r"])


def test_the_saved_configuration_reads_back(tmp_path: Path) -> None:
    run = read_run(None, ["lora.rank_pattern={q_proj: 4}", "train.lr=0.1"], {"data.columns.text": "body"})
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert read_run(tmp_path / "run.yaml") == run
    assert RunConfig() == read_run(None)


@pytest.mark.parametrize(
    ("rows", "given", "epochs", "lr"),
    [
        (48, {}, 10, 1e-3),  # 3 steps a pass: at most ten passes
        (190, {}, 9, 1e-3),  # 12 steps a pass: 100 steps
        (1600, {}, 1, 2e-4),
        (0, {"steps": 5}, None, 2e-4),  # a stream
        (48, {"steps": 5}, None, 2e-4),
        (48, {"epochs": 2}, 2, 2e-4),
        (48, {"lr": 0.1}, 10, 0.1),
        (48, {"batch_size": 1, "grad_accum": 1}, 3, 1e-3),
    ],
)
def test_the_length_that_is_left_out_is_chosen_by_the_data(
    rows: int, given: dict[str, Any], epochs: float | None, lr: float
) -> None:
    train = config.make_run({"train": given}).train.for_rows(rows)
    assert (train.epochs, train.lr, train.steps) == (epochs, lr, given.get("steps"))
    assert train.for_rows(rows) == train
