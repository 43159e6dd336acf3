"""Samples and their report: the end token, cutting, counting, keeping, and every way to have nothing to learn."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data import PaddingCollator, Prepared, prepare
from lorakeet.data.doctor.examiner import content_hash
from lorakeet.errors import DataError
from lorakeet.files import cache_home

Tokenizer = PreTrainedTokenizerFast
CAUSAL = TaskSettings(type="CAUSAL_LM")


@pytest.fixture
def make(tmp_path: Path, byte_tokenizer: Tokenizer) -> Callable[..., Prepared]:
    """Prepare the given texts."""

    def prepared(*texts: str | None, tokenizer: Any = None, max_positions: int | None = None, **more: Any) -> Prepared:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
        data = DataSettings(**{"path": str(path), "eval_fraction": 0.0, "max_length": 10, **more})
        return prepare(data, CAUSAL, tokenizer or byte_tokenizer, seed=1, max_positions=max_positions)

    return prepared


Make = Callable[..., Prepared]


def test_the_end_token_ends_every_text_that_is_whole(make: Make, byte_tokenizer: Tokenizer) -> None:
    prepared = make("abc", "nine long", "ten  long!", "eleven long")  # 3, 9, 10 and 11 bytes, one token each
    end = byte_tokenizer.eos_token_id
    ids = prepared.train["input_ids"][:]
    assert [byte_tokenizer.decode(sample) for sample in ids] == [
        "abc<|end|>",
        "nine long<|end|>",
        "ten  long!",  # the end token would have been the eleventh
        "eleven lon",
    ]
    assert prepared.train["length"][:] == [4, 10, 10, 10]
    assert prepared.train.column_names == ["input_ids", "length"]
    assert prepared.held_out is None
    report = prepared.report
    assert (report.cut, report.cut_percent, report.ended, report.end_token) == (2, 50.0, 2, "<|end|>")
    assert (report.train_tokens, report.train_targets, report.longest, report.median_length) == (34, 30, 10, 10)
    assert [sample.count(end) for sample in ids] == [1, 1, 0, 0]


def test_the_end_token_is_a_target_where_padding_is_the_same_token(make: Make, byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.pad_token_id == byte_tokenizer.eos_token_id
    prepared = make("abc", "defgh")
    batch = PaddingCollator(byte_tokenizer.pad_token_id)(list(prepared.train))
    end = byte_tokenizer.eos_token_id
    short, long = prepared.train["input_ids"][:]
    assert batch["labels"].tolist() == [[*short, -100, -100], long]
    assert short[-1] == long[-1] == end
    assert (batch["labels"][:, 1:] != -100).sum() == prepared.report.train_targets


def test_a_tokenizer_that_writes_the_end_itself_gets_no_second(make: Make, byte_tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    end = byte_tokenizer.eos_token_id
    byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", end)]
    )
    prepared = make("abc", "long long long")
    assert [sample.count(end) for sample in prepared.train["input_ids"][:]] == [1, 0]
    assert (prepared.report.ended, prepared.report.cut) == (1, 1)


def test_without_an_end_token_there_is_a_warning(
    make: Make, endless_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    report = make("abc", "d", tokenizer=endless_tokenizer).report
    assert "no end token" in caplog.text
    assert (report.end_token, report.ended, report.train_samples, report.unlearnable) == (None, 0, 1, 1)
    assert any("will not learn where to stop" in line for line in report.lines())


def test_the_report_counts(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a", "b", " A ", None, "", " \n", "c", "d \ufffd", "a"]
    prepared = make(*texts, eval_fraction=0.5)
    report = prepared.report
    assert (report.rows, report.empty, report.distinct, report.duplicates, report.damaged) == (9, 3, 4, 2, 1)
    assert report.train_samples + report.held_out_samples == report.samples == 6
    assert prepared.held_out is not None and len(prepared.held_out) == report.held_out_samples
    assert report.held_out_tokens == sum(map(len, prepared.held_out["input_ids"][:]))
    assert report.held_out_targets == report.held_out_tokens - report.held_out_samples
    assert report.content_hash == content_hash(["a", "b", " A ", "c", "d \ufffd", "a"])
    text = "\n".join(report.lines())
    for words in ("9, dropped: 3 empty", "4 distinct, 2 duplicates", "<|end|> ends 6 of 6 samples", "a.jsonl"):
        assert words in text
    assert "U+FFFD" in caplog.text
    assert "cut at" not in caplog.text


def test_many_cut_samples_are_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make("short", "fine", "good", "ok", "this one is long")
    assert "1 of 5 samples (20 %) are cut at 10 tokens" in caplog.text


def test_duplicates_stand_on_one_side(make: Make, byte_tokenizer: Tokenizer) -> None:
    prepared = make(*["one", "two", "three", "four", "ONE", "Two ", "three"] * 3, eval_fraction=0.5)

    def words(part: datasets.Dataset | None) -> set[str]:
        samples = part["input_ids"][:] if part is not None else []
        return {byte_tokenizer.decode(ids).removesuffix("<|end|>").strip().lower() for ids in samples}

    learned, measured = words(prepared.train), words(prepared.held_out)
    assert len(learned) == len(measured) == 2 and not learned & measured


def test_texts_that_differ_only_behind_the_cut_stand_on_one_side(make: Make) -> None:
    texts = [f"the same beginning {number}" for number in range(20)] + [f"text {number}" for number in range(20)]
    prepared = make(*texts, eval_fraction=0.5)
    assert prepared.held_out is not None
    learned = set(map(tuple, prepared.train["input_ids"][:]))
    assert not learned & set(map(tuple, prepared.held_out["input_ids"][:]))
    assert prepared.report.moved > 0
    assert prepared.report.train_samples + prepared.report.held_out_samples == 40
    with pytest.raises(DataError, match="equals a training sample"):
        make(*texts[:20], eval_fraction=0.1)


def test_nothing_to_learn(make: Make, endless_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="all 3 rows are empty"):
        make("", None, "\n")
    with pytest.raises(DataError, match="no sample has a target") as caught:
        make("a", "b", tokenizer=endless_tokenizer)
    assert "⟦a⟧\n(0 of 1 tokens are learned" in str(caught.value)
    with pytest.raises(DataError, match="1 distinct text"):
        make("a", "A", eval_fraction=0.1)


def test_samples_longer_than_the_model_takes(make: Make) -> None:
    assert make("abcd", max_positions=5).report.longest == 5
    with pytest.raises(DataError, match="longest sample has 6 tokens, the model takes 5") as caught:
        make("abcde", max_positions=5)
    assert caught.value.hint == "cut longer ones: data.max_length=5"


def kept_files() -> list[Path]:
    return sorted((cache_home() / "datasets" / "tokens").glob("*"))


def test_tokens_are_kept_and_used_again(
    make: Make, byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lorakeet")
    first = make("abc", "defgh")
    assert "read again" not in caplog.text
    byte_tokenizer("something else", truncation=True, max_length=2)  # leaves its mark on the tokenizer
    second = make("abc", "defgh")
    assert "tokens read again" in caplog.text
    assert second.train[:] == first.train[:] and second.report == first.report
    assert len(kept_files()) == 1
    make("abc", "defgh", max_length=4)
    make("abc", "defgi")
    byte_tokenizer.add_tokens(["fg"])
    assert make("abc", "defgh").report.longest == 5
    assert len(kept_files()) == 4


def test_a_damaged_copy_is_made_anew(make: Make) -> None:
    first = make("abc", "defgh")
    [kept] = kept_files()
    kept.write_bytes(kept.read_bytes()[:100])
    assert make("abc", "defgh").report == first.report


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LORAKEET_HOME", str(tmp_path / "file"))
    assert make("abc").report.train_tokens == 4
    assert "not kept for the next run" in caplog.text


def test_a_run_is_told_what_the_doctor_finds_and_each_thing_once(
    make: Make, tmp_path: Path, byte_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    make("abc", "a\x07b", "abc")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "control characters" in told[0] and "a.jsonl:2" in told[0]
    caplog.clear()
    path = tmp_path / "c.jsonl"
    rows = [{"text": f"text {n}", "label": "rare" if n < 2 else "usual"} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    prepare(DataSettings(path=str(path)), TaskSettings(type="SEQ_CLS"), byte_tokenizer, seed=1)
    assert sum("rare" in record.getMessage() for record in caplog.records) == 1


def test_what_would_spoil_a_run_stops_it(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {n}", "label": "same"}) for n in range(9)))
    with pytest.raises(DataError, match="same"):
        prepare(DataSettings(path=str(path)), TaskSettings(type="SEQ_CLS"), byte_tokenizer, seed=1)


def test_labels_are_those_of_the_usable_rows(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [(f"text {number}", "ab"[number % 3 == 0]) for number in range(12)]
    rows[2:2], rows[5:5] = [("", "c")], [("rain", None)]  # the usable rows do not follow each other
    path.write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows), encoding="utf-8"
    )
    prepared = prepare(DataSettings(path=str(path)), TaskSettings(type="SEQ_CLS"), byte_tokenizer, seed=1)
    assert prepared.train_rows is not None and prepared.labels == ("a", "b")
    assert prepared.report.labels == dict(Counter(prepared.train_rows["label"][:])) and prepared.report.empty == 2


def test_content_hash_sees_order_and_borders() -> None:
    assert content_hash(["ab", "c"]) == hashlib.sha256(b"2:ab1:c").hexdigest()
    assert len({content_hash(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4


def test_the_real_quotations(byte_tokenizer: Tokenizer) -> None:
    prepared = prepare(DataSettings(path="fortunes", max_length=256), CAUSAL, byte_tokenizer, seed=42)
    report = prepared.report
    assert (report.rows, report.held_out_samples) == (12_363, 618)
    assert report.ended + report.cut == report.samples == 12_363
    assert 5 < report.cut_percent < 25
