"""The command line: data on stdout; a user error is one line, a hint, exit code 2, and leaves no partial files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import make
from lorakeet.cli import COMMANDS, main

WORDS = [
    "two",
    "things",
    "are",
    "infinite",
    "the",
    "universe",
    "and",
    "human",
    "stupidity",
    "love",
    "is",
    "blind",
    "time",
    "flies",
    "beware",
    "of",
    "dog",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Create a folder with a tiny base model, data, and a finished run in ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    save_base(folder / "base", 0)
    save_base(folder / "other", 1)
    lines = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(4 + i % 9)) for i in range(60)]
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"quote": line, "id": n}) + "\n" for n, line in enumerate(lines))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKEET_HOME", str(folder / "home"))
        patch.chdir(folder)
        assert main(train_words("run", "--dtype", "fp32")) == 0
    return folder


def save_base(folder: Path, seed: int) -> None:
    make("llama", seed).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def train_words(out: str, *more: str) -> list[str]:
    words = ["train", "--model", "base", "--data", "data.jsonl", "--out", out, "--steps", "4", "--lr", "0.05"]
    return [*words, "--eval-fraction", "0.1", "--batch-size", "2", "--grad-accum", "2", "--r", "4", *more]


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_a_run_leaves_what_it_promises(here, capsys):
    run = here / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["samples"] == 16
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    wanted = (
        "base_model tokens train_loss_first train_loss_last tokens_per_second wall_seconds peak_rss_bytes "
        "trainable_parameters all_parameters adapter_path versions"
    )
    assert set(wanted.split()) <= set(summary)
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 4
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        p.name for p in (run / "adapter").iterdir()
    }
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]


def test_the_saved_yaml_alone_repeats_the_run(here, capsys):
    text = (here / "run" / "run.yaml").read_text()
    (here / "again.yaml").write_text(text)
    assert main(["train", "again.yaml", "out=run2", "--overwrite", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    first = json.loads((here / "run" / "summary.json").read_text())
    assert again["train_loss_last"] == first["train_loss_last"]
    one, two = (here / run / "adapter" / "adapter_model.safetensors" for run in ("run", "run2"))
    assert one.read_bytes() == two.read_bytes()


def test_rank_measures_the_loss_of_both_adapters(here, capsys):
    words = ["rank", "run/adapter", "--resize", "1", "--out", "rank-1", "--model", "base", "--data", "data.jsonl"]
    assert main([*words, "--json"]) == 0
    resized = json.loads(capsys.readouterr().out)["resized"]
    assert resized["loss_after"] != resized["loss_before"] == pytest.approx(resized["loss_after"], rel=0.2)
    assert main([*words, "--overwrite"]) == 0
    assert "loss on the data: " in capsys.readouterr().out


def test_eval(here, capsys):
    words = ["eval", "--model", "base", "--dtype", "fp32", "--data", "data.jsonl", "--json"]
    assert main(words) == 0
    base = json.loads(capsys.readouterr().out)
    assert set(base) == {"loss", "perplexity", "tokens"}
    assert main([*words, "--adapter", "run/adapter"]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert adapted["loss"] < base["loss"] and adapted["tokens"] == base["tokens"]
    assert adapted["perplexity"] == pytest.approx(torch.tensor(adapted["loss"], dtype=torch.float64).exp().item())
    assert main([*words, "--adapter", "run/adapter", "--eval-fraction", "0.1"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert held_out["loss"] == pytest.approx(summary["eval_loss_after"], abs=1e-5)


def test_generate_one_many_and_beside_each_other(here, capsys):
    words = ["generate", "--model", "base", "--max-new-tokens", "5", "--greedy"]
    assert main([*words, "--prompt", "two things are"]) == 0
    assert capsys.readouterr().out.startswith("two things are")
    (here / "prompts.txt").write_text("love is\n\ntime flies\n")
    twin = spoiled(here, "twin", lambda folder: None)
    assert main([*words, "--adapter", "run/adapter", "--adapter", twin, "--prompts", "prompts.txt", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["adapter"] for a in answers] == ["run/adapter"] * 2 + [twin] * 2
    assert [a["text"] for a in answers[:2]] == [a["text"] for a in answers[2:]]  # the same adapter twice


def test_merge_then_use_without_adapter(here, capsys):
    from transformers import AutoModelForCausalLM

    words = ["merge", "--model", "base", "--dtype", "fp32", "--adapter", "run/adapter", "--out", "merged"]
    assert main([*words, "--overwrite"]) == 0
    assert capsys.readouterr().out.strip() == "merged"
    AutoModelForCausalLM.from_pretrained("merged")
    losses = []
    for words in (["--model", "base", "--adapter", "run/adapter"], ["--model", "merged"]):
        assert main(["eval", *words, "--dtype", "fp32", "--data", "data.jsonl", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_inspect(here, capsys):
    assert main(["inspect", "run/adapter", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["inspect", "run/adapter"]) == 0
    assert "q_proj" in capsys.readouterr().out


def test_plan_of_the_two_shipped_configurations(capsys):
    for model, targets, counts in (
        ("facebook/opt-6.7b", "q_proj,v_proj", (8388608, 6666862592)),
        ("bigscience/bloomz-7b1", "query_key_value", (7864320, 7076880384)),
    ):
        assert main(["plan", "--model", model, "--target-modules", targets, "--r", "16", "--alpha", "32"]) == 0
        line = capsys.readouterr().out.splitlines()[1]
        share = 100 * counts[0] / counts[1]
        assert line == f"trainable params: {counts[0]} || all params: {counts[1]} || trainable%: {share}"
    assert "0.12582542214183376" in str(100 * 8388608 / 6666862592)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and "home" not in p.parts}


def mistake(here, capsys, words, *says):
    before = tree(here)
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in err and not out
    for text in says:
        assert text in err, err
    assert tree(here) == before  # nothing written, nothing lost
    return err


def spoiled(here, name, spoil):
    """Copy the run's adapter and damage the copy."""
    folder = here / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(here / "run" / "adapter", folder)
    spoil(folder)
    return name


