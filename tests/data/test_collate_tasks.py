"""The collator of each task: padded by position, nothing but what the model takes, gaps as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BatchEncoding

from helpers.task_tokenizers import bpe_tokenizer, wordpiece_tokenizer
from lorakeet.config import TaskSettings
from lorakeet.data.collate import MaskingCollator, PaddingCollator, PairsCollator, make_collator
from lorakeet.errors import BaseModelError, DataError

SAME = wordpiece_tokenizer(pad_token="[SEP]", eos_token="[SEP]")  # the padding token is also the end token
SEP = SAME.sep_token_id
OTHERS = {"length": 9, "words": [0], "row": 1}


def collate(task: str, samples: list[dict[str, Any]], model: Any = None, **more: Any) -> dict[str, Any]:
    batch = make_collator(TaskSettings(type=task, **more), SAME, model)([{**OTHERS, **sample} for sample in samples])
    assert type(batch) is dict and not isinstance(batch, BatchEncoding)
    return batch


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_classes() -> None:
    samples = [{"input_ids": [2, 9, SEP], "labels": 1}, {"input_ids": [2, SEP], "labels": 0}]
    assert as_lists(collate("SEQ_CLS", samples)) == {
        "input_ids": [[2, 9, SEP], [2, SEP, SEP]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],  # the real end is seen, the padding is not
        "labels": [1, 0],
    }
    pair = {"input_ids": [2, SEP], "token_type_ids": [0, 1], "labels": 0}
    assert collate("SEQ_CLS", [pair, {**pair, "input_ids": [2, 9, SEP], "token_type_ids": [0, 0, 1]}])[
        "token_type_ids"
    ].tolist()[1] == [0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "dtype"), [((1, 0), torch.int64), ((0.5, 2.0), torch.float32), (([1.0, 0.0], [1.0, 1.0]), torch.float32)]
)
def test_labels_have_the_type_that_their_loss_wants(labels: tuple[Any, Any], dtype: torch.dtype) -> None:
    batch = collate("SEQ_CLS", [{"input_ids": [2], "labels": label} for label in labels])
    assert batch["labels"].dtype == dtype and batch["labels"].tolist() == list(labels)


def test_tags() -> None:
    samples = [{"input_ids": [2, 9, SEP], "labels": [-100, 1, -100]}, {"input_ids": [2, SEP], "labels": [0, -100]}]
    batch = as_lists(collate("TOKEN_CLS", samples))
    assert batch["labels"] == [[-100, 1, -100], [0, -100, -100]] and batch["attention_mask"] == [[1, 1, 1], [1, 1, 0]]


def test_translations() -> None:
    config = BartConfig(
        vocab_size=len(SAME),
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=SEP,
        decoder_start_token_id=2,
    )
    samples = [{"input_ids": [2, 9, SEP], "labels": [7, SEP]}, {"input_ids": [2, SEP], "labels": [7, 8, SEP]}]
    batch = as_lists(collate("SEQ_2_SEQ_LM", samples, BartForConditionalGeneration(config)))
    assert batch == {
        "input_ids": [[2, 9, SEP], [2, SEP, SEP]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[7, SEP, -100], [7, 8, SEP]],  # both ends are learned
        "decoder_input_ids": [[2, 7, SEP], [2, 7, 8]],
    }
    assert "decoder_input_ids" not in collate("SEQ_2_SEQ_LM", samples)


def test_questions() -> None:
    samples = [
        {"input_ids": [2, 9, SEP], "start_positions": 1, "end_positions": 2},
        {"input_ids": [2], "start_positions": 0, "end_positions": 0},
    ]
    batch = as_lists(collate("QUESTION_ANS", samples))
    assert (batch["start_positions"], batch["end_positions"]) == ([1, 0], [2, 0])
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_pairs() -> None:
    samples = [{"input_ids": [2, 9], "positive_ids": [2]}, {"input_ids": [2], "positive_ids": [2, 9, SEP]}]
    assert as_lists(collate("FEATURE_EXTRACTION", samples)) == {
        "input_ids": [[2, 9], [2, SEP]],
        "attention_mask": [[1, 1], [1, 0]],
        "positive_input_ids": [[2, SEP, SEP], [2, 9, SEP]],
        "positive_attention_mask": [[1, 0, 0], [1, 1, 1]],
    }
    batch = collate("FEATURE_EXTRACTION", [{**sample, "negative_ids": [5]} for sample in samples])
    assert batch["negative_input_ids"].tolist() == [[5], [5]]
    with pytest.raises(DataError, match="no samples"):
        PairsCollator(0)([])


def test_a_causal_model_gets_our_own() -> None:
    assert make_collator(TaskSettings(type="CAUSAL_LM"), SAME) == PaddingCollator(SEP)
    bare = bpe_tokenizer()
    bare.pad_token = None
    assert make_collator(TaskSettings(type="CAUSAL_LM"), bare) == PaddingCollator(0)
    with pytest.raises(BaseModelError, match="a-model has no padding token"):
        make_collator(TaskSettings(type="SEQ_CLS"), bare)
    with pytest.raises(BaseModelError, match="a-model has no mask token"):
        make_collator(TaskSettings(type="MASKED_LM"), bpe_tokenizer())


# ---- gaps -----------------------------------------------------------------------------------------------------------------

MASK = SAME.mask_token_id
ROWS, LENGTH = 64, 128


def many(whole_word: bool) -> list[dict[str, Any]]:
    """Texts of 126 tokens between special ones, in words of three; the last texts are shorter."""
    letters = torch.randint(5, len(SAME), (ROWS, LENGTH - 2), generator=torch.Generator().manual_seed(1)).tolist()
    made = []
    for number, ids in enumerate(letters):
        count = LENGTH - 2 - 3 * (number % 4)
        made.append({"input_ids": [2, *ids[:count], SEP], "words": [-1, *(at // 3 for at in range(count)), -1]})
    return made


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_gaps_are_as_published(whole_word: bool, probability: float) -> None:
    samples = many(whole_word)
    torch.manual_seed(3)
    batch = MaskingCollator(SAME, probability, whole_word)(samples)
    real = torch.nn.utils.rnn.pad_sequence([torch.tensor(s["input_ids"]) for s in samples], True, SEP)
    gaps = batch["labels"].ne(-100)
    assert torch.equal(batch["labels"][gaps], real[gaps])
    assert torch.equal(batch["input_ids"][~gaps], real[~gaps])
    assert batch["attention_mask"].sum(1).tolist() == [len(s["input_ids"]) for s in samples]
    special = real.eq(2) | real.eq(SEP)
    assert not (gaps & special).any()

    def near(count: int, total: int, share: float, size: int = 1) -> None:
        sigma = (size * share * (1 - share) / total) ** 0.5
        assert abs(count / total - share) < 4 * sigma, (count / total, share, sigma)

    near(int(gaps.sum()), int((~special).sum()), probability, 3 if whole_word else 1)
    chosen, total = batch["input_ids"][gaps], int(gaps.sum())
    kept = chosen.eq(batch["labels"][gaps])
    by_chance = 0.1 / len(SAME)  # a random token that happens to be the mask, or the true one
    near(int(chosen.eq(MASK).sum()), total, 0.8 + by_chance)
    near(int(kept.sum()), total, 0.1 + by_chance)
    near(int((~kept & chosen.ne(MASK)).sum()), total, 0.1 - 2 * by_chance)


def test_a_word_is_chosen_whole_or_not_at_all() -> None:
    samples = many(True)
    batch = MaskingCollator(SAME, 0.3, True)(samples)
    words = 0
    for sample, labels in zip(samples, batch["labels"].tolist(), strict=True):
        for word in range(max(sample["words"]) + 1):
            places = [at for at, number in enumerate(sample["words"]) if number == word]
            flags = {labels[at] != -100 for at in places}
            assert len(flags) == 1
            words += flags == {True}
    assert words > 500
    single = MaskingCollator(SAME, 0.3, False)(samples)["labels"].ne(-100)
    inner = single[:, 1:100].reshape(ROWS, 33, 3)
    assert (inner.any(-1) & ~inner.all(-1)).any()  # without it, parts of words are chosen


@pytest.mark.parametrize("whole_word", [False, True])
def test_gaps_come_from_the_generator_of_torch(whole_word: bool) -> None:
    collator = MaskingCollator(SAME, 0.15, whole_word)
    batches = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        batches.append(collator(many(whole_word)))
    assert as_lists(batches[0]) == as_lists(batches[1]) != as_lists(batches[2])


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_batch_always_has_a_gap(whole_word: bool) -> None:
    collator = MaskingCollator(SAME, 0.05, whole_word)
    short = [{"input_ids": [2, 9, SEP], "words": [-1, 0, -1]}]
    assert all(collator(short)["labels"].tolist() == [[-100, 9, -100]] for _ in range(20))
    with pytest.raises(DataError, match="no token that could be guessed"):
        collator([{"input_ids": [2, SEP], "words": [-1, -1]}])
