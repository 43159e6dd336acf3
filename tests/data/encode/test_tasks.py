"""Samples of the models that read or rewrite, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.task_tokenizers import LETTERS, bpe_tokenizer, piece_tokenizer, wordpiece_tokenizer
from lorakeet.data.encode.classification import ClassificationEncoder
from lorakeet.data.encode.encoder import Fault, Sample
from lorakeet.data.encode.masked import MaskedEncoder
from lorakeet.data.encode.pairs import PairEncoder
from lorakeet.data.encode.question import QuestionEncoder, answer_span
from lorakeet.data.encode.seq2seq import Seq2SeqEncoder
from lorakeet.data.encode.tagging import TaggingEncoder, word_labels
from lorakeet.data.rows.label_set import LabelSet
from lorakeet.errors import BaseModelError

PIECES = wordpiece_tokenizer()
TWO = LabelSet(("ham", "spam"), "single_label")


def samples(encoder: Any, **batch: list[Any]) -> list[Sample]:
    count = len(next(iter(batch.values())))
    made, found = encoder(batch, range(count))
    assert not found and set(made) == set(encoder.features())
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


def faults(encoder: Any, **batch: list[Any]) -> list[Fault]:
    """Encode rows that cannot be samples."""
    made, found = encoder(batch, range(len(next(iter(batch.values())))))
    assert not made["row"]
    return [fault for _, fault in found]


def told(sample: Sample, column: str = "input_ids") -> str:
    return " ".join(PIECES.convert_ids_to_tokens(sample[column]))


def test_texts_and_their_class() -> None:
    one, two = samples(
        ClassificationEncoder(PIECES, 6, TWO, False), text=["The birds", "unbelievable world"], label=["spam", "ham"]
    )
    assert told(one) == "[CLS] the bird ##s [SEP]" and told(two) == "[CLS] un ##believ ##able world [SEP]"
    assert [(s["labels"], s["targets"], s["cut"]) for s in (one, two)] == [(1, 1, False), (0, 1, False)]
    [cut] = samples(ClassificationEncoder(PIECES, 5, TWO, False), text=["unbelievable world"], label=["ham"])
    assert told(cut) == "[CLS] un ##believ ##able [SEP]" and cut["cut"]  # the special tokens stay
    assert "token_type_ids" not in cut


def test_pairs_of_texts_tell_which_is_which() -> None:
    [pair] = samples(ClassificationEncoder(PIECES, 9, TWO, True), text=["the bird"], text_pair=["sing"], label=[1])
    assert told(pair) == "[CLS] the bird [SEP] sing [SEP]" and pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    [pair] = samples(
        ClassificationEncoder(PIECES, 6, TWO, True), text=["the bird s s s"], text_pair=["sing"], label=[1]
    )
    assert told(pair) == "[CLS] the bird [SEP] sing [SEP]" and pair["cut"]  # the longer one is cut
    assert "token_type_ids" not in ClassificationEncoder(bpe_tokenizer(), 9, TWO, True).model_columns()


def test_the_kinds_of_labels() -> None:
    several = ClassificationEncoder(PIECES, 9, LabelSet(("a", "b", "c"), "multi_label"), False)
    rows = samples(several, text=["the"] * 3, label=[["c", "a"], [], ["b"]])
    assert [row["labels"] for row in rows] == [[1.0, 0.0, 1.0], [0.0] * 3, [0.0, 1.0, 0.0]]
    value = ClassificationEncoder(PIECES, 9, LabelSet((), "regression"), False)
    assert [row["labels"] for row in samples(value, text=["the"] * 2, label=[2.5, 1])] == [2.5, 1.0]
    [wrong] = faults(ClassificationEncoder(PIECES, 9, TWO, False), text=["the"], label=["sapm"])
    assert wrong.code == "label_unknown" and "did you mean 'spam'" in wrong.message


# ---- tags ---------------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.text("birdsunave'.,-THE é", min_size=1).filter(str.strip), min_size=1, max_size=8)


@settings(deadline=None)
@given(words=WORDS, most=st.integers(4, 30))
def test_tags_as_the_library_aligns_them(words: list[str], most: int) -> None:
    names = LabelSet(tuple(str(number) for number in range(len(words))))
    [sample] = samples(TaggingEncoder(PIECES, most, names), tokens=[words], tags=[list(range(len(words)))])
    truth = PIECES(words, is_split_into_words=True, truncation=True, max_length=most)
    expected, before = [], None
    for word in truth.word_ids():
        expected.append(-100 if word is None or word == before else word)
        before = word
    assert (sample["input_ids"], sample["labels"]) == (truth["input_ids"], expected)
    assert sample["targets"] == sum(label != -100 for label in expected)


def test_a_word_has_its_tag_on_its_first_token() -> None:
    names = LabelSet(("O", "B", "I"))
    rows = {"tokens": [["The", "unbelievable", "bird's", "don't"]], "tags": [["O", "B", "I", "O"]]}
    [sample] = samples(TaggingEncoder(PIECES, 99, names), **rows)
    assert list(zip(told(sample).split(), sample["labels"], strict=True)) == [
        *(("[CLS]", -100), ("the", 0), ("un", 1), ("##believ", -100), ("##able", -100)),
        *(("bird", 2), ("'", -100), ("s", -100), ("don", 0), ("'", -100), ("t", -100), ("[SEP]", -100)),
    ]
    [cut] = samples(TaggingEncoder(PIECES, 5, names), **rows)
    assert (cut["labels"], cut["targets"], cut["lost"], cut["cut"]) == ([-100, 0, 1, -100, -100], 2, 2, True)


@pytest.mark.parametrize(
    "tokenizer", [bpe_tokenizer(), bpe_tokenizer(trim_offsets=False), piece_tokenizer(), piece_tokenizer(True)]
)
def test_the_space_before_a_word_belongs_to_it(tokenizer: Any) -> None:
    words = ["birds", "bird", "s", "the", "a", "sing"]
    [sample] = samples(TaggingEncoder(tokenizer, 99, LabelSet(tuple("012345"))), tokens=[words], tags=[list(range(6))])
    first: dict[int, str] = {}
    for at, label in enumerate(sample["labels"]):
        if label != -100:
            end = next((k for k in range(at + 1, len(sample["labels"])) if sample["labels"][k] != -100), None)
            first[label] = tokenizer.decode(sample["input_ids"][at:end]).strip()
    assert first == dict(enumerate(words))


def test_offsets_of_words() -> None:
    assert word_labels(["ab", "c"], [7, 8], [(0, 0), (0, 1), (1, 2), (3, 4)]) == [-100, 7, -100, 8]
    assert word_labels(["ab", "c"], [7, 8], [(0, 2), (2, 4)]) == [7, 8]  # the space is in the token
    assert word_labels(["ab", "c"], [7, 8], [(0, 2), (2, 3), (3, 4)]) == [7, -100, 8]  # or is one
    assert word_labels(["ab", "", "c"], [7, 8, 9], [(0, 2), (4, 5)]) == [7, 9]
    assert word_labels(["ab", "c", "d"], [7, 8, 9], [(0, 4), (5, 6)]) == [7, 9]  # a token of two words


# ---- pairs, translations, gaps -------------------------------------------------------------------------------


def test_texts_that_belong_together() -> None:
    encoder = PairEncoder(PIECES, 5, ("anchor", "positive", "negative"))
    [row] = samples(encoder, anchor=["the"], positive=["the bird sing world"], negative=["who"])
    assert [told(row, name) for name in ("input_ids", "positive_ids", "negative_ids")] == [
        "[CLS] the [SEP]", "[CLS] the bird sing [SEP]", "[CLS] who [SEP]"
    ]  # fmt: skip
    assert (row["length"], row["cut"], row["targets"]) == (5, True, 1)
    assert set(PairEncoder(PIECES, 5, ("anchor", "positive")).model_columns()) == {"input_ids", "positive_ids"}


def test_what_is_read_and_what_is_written() -> None:
    tokenizer = piece_tokenizer()
    encoder = Seq2SeqEncoder(tokenizer, 4)
    one, two = samples(encoder, source=["the bird", "the bird sing the"], target=["sing", "the bird sing the"])
    end = tokenizer.eos_token_id
    assert one["input_ids"] == tokenizer("the bird")["input_ids"]
    assert one["labels"] == [*tokenizer("sing")["input_ids"], end] and one["ended"] and not one["cut"]
    assert two["labels"] == tokenizer("the bird sing the")["input_ids"][:4]
    assert (two["ended"], two["cut"], two["lost"], two["targets"]) == (False, True, 2, 4)


def test_texts_with_gaps_to_come() -> None:
    [row] = samples(MaskedEncoder(PIECES, 99, True), text=["The birds don't [MASK]"])
    assert told(row).split()[:7] == ["[CLS]", "the", "bird", "##s", "don", "'", "t"]
    assert row["words"][:7] == [-1, 0, 1, 1, 2, 3, 4] and row["words"][-1] == -1
    [plain] = samples(MaskedEncoder(PIECES, 4, False), text=["the bird sing"])
    assert told(plain) == "[CLS] the bird [SEP]" and (plain["targets"], plain["cut"]) == (2, True)
    assert "words" not in plain


# ---- questions ------------------------------------------------------------------------------------------------------------


def test_an_answer_in_its_text() -> None:
    context = "The birds sing in Hanoi."
    rows = {
        "question": ["Where?"] * 2,
        "context": [context] * 2,
        "answers": [["birds sing"], []],
        "answer_start": [[4], []],
    }
    found, none = samples(QuestionEncoder(PIECES, 64), **rows)
    tokens = told(found).split()
    assert tokens[found["start_positions"] : found["end_positions"] + 1] == ["bird", "##s", "sing"]
    assert found["token_type_ids"] == [0] * 4 + [1] * (len(tokens) - 4)
    assert (none["start_positions"], none["end_positions"], none["targets"]) == (0, 0, 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 5), st.integers(14, 40))
def test_a_long_text_becomes_windows(start: int, count: int, most: int) -> None:
    answer = list(LETTERS[start : start + count])
    rows = {"answers": [[" ".join(answer)]], "answer_start": [[2 * start]]}
    windows = samples(QuestionEncoder(PIECES, most), question=["who?"], context=[" ".join(LETTERS)], **rows)
    seen = ""
    for window in windows:
        tokens = told(window).split()
        assert len(tokens) <= most and window["row"] == 0 and tokens[:4] == ["[CLS]", "who", "?", "[SEP]"]
        span = tokens[window["start_positions"] : window["end_positions"] + 1]
        assert span == (answer if set(answer) <= set(tokens) else ["[CLS]"])
        seen += "".join(tokens[4:-1])
    assert sorted(set(seen)) == sorted(LETTERS)  # the windows cover the text
    if count <= most // 6:  # no longer than the overlap: whole in one of the windows
        assert any(window["start_positions"] for window in windows)


def test_a_long_question_leaves_room_for_the_text() -> None:
    rows = {"question": ["who " * 50], "context": ["the bird"], "answers": [["bird"]], "answer_start": [[4]]}
    [sample] = samples(QuestionEncoder(PIECES, 20), **rows)
    assert sample["cut"] and sample["length"] <= 20
    assert told(sample).split()[sample["start_positions"]] == "bird"


def test_where_answers_stand() -> None:
    assert answer_span("a bird sings", [" bird "], [1]) == (2, 6)
    assert answer_span("a bird", [], []) is None and answer_span("a  b", [" "], [1]) is None
    for start in (-1, 1, 99):
        with pytest.raises(ValueError, match="is not at character"):
            answer_span("a bird", ["bird"], [start])
    rows = {"question": ["who"], "context": ["the bird"], "answers": [["bird"]], "answer_start": [[3]]}
    [wrong] = faults(QuestionEncoder(PIECES, 20), **rows)
    assert wrong.code == "answer_place" and "'bird' is not at character 3" in wrong.message


def test_tokenizers_that_do_not_tell_where_their_tokens_stand() -> None:
    from transformers import ByT5Tokenizer

    for make in (
        lambda t: TaggingEncoder(t, 9, TWO),
        lambda t: QuestionEncoder(t, 9),
        lambda t: MaskedEncoder(t, 9, True),
    ):
        with pytest.raises(BaseModelError, match="has no token offsets"):
            make(ByT5Tokenizer())
