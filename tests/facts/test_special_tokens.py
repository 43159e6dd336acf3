"""Special tokens count once, wherever a text has them already, in every task and command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from tokenizers import processors

from helpers.tiny_tasks import rows_for, save_tiny, word_tokenizer, write_rows
from lorakeet.base.load import load_base
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.prepare import prepare
from lorakeet.facts.special_tokens import added_tokens, kept_positions, prompt_ids, target_ids, text_ids, trimmed
from lorakeet.inference import generate

START, END = 3, 1


def tokenizer_with(single: str) -> tf.PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(pair=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<s>", START), ("</s>", END), ("<mask>", 4)]
    )
    return tokenizer


@pytest.mark.parametrize("single", ["<s> $A", "$A </s>", "<s> $A </s>", "<mask> <s> $A </s>", "$A"])
def test_a_text_with_its_special_tokens_has_the_ids_of_one_without(single: str) -> None:
    tokenizer = tokenizer_with(single)
    before, after = added_tokens(tokenizer)
    assert (before, after) == tuple(
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in single.split("$A")
    )
    plain = tokenizer("the old parrot")["input_ids"]
    written = single.replace("$A", "the old parrot")
    assert text_ids(tokenizer, [written, "the old parrot"]) == [plain, plain]
    assert target_ids(tokenizer, [written]) == [plain]
    assert prompt_ids(tokenizer, ["the old parrot"])[0] == plain[: len(plain) - len(after)]
    encoded = tokenizer(written, return_special_tokens_mask=True)
    kept = kept_positions(encoded["input_ids"], encoded["special_tokens_mask"])
    assert [encoded["input_ids"][at] for at in kept] == plain


def test_white_space_outside_of_start_and_end_does_not_hide_them() -> None:
    tokenizer = tokenizer_with("<s> $A </s>")
    assert text_ids(tokenizer, [" \n<s> the old </s>\n", "the old"]) == [[3, 14, 16, 1]] * 2
    assert target_ids(tokenizer, ["the old </s> \n"]) == [[3, 14, 16, 1]]
    assert [trimmed(tokenizer, text) for text in ("</s>\n", " the ", "\n<s>")] == ["</s>", " the ", "<s>"]
    assert trimmed(tokenizer, "</s>\n", is_whole=False) == "</s>\n"


def test_a_text_that_a_tool_rendered_has_one_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("$A")
    files = {
        "text": [{"text": "the old </s>\n"}, {"text": "the old"}],
        "pair": [{"prompt": "the", "completion": " old </s>\n"}, {"prompt": "the", "completion": " old"}],
    }
    for name, rows in files.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        settings = DataSettings(path=str(path), eval_fraction=0.0)
        assert (
            prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).train["input_ids"][:]
            == [[14, 16, 1]] * 2
        )


def test_an_end_that_a_prompt_has_itself_stays() -> None:
    tokenizer = tokenizer_with("<s> $A </s>")
    assert prompt_ids(tokenizer, ["<s> the old </s>", "the </s> old"]) == [[3, 14, 16, 1], [3, 14, 1, 16]]


@pytest.mark.parametrize(
    "task", ["SEQ_CLS", "TOKEN_CLS", "MASKED_LM", "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"]
)
def test_samples_of_every_task(task: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_with("<s> $A </s>")

    def marked(value: Any, name: str) -> Any:
        if name == "tokens":
            return ["<s>", *value, "</s>"]
        if name == "tags":
            return ["O", *value, "O"]
        return f"<s> {value} </s>" if name in ("text", "anchor", "positive", "source", "target") else value

    plain = rows_for(task, 12)
    files = {"plain": plain, "marked": [{name: marked(value, name) for name, value in row.items()} for row in plain]}
    found = {}
    for name, rows in files.items():
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        data = prepare(DataSettings(path=str(path), eval_fraction=0.0), TaskSettings(type=task), tokenizer, seed=1)
        found[name] = [
            {key: row[key] for key in row if key != "labels" or task == "SEQ_2_SEQ_LM"} for row in data.train
        ]
    assert found["marked"] == found["plain"]


def test_the_first_and_second_text_of_a_pair(tmp_path: Path) -> None:
    rows = [{"text": "<s> the old </s>", "text_pair": "green parrot </s>", "label": label} for label in ("a", "b")]
    plain = [{"text": "the old", "text_pair": "green parrot", "label": label} for label in ("a", "b")]
    found = []
    for number, content in enumerate((rows, plain)):
        path = write_rows(tmp_path / f"{number}.jsonl", content)
        settings = DataSettings(path=str(path), eval_fraction=0.0)
        found.append(prepare(settings, TaskSettings(type="SEQ_CLS"), word_tokenizer(), seed=1).train["input_ids"][:])
    assert found[0] == found[1]


@pytest.mark.parametrize("template_starts", [True, False], ids=["with start token", "without"])
def test_a_conversation_has_the_tokens_of_its_template_in_training_and_generation(
    template_starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    tokenizer = tokenizer_with("<s> $A")
    start = "<s> " if template_starts else ""
    tokenizer.chat_template = (
        f"{start}{{% for m in messages %}}{{{{ m['content'] }}}} </s> {{% endfor %}}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_base(str(folder))
    turns = [{"role": "user", "content": "the old parrot"}, {"role": "assistant", "content": "a crow"}]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 2)
    settings = DataSettings(path=str(path), eval_fraction=0.0)
    [sample, *_] = prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).train["input_ids"][:]
    seen: list[list[int]] = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: seen.extend(given["input_ids"].tolist()) or original(**given)
    )
    generate.complete(model, tokenizer, [turns[:1]], max_new_tokens=1, greedy=True)
    assert seen == [sample[: len(seen[0])]]
    assert sample.count(START) == int(template_starts)


def test_prompts_of_generation_and_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    tokenizer_with("<s> $A </s>").save_pretrained(folder)
    model, tokenizer = load_base(str(folder))
    rows = [
        {"prompt": f"{start}the old {noun}", "completion": " was seen"}
        for start in ("", "<s> ")
        for noun in ("crow", "owl")
    ]
    path = write_rows(tmp_path / "p.jsonl", rows)
    settings = DataSettings(path=str(path), eval_fraction=0.0)
    samples = prepare(settings, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).train["input_ids"][:]
    seen: list[list[int]] = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: seen.extend(given["input_ids"].tolist()) or original(**given)
    )
    generate.complete(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=1, greedy=True)
    assert [sample[: len(prompt)] for sample, prompt in zip(samples, seen, strict=True)] == seen
    assert all(prompt.count(START) == 1 and END not in prompt for prompt in seen)
