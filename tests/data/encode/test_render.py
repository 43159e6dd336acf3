"""The decoded sample: which tokens are in the loss, and whether the end is."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from helpers.task_tokenizers import wordpiece_tokenizer
from lorakeet.data import PaddingCollator, show_sample
from lorakeet.data.encode.render import describe_sample


def test_everything_but_the_first_token_is_learned(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*byte_tokenizer("Tweet ☃")["input_ids"], byte_tokenizer.eos_token_id]
    shown, legend = show_sample(byte_tokenizer, ids).split("\n")
    assert shown == "⟦T⟧weet ☃<|end|>"
    assert legend.startswith("(9 of 10 tokens are learned;")
    assert "The end token <|end|> is learned." in legend


def test_labels_and_padding(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    question, answer = byte_tokenizer("Who?")["input_ids"], byte_tokenizer(" Me.")["input_ids"]
    end = byte_tokenizer.eos_token_id
    sample = {"input_ids": [*question, *answer, end], "labels": [*[-100] * len(question), *answer, end]}
    batch = PaddingCollator(end)([sample, {"input_ids": [1] * 20}])
    shown = show_sample(byte_tokenizer, batch["input_ids"][0].tolist(), batch["labels"][0].tolist())
    assert shown.startswith("⟦Who?⟧ Me.<|end|>⟦<|end|> x 11⟧\n(5 of 20 tokens")
    assert "is learned." in shown


def test_an_end_that_is_not_learned_is_said(
    byte_tokenizer: PreTrainedTokenizerFast, endless_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = byte_tokenizer("Hi")["input_ids"]
    end = byte_tokenizer.eos_token_id
    assert "The end token <|end|> is NOT learned." in show_sample(byte_tokenizer, [*ids, end], [*ids, -100])
    assert "The end token <|end|> is not in it." in show_sample(byte_tokenizer, ids)
    assert "The tokenizer has no end token." in show_sample(endless_tokenizer, ids)


def test_colours_in_place_of_brackets_and_no_control_characters(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer("a\x1b[31mb\tc")["input_ids"]
    shown = show_sample(byte_tokenizer, ids, colour=True)
    assert shown.startswith("\x1b[2ma\x1b[0m\x1b[32m\\x1b[31mb\tc\x1b[0m\n")
    assert "⟦" not in shown


def test_samples_of_every_task() -> None:
    tokenizer = wordpiece_tokenizer()
    ids = tokenizer("the birds sing")["input_ids"]
    text = "[CLS] the birds sing [SEP]"

    def shown(task: str, **columns: object) -> str:
        names = ["ham", "spam"]
        return describe_sample(tokenizer, {"input_ids": ids, **columns}, task, names)  # type: ignore[arg-type]

    assert shown("SEQ_CLS", labels=1) == f"{text}\n(label spam)"
    assert shown("SEQ_CLS", labels=[1.0, 1.0]) == f"{text}\n(labels ham, spam)"
    assert shown("SEQ_CLS", labels=[0.0, 0.0]) == f"{text}\n(labels none)"
    assert shown("SEQ_CLS", labels=2.5) == f"{text}\n(value 2.5)"
    assert shown("TOKEN_CLS", labels=[-100, 0, 1, -100, 0, -100]).startswith(
        "[CLS] the⟨ham⟩ bird⟨spam⟩s sing⟨ham⟩ [SEP]\n(3 words"
    )
    assert shown("QUESTION_ANS", start_positions=2, end_positions=3).startswith("[CLS] the ⟨birds⟩ sing")
    assert "(no answer" in shown("QUESTION_ANS", start_positions=0, end_positions=0)
    assert shown("SEQ_2_SEQ_LM", labels=ids[1:3]) == f"{text}\n→ the bird"
    assert shown("FEATURE_EXTRACTION", positive_ids=ids[1:2], negative_ids=ids[4:5]) == f"{text}\n+ the\n- sing"
    assert shown("MASKED_LM") == text
    assert shown("CAUSAL_LM", labels=[-100] * 5 + [3]).startswith("⟦[CLS] the birds sing⟧ [SEP]\n(1 of 6")
    coloured = describe_sample(tokenizer, {"input_ids": ids, "labels": ids[1:2]}, "SEQ_2_SEQ_LM", colour=True)
    assert coloured.endswith("→ \x1b[32mthe\x1b[0m")
