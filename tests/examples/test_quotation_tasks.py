"""Rows of the quotation tasks, their tokens in the loss, and (slow) a real model that learns them.

The loss mask is compared token by token with a reference: the tokenizer's own file, read by ``tokenizers`` alone, and a
conversation rendered by hand.
"""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from helpers.example_scripts import EXAMPLES, made
from lorakeet import api
from lorakeet.base.load import inspect_model
from lorakeet.config import BaseSettings, DataSettings, TaskSettings, make_run
from lorakeet.data.collate import make_collator
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.train.run import run_training

SCRIPT = "quotation_tasks.py"
CAUSAL = TaskSettings(type="CAUSAL_LM")
END = "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's default system turn


def rows(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    return made(monkeypatch, SCRIPT, out, str(out), *words)


# ---- the rows ---------------------------------------------------------------------------------------------------

FORTUNES = """Know thyself, they said, and I
did not like him.
\t\t-- Mark Twain, "Roughing It" (1872)
%
know   THYSELF, they said, and I did not like him.
%
Short.
\t\t-- Mark Twain
%
Twain never said this, that is for sure.
\t\t-- Mark Twain
%
Nobody asked him.
\t\t-- Oscar Wilde
%
He who asks is a fool for five minutes.
\t\t-- Chinese proverb
%
One said so.
\t\t-- Alexander Pope
Another said otherwise.
\t\t-- J. C. Squire
"""


@pytest.fixture
def fortunes(tmp_path: Path) -> list[str]:
    file = tmp_path / "fortunes"
    file.write_text(FORTUNES, encoding="utf-8")
    return ["--file", str(file)]


def test_each_quotation_and_who_said_it(fortunes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "authors.jsonl"
    asked = "Know thyself, they said, and I\ndid not like him.\n\nWho said this?"
    assert rows(monkeypatch, out, *fortunes, "--least", "2") == [
        {"prompt": asked, "completion": " Mark Twain"},
        {"prompt": "Short.\n\nWho said this?", "completion": " Mark Twain"},
    ]
    chat = rows(monkeypatch, out, *fortunes, "--least", "2", "--chat")
    assert chat[0] == {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Mark Twain"}]}
    everybody = rows(monkeypatch, out, *fortunes, "--least", "1")
    assert [row["completion"] for row in everybody] == [" Mark Twain", " Mark Twain", " Oscar Wilde"]
    short = rows(monkeypatch, out, *fortunes, "--least", "1", "--longest", "17")
    assert [row["prompt"].partition("\n")[0] for row in short] == ["Short.", "Nobody asked him."]


def test_each_quotation_in_two_halves(fortunes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "halves.jsonl"
    assert rows(monkeypatch, out, *fortunes, "--kind", "continue") == [
        {"prompt": "Know thyself, they said, and", "completion": " I\ndid not like him."},
        {"prompt": "Twain never said this,", "completion": " that is for sure."},
        {"prompt": "He who asks is a", "completion": " fool for five minutes."},
    ]
    chat = rows(monkeypatch, out, *fortunes, "--kind", "continue", "--chat")
    assert [turn["content"] for turn in chat[1]["messages"]] == ["Twain never said this,", "that is for sure."]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Mark Twain", "Mark Twain"),
        ('Lewis Carroll, "Through the Looking-Glass" (1871)', "Lewis Carroll"),
        ("Poul Henningsen (1894-1967)", "Poul Henningsen"),
        ("Dwight D. Eisenhower in a press conference", "Dwight D. Eisenhower"),
        ("Johann Wolfgang von Goethe", "Johann Wolfgang von Goethe"),
        ("Francois de La Rochefoucauld", "Francois de La Rochefoucauld"),
        ("A. E. Housman", "A. E. Housman"),
        ("Stan Kelly-Bootle", "Stan Kelly-Bootle"),
        ("Émile Zola", "Émile Zola"),
        ("Voltaire", "Voltaire"),
        ("Chinese proverb", None),
        ('"Doctor Who"', None),
        ("The Best of Will Rogers", None),
        ("A Yippie proverb", None),
        ("Kernighan and Plauger", None),
        ('Joseph "Crazy Joe" Gallo', None),
        ("Proverbs 26:5", None),
    ],
)
def test_of_an_author_line_the_name_remains(line: str, name: str | None) -> None:
    assert runpy.run_path(str(EXAMPLES / SCRIPT))["name_of"](line) == name


def test_the_real_quotations_by_author(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "authors.jsonl"
    written = rows(monkeypatch, out)
    assert 2_000 < len(written) < 2_300
    counts = Counter(row["completion"] for row in written)
    assert 250 < len(counts) < 320 and min(counts.values()) == 3
    assert counts.most_common(2) == [(" Ambrose Bierce", 94), (" Mark Twain", 71)]
    assert not any(sign in name for name in counts for sign in '"(),:0123456789\n')
    for row in written:
        text, gap, question = row["prompt"].rpartition("\n\n")
        assert (gap, question) == ("\n\n", "Who said this?") and 0 < len(text) <= 200
        assert "\n-- " not in text and row["completion"].split()[-1] not in text
    assert len({row["prompt"] for row in written}) == len(written)
    many = rows(monkeypatch, out, "--least", "10", "--chat")
    turns = [[turn["content"] for turn in row["messages"]] for row in many]
    assert turns == [[row["prompt"], row["completion"][1:]] for row in written if counts[row["completion"]] >= 10]


def test_the_real_quotations_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "halves.jsonl"
    written = rows(monkeypatch, out, "--kind", "continue")
    assert 8_000 < len(written) < 9_000
    for row in written:
        first, second = row["prompt"], row["completion"]
        assert len(first + second) <= 200 and "\n-- " not in first + second
        assert first == first.strip() and second[0].isspace() and second.strip()
        assert len(second.split()) >= 4 and len(first.split()) - len(second.split()) in (0, 1)
    before = out.read_bytes()
    rows(monkeypatch, out, "--kind", "continue")
    assert out.read_bytes() == before


# ---- tokens in the loss -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    """Return the tokenizer that a run uses."""
    return inspect_model(BaseSettings(model=str(smollm2))).tokenizer


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


def samples(path: Path, tokenizer: Any, **settings: Any) -> Prepared:
    """Return all rows of a file as the samples of a run, in order."""
    return prepare(DataSettings(path=str(path), eval_fraction=0.0, **settings), CAUSAL, tokenizer, seed=42)


def is_learned(labels: list[int], ids: list[int]) -> list[bool]:
    """Return which tokens are in the loss; these are their own labels, the others have -100."""
    learned = [label != -100 for label in labels]
    assert labels == [token if flag else -100 for token, flag in zip(ids, learned, strict=True)]
    return learned


@pytest.mark.parametrize("kind", ["author", "continue"])
def test_completion_and_end_are_learned_and_nothing_else(
    kind: str, tokenizer: Any, reference: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    written = rows(monkeypatch, out, "--kind", kind)
    made_of = samples(out, tokenizer, limit=300).train
    assert len(made_of) == 300
    end = reference.token_to_id(END)
    for row, sample in zip(written[:300], made_of, strict=True):
        ids = sample["input_ids"]
        learned = is_learned(sample["labels"], ids)
        before = reference.encode(row["prompt"]).ids
        assert ids == [*before, *reference.encode(row["completion"]).ids, end]
        assert learned == [False] * len(before) + [True] * (len(ids) - len(before))
        told = [token for token, flag in zip(ids, learned, strict=True) if flag]
        assert reference.decode(told, skip_special_tokens=False) == row["completion"] + END


@pytest.mark.parametrize("kind", ["author", "continue"])
def test_of_a_conversation_the_answer_and_its_end_are_learned(
    kind: str, tokenizer: Any, reference: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    written = rows(monkeypatch, out, "--kind", kind, "--chat")
    made_of = samples(out, tokenizer, limit=300).train
    assert len(made_of) == 300
    for row, sample in zip(written[:300], made_of, strict=True):
        ids = sample["input_ids"]
        learned = is_learned(sample["labels"], ids)
        asked, said = (turn["content"] for turn in row["messages"])
        before = f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n"
        assert ids == reference.encode(f"{before}{said}{END}\n").ids
        assert ids == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        first, count = learned.index(True), sum(learned)
        parts = ids[:first], ids[first : first + count], ids[first + count :]
        assert all(learned[first : first + count])
        assert [reference.decode(part, skip_special_tokens=False) for part in parts] == [before, said + END, "\n"]


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["completion", "chat"])
def test_the_end_is_learned_and_padding_is_not_although_they_are_one_token(
    chat: list[str], tokenizer: Any, reference: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    written = rows(monkeypatch, out, "--kind", "continue", *chat)
    made_of = samples(out, tokenizer, limit=64).train
    end = reference.token_to_id(END)
    assert tokenizer.pad_token_id == end
    batch = make_collator(CAUSAL, tokenizer)([made_of[number] for number in range(64)])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 10 and max(lengths) == batch["input_ids"].shape[1]
    for number, length in enumerate(lengths):
        ids, labels = batch["input_ids"][number], batch["labels"][number]
        assert ids[:length].tolist() == made_of[number]["input_ids"] and ids[length:].eq(end).all()
        assert labels[length:].eq(-100).all() and batch["attention_mask"][number, :length].all()
        told = labels[labels.ne(-100)].tolist()
        said = written[number]["messages"][-1]["content"] if chat else written[number]["completion"]
        assert reference.decode(told, skip_special_tokens=False) == said + END
        assert told.count(end) == 1 and labels[length - (2 if chat else 1)] == end


def test_what_is_cut_off_has_no_end(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.jsonl"
    rows(monkeypatch, out, "--kind", "continue")
    whole = [sample["labels"] for sample in samples(out, tokenizer, limit=300).train]
    kept = [labels for labels in whole if any(label != -100 for label in labels[:20])]
    parts = [sample["labels"] for sample in samples(out, tokenizer, limit=300, max_length=20).train]
    assert parts == [labels[:20] for labels in kept]
    cut = [part for part, labels in zip(parts, kept, strict=True) if len(labels) > 20]
    assert len(cut) > 50 and not any(tokenizer.eos_token_id in part for part in cut)


# ---- the real model ---------------------------------------------------------------------------------------------


def ended(
    opened: api.LoadedModel, adapter: str | None, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Generate greedily after the user's turns; return the texts that end within 60 tokens."""
    write, written = opened.model.generate, []

    def remember(**inputs: Any) -> torch.Tensor:
        ids = write(**inputs)
        written.extend(ids[:, inputs["input_ids"].shape[1] :].tolist())
        return ids

    with monkeypatch.context() as patch:
        patch.setattr(opened.model, "generate", remember)
        texts = api.generate(opened, adapter, prompts, chat=True, greedy=True, max_new_tokens=60)
    end = opened.base.tokenizer.convert_tokens_to_ids(END)
    assert len(texts) == len(written) == len(prompts)
    return [text for text, ids in zip(texts, written, strict=True) if end in ids]


@pytest.mark.slow
def test_a_real_model_learns_to_go_on_and_to_end(
    real_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "halves.jsonl"
    rows(monkeypatch, out, "--kind", "continue", "--chat", "--longest", "120")
    config = make_run(
        {
            "data": {"path": str(out), "limit": 640, "eval_fraction": 0.05, "max_length": 96},
            "lora": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
            "train": {"steps": 20, "batch_size": 4, "grad_accum": 4, "lr": 2e-3, "warmup": 2},
            "out": str(tmp_path / "run"),
        }
    )
    summary = run_training(config)
    opened = api.open_model(config.base, [summary["adapter_path"]])
    kept = prepare(config.data, CAUSAL, opened.base.tokenizer, seed=config.train.seed).held_out_rows
    prompts = [json.loads(row["messages"])[0]["content"] for row in kept.select(range(8))]
    base, adapted = (ended(opened, name, prompts, monkeypatch) for name in (None, summary["adapter_path"]))
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    told = f"loss {before:.3f} -> {after:.3f}; ended: {len(base)} of 8 -> {len(adapted)} of 8: {base} -> {adapted}"
    print(told)
    assert after < before - 0.9, told
    assert len(adapted) >= 7 and len(adapted) > len(base) and all(text.strip() for text in adapted), told