TRAINING_MISTAKES = {
    "no such model": (["--model", "./nowhere"], ["nowhere"]),
    "no such hub model": (["--model", "nobody/nothing"], ["nobody/nothing", "hint: "]),
    "no such data": (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "no such column": (["--text-column", "qoute"], ["qoute", "quote"]),
    "an empty file": (["--data", "empty.jsonl"], ["empty.jsonl"]),
    "a broken jsonl line": (["--data", "broken.jsonl"], ["broken.jsonl", "3"]),
    "r=0": (["--r", "0"], ["lora.r = 0"]),
    "negative alpha": (["--alpha", "-1"], ["lora.lora_alpha = -1"]),
    "dropout 1.0": (["--dropout", "1.0"], ["lora.lora_dropout = 1.0"]),
    "a target that matches nothing": (["--target-modules", "q_prj"], ["q_prj", "q_proj"]),
    "fp16 on a CPU": (["--dtype", "fp16"], ["fp16", "CPU", "hint: "]),
    "an unknown override": (["train.stepz=3"], ["train.stepz", "train.steps"]),
    "an unknown section": (["trane.steps=3"], ["trane", "train"]),
    "a word that is no override": (["a=1", "b"], ["'b'"]),
    "text where a number belongs": (["--steps", "many"], ["many"]),
    "an unknown flag": (["--stepps", "3"], ["--stepps"]),
    "a number of bits that is not": (["--bits", "7"], ["bits = 7"]),
    "an unknown device": (["--device", "gpuu"], ["gpuu"]),
    "a negative seed": (["--seed", "-1"], ["train.seed = -1"]),
    "a seed beyond 32 bits": (["--seed", "4294967296"], ["train.seed = 4294967296"]),
    "an override that is no YAML": (["data.path=["], ["data.path=[", "not YAML", "hint: "]),
    "no name for the folder": (["out="], ["out = None"]),
}


@pytest.mark.parametrize("name", TRAINING_MISTAKES)
def test_training_mistakes(here, capsys, name):
    (here / "empty.jsonl").write_text("")
    (here / "broken.jsonl").write_text('{"quote": "a"}\n{"quote": "b"}\n{"quote": oops}\n')
    words, says = TRAINING_MISTAKES[name]
    flags = train_words("new-run")
    for flag, value in zip(words[::2], words[1::2], strict=False):
        if flag in flags:  # replace a flag rather than say it twice
            flags[flags.index(flag) + 1] = value
            words = [w for w in words if w not in (flag, value)]
    mistake(here, capsys, [*flags, *words], *says)
    assert not (here / "new-run").exists()


def test_an_unknown_key_in_the_yaml_file(here, capsys):
    (here / "bad.yaml").write_text("lora:\n  rank: 3\ntrain:\n  learning_rate: 1\n")
    mistake(here, capsys, ["train", "bad.yaml"], "lora.rank", "train.learning_rate")
    (here / "bad.yaml").write_text("lora: [")
    mistake(here, capsys, ["train", "bad.yaml"], "bad.yaml is not YAML")
    mistake(here, capsys, ["train", "none.yaml"], "none.yaml")
    (here / "story.txt").write_text("Once upon a time: there was a run: it ended.\n")
    mistake(here, capsys, ["train", "story.txt"], "story.txt is not YAML", "hint: ", "--data story.txt")


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--gradient-accumulation-steps", "use --grad-accum"),
        ("--per-device-train-batch-size", "use --batch-size"),
        ("--num-train-epochs", "use --epochs"),
        ("--eval-steps", "it is the setting train.eval_every: add train.eval_every=VALUE"),
        ("--schedule", "it is the setting train.schedule: add train.schedule=VALUE"),
        ("--colour", "lorakeet train --help"),
    ],
)
def test_an_unknown_flag_names_the_setting(here, capsys, flag, hint):
    mistake(here, capsys, ["train", "--data", "data.jsonl", flag, "3"], flag, f"hint: {hint}\n")


