"""Conversations with an adapter: its system turn is noted by the run, and used, said and overridden in generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from helpers.tiny import shake
from helpers.tiny_tasks import save_tiny, write_rows
from lorakeet import LoraConfig, api, get_peft_model
from lorakeet.cli import main
from lorakeet.config import BaseSettings, DataSettings, RunConfig, TaskSettings
from lorakeet.data.prepare import prepare
from lorakeet.tasks.taught import NOTES, Taught, taught_notes

SYSTEM = "the old green house"
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '<mask>', 'user': '<unk>', 'assistant': '<s>'}[m['role']] }} {{ m['content'] }} "
    "</s> {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
QUIET = ["--greedy", "--max-new-tokens", "2", "--dtype", "fp32"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "base", "llama")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def conversations(*systems: str | None) -> list[dict[str, Any]]:
    """Build a conversation for each system turn; None: it has none."""
    turns = [{"role": "user", "content": "we found"}, {"role": "assistant", "content": "a parrot"}]
    return [{"messages": [*([{"role": "system", "content": one}] if one else []), *turns]} for one in systems]


def noted(base: Path, folder: Path, *systems: str | None, **settings: Any) -> dict[str, Any]:
    """Return what the notes of a run on such conversations say of them."""
    write_rows(folder / "chat.jsonl", conversations(*systems))
    data = DataSettings(path=str(folder / "chat.jsonl"), eval_fraction=0.0, **settings)
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    prepared = prepare(data, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1)
    notes = json.loads(json.dumps(taught_notes(RunConfig(data=data), prepared.layout, prepared.chat)))
    return dict(Taught.from_notes({NOTES: notes}).chat)


def adapter(base: Path, folder: Path, chat: dict[str, Any]) -> str:
    """Save an adapter with these notes."""
    model = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    shake(model)
    model.save_pretrained(folder, notes={NOTES: {"chat": chat}})
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def test_the_system_turn_of_most_conversations_is_noted(base: Path, tmp_path: Path) -> None:
    assert noted(base, tmp_path, SYSTEM, SYSTEM, SYSTEM) == {"system": SYSTEM, "share": 1.0}
    assert noted(base, tmp_path, SYSTEM, SYSTEM, None, "the saw") == {"system": None, "share": 0.75}
    assert noted(base, tmp_path, None, None) == {"system": None, "share": 0.0}


def test_plain_texts_are_no_conversations(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", [{"text": "the old parrot"}, {"text": "a crow"}])
    data = DataSettings(path=str(tmp_path / "t.jsonl"), eval_fraction=0.0)
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    assert not prepare(data, TaskSettings(type="CAUSAL_LM"), tokenizer, seed=1).chat


def asked(
    base: Path, folder: str, monkeypatch: pytest.MonkeyPatch, prompts: list[Any], **settings: Any
) -> tuple[list[str], str]:
    """Return what the model is given for each prompt, and the answer of ``api.generate`` to the first."""
    opened = api.open_model(BaseSettings(model=str(base), dtype="fp32"), [folder])
    seen: list[str] = []
    original, decode = opened.model.generate, opened.base.tokenizer.decode
    monkeypatch.setattr(
        opened.model,
        "generate",
        lambda **given: seen.extend(decode(ids) for ids in given["input_ids"].tolist()) or original(**given),
    )
    texts = api.generate(opened, folder, prompts, greedy=True, max_new_tokens=2, batch_size=1, **settings)
    return seen, texts[0]


@pytest.mark.parametrize(
    ("system", "given", "said"),
    [
        (None, "<mask> the old green house </s> <unk> we found </s> <s>", "as the adapter was taught"),
        ("", "<unk> we found </s> <s>", "no system turn, but the adapter was taught with"),
        ("the saw", "<mask> the saw </s> <unk> we found </s> <s>", "taught with another system turn"),
        (SYSTEM, "<mask> the old green house </s> <unk> we found </s> <s>", ""),
    ],
)
def test_the_system_turn_of_the_adapter_is_used_unless_told_otherwise(
    system: str | None,
    given: str,
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = adapter(base, tmp_path / "adapter", {"system": SYSTEM, "share": 1.0})
    with caplog.at_level("INFO", "lorakeet"):
        seen, _ = asked(base, folder, monkeypatch, ["we found"], chat=True, system=system)
    assert seen == [given]
    assert said in caplog.text and (said or "system turn" not in caplog.text)


def test_prompts_as_messages(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = adapter(base, tmp_path / "adapter", {"system": SYSTEM, "share": 1.0})
    [with_own] = conversations("the saw")
    [without] = conversations(None)
    seen, _ = asked(base, folder, monkeypatch, [with_own["messages"][:2], without["messages"][:1], "we found"])
    assert seen == [
        "<mask> the saw </s> <unk> we found </s> <s>",
        "<mask> the old green house </s> <unk> we found </s> <s>",
        "we found",
    ]
    assert "the prompt is plain text: --chat" in caplog.text


def test_system_turns_of_many_kinds_are_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = adapter(base, tmp_path / "adapter", {"system": None, "share": 0.9})
    seen, _ = asked(base, folder, monkeypatch, ["we found"], chat=True)
    assert seen == ["<unk> we found </s> <s>"] and "give one with --system" in caplog.text


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(base, tmp_path / "adapter", {"system": SYSTEM, "share": 1.0})
    rows = [*conversations(None), {"prompt": "the parrot"}, *conversations("the saw")]
    write_rows(tmp_path / "p.jsonl", rows)
    words = ["generate", "--model", str(base), "--adapter", folder, *QUIET]
    assert main([*words, "--prompts", str(tmp_path / "p.jsonl"), "--json", "--system", SYSTEM]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == [rows[0]["messages"][:1], "the parrot", rows[2]["messages"][:2]]
    assert main([*words, "--prompt", "we found", "--chat"]) == 0
    assert capsys.readouterr().out.strip() == answers[0]["text"].strip()


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        ([{"prompt": "the parrot"}], ["--system", "the saw"]),
        ([{"messages": "the parrot"}, {"messages": []}], []),
        ([{"messages": [{"content": "the parrot"}]}], []),
        ([{"prompt": 3}], []),
    ],
)
def test_what_is_no_prompt_is_refused_before_the_model_is_read(
    rows: list[Any], more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "p.jsonl", rows)
    assert main(["generate", "--model", "no/model", "--prompts", str(tmp_path / "p.jsonl"), *more]) == 2
    assert "no/model" not in capsys.readouterr().err