def test_flags_known_from_transformers_set_the_same(here, monkeypatch):
    import lorakeet.train.run as module

    seen = []
    monkeypatch.setattr(module, "run_training", lambda config, **_: seen.append(config.train) or {})
    for rate, save in (("--lr", "--save-every"), ("--learning-rate", "--save-steps")):
        assert main(["train", "--data", "data.jsonl", "--epochs", "3", rate, "1e-3", save, "7"]) == 0
    assert seen[0] == seen[1] and (seen[0].epochs, seen[0].lr, seen[0].save_every) == (3.0, 1e-3, 7)


def test_an_output_folder_that_holds_a_run(here, capsys):
    mistake(here, capsys, [*train_words("run"), "lora.r=3"], "finished run", "lora.r was", "--overwrite")
    mistake(here, capsys, ["merge", "--model", "base", "--adapter", "run/adapter", "--out", "run"], "not empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(here, capsys, tmp_path):
    tmp_path.chmod(0o555)
    mistake(here, capsys, train_words(str(tmp_path / "run")), "cannot write")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_place_where_nobody_may_write(here, capsys):
    mistake(here, capsys, train_words("/proc/run"), "/proc/run", "hint: ")
    mistake(here, capsys, ["merge", "--model", "base", "--adapter", "run/adapter", "--out", "/proc/m"], "/proc/m")


def test_an_output_path_below_a_file(here, capsys):
    mistake(here, capsys, train_words("data.jsonl/run"), "data.jsonl")
    mistake(here, capsys, train_words("data.jsonl"), "data.jsonl")
    mistake(
        here, capsys, ["merge", "--model", "base", "--adapter", "run/adapter", "--out", "data.jsonl/x"], "data.jsonl"
    )


def test_an_adapter_of_another_base(here, capsys):
    for verb in (["eval", "--data", "data.jsonl"], ["generate", "--prompt", "love"], ["merge", "--out", "m2"]):
        mistake(
            here,
            capsys,
            [*verb, "--model", "other", "--adapter", "run/adapter"],
            "was trained on",
            "--allow-other-base",
        )
    words = ["eval", "--model", "other", "--adapter", "run/adapter", "--data", "data.jsonl"]
    assert main([*words, "--allow-other-base"]) == 0


def test_a_truncated_adapter_and_a_pickle(here, capsys):
    def truncate(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:300])

    def pickle(folder):
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / "adapter_model.bin")

    for name, spoil, says in (("cut", truncate, "damaged"), ("pickled", pickle, "pickle")):
        adapter = spoiled(here, name, spoil)
        mistake(here, capsys, ["generate", "--model", "base", "--adapter", adapter, "--prompt", "a"], says)
        mistake(here, capsys, ["merge", "--model", "base", "--adapter", adapter, "--out", "m3"], says)
        mistake(here, capsys, ["inspect", adapter], says)
        assert not (here / "m3").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "'train'"),
        (["generate"], "no prompt"),
        (["generate", "--prompts", "none.txt"], "none.txt"),
        (["eval"], "no data"),
        (["inspect", "nowhere/at/all"], "nowhere"),
        (["generate", "--prompt", "a", "--adapter", "./none"], "does not exist"),
        (["merge", "--out", "x"], "--adapter"),
        (["generate", "--model", "base", "--prompt", "love", "--max-new-tokens", "0"], "--max-new-tokens = 0"),
    ],
)
def test_other_mistakes(here, capsys, words, says):
    mistake(here, capsys, words, says)


def test_a_run_folder_means_its_adapter_and_a_model_is_none(here, capsys):
    words = ["eval", "--model", "base", "--dtype", "fp32", "--data", "data.jsonl", "--json"]
    losses = []
    for adapter in ("run", "run/adapter"):
        assert main([*words, "--adapter", adapter]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]
    mistake(here, capsys, ["inspect", "base"], "base is a model, expected an adapter", "--model base")
    mistake(here, capsys, ["generate", "--model", "base", "--adapter", "base", "--prompt", "a"], "--model base")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["plan", "--use-rslora", "true"], "it is the setting lora.use_rslora: add lora.use_rslora=VALUE"),
        (["demo", "--lr", "1"], "train.lr is a setting of `lorakeet train`"),
        (["merge", "--colour", "1"], "lorakeet merge --help"),
    ],
)
def test_an_unknown_flag_of_any_command_leads_on(here, capsys, words, hint):
    mistake(here, capsys, words, f"hint: {hint}")


def test_a_traceback_only_with_debug(here, capsys):
    from lorakeet.errors import LorakeetError

    with pytest.raises(LorakeetError):
        main(["--debug", "inspect", "nowhere/at/all"])


# -- the pipe ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert "examples:" in capsys.readouterr().out


def test_help_and_import_are_light():
    for code in ("import lorakeet", "from lorakeet.cli import main; main(['--help'])", "import lorakeet.cli.train"):
        loaded = f"{code}; import sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
        assert subprocess.run([sys.executable, "-c", loaded], capture_output=True).returncode == 0, code


def test_help_answers_at_once():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lorakeet", "--help"], capture_output=True, check=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 2  # half a second on a quiet machine; this catches an import of torch (several seconds)
