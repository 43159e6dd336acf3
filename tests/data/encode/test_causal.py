"""Texts, prompts with completions and conversations to samples, token by token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.task_tokenizers import bpe_tokenizer, layout, piece_tokenizer, wordpiece_tokenizer
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.encode.chat import ChatEncoder, InstructionEncoder
from lorakeet.data.encode.encoder import Encoder, Fault, Sample, cannot_encode
from lorakeet.data.encode.kinds import make_encoder
from lorakeet.data.encode.text import CompletionEncoder, TextEncoder
from lorakeet.errors import BaseModelError, DataError

CAUSAL = TaskSettings(type="CAUSAL_LM")
CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def samples(encoder: Any, **batch: list[Any]) -> list[Sample]:
    count = len(next(iter(batch.values())))
    made, faults = encoder(batch, list(range(10, 10 + count)))
    assert not faults and set(made) == set(encoder.features()) and len({len(values) for values in made.values()}) == 1
    return [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]


def learned(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[str]:
    return [
        tokenizer.decode([token])
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
        if label != -100
    ]


def test_a_text_and_its_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    short, exact, long, lone = samples(TextEncoder(byte_tokenizer, 4, True), text=["abc", "abcd", "abcdef", ""])
    end = byte_tokenizer.eos_token_id
    assert byte_tokenizer.decode(short["input_ids"]) == "abc<|end|>" and short["ended"] and not short["cut"]
    assert (short["targets"], short["lost"], short["length"], short["row"]) == (3, 0, 4, 10)
    assert (exact["cut"], exact["ended"], exact["targets"], exact["lost"]) == (True, False, 3, 1)
    assert (long["cut"], long["lost"], byte_tokenizer.decode(long["input_ids"])) == (True, 3, "abcd")
    assert lone["input_ids"] == [end] and lone["targets"] == 0  # nothing stands before its only token
    assert "labels" not in short


@pytest.mark.parametrize("tokenizer", [bpe_tokenizer(), piece_tokenizer(), wordpiece_tokenizer()])
@settings(deadline=None)
@given(texts=st.lists(st.text("ab ir\n<|end>éß中", max_size=12), min_size=1, max_size=4))
def test_ids_without_offsets_are_those_with_them(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    encoder = TextEncoder(tokenizer, 99, True)
    tokenizer("ab ir", truncation=True, max_length=1, padding="max_length")  # options of the last call are not kept
    with pytest.MonkeyPatch.context() as patch:
        given_whole = []
        patch.setattr(
            type(encoder), "tokens", lambda self, batch: given_whole.extend(batch) or Encoder.tokens(self, batch)
        )
        ids = encoder.token_ids(texts)
    assert ids == [tokenizer(text)["input_ids"] for text in texts]
    assert given_whole == texts[:1]


@settings(deadline=None)
@given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12), most=st.integers(2, 40))
def test_a_prompt_is_never_learned_and_a_completion_always(prompt: str, completion: str, most: int) -> None:
    tokenizer = BYTES
    [sample] = samples(CompletionEncoder(tokenizer, most, False), prompt=[prompt], completion=[completion])
    before, after = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
    after = after if after[-1:] == [tokenizer.eos_token_id] else [*after, tokenizer.eos_token_id]
    ids, labels = [*before, *after], [*[-100] * len(before), *after]
    assert (sample["input_ids"], sample["labels"]) == (ids[:most], labels[:most])
    assert sample["targets"] == sum(label != -100 for label in labels[1:most])
    assert sample["targets"] + sample["lost"] == sum(label != -100 for label in labels[1:])
    assert sample["cut"] == (len(ids) > most) != sample["ended"]


@settings(deadline=None)
@given(prompt=st.text("ab ir\n", max_size=8), completion=st.text("ab ir\n", min_size=1, max_size=8))
def test_no_token_reaches_across_the_border(prompt: str, completion: str) -> None:
    [sample] = samples(CompletionEncoder(PAIRS, 99, False), prompt=[prompt], completion=[completion])
    given_ids = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100]
    assert given_ids == PAIRS(prompt)["input_ids"]  # what generation is given
    assert PAIRS.decode(given_ids) == prompt
    assert "".join(learned(PAIRS, sample)) == completion + "<|end|>"


BYTES, PAIRS = bpe_tokenizer(use_regex=False), bpe_tokenizer()


def test_the_border_within_a_word() -> None:
    [sample] = samples(CompletionEncoder(PAIRS, 99, False), prompt=["a "], completion=["bird"])
    assert learned(PAIRS, sample) == ["b", "ir", "d", "<|end|>"]  # as one text it would be a, " bir", d
    [sample] = samples(CompletionEncoder(PAIRS, 99, False), prompt=["a"], completion=[" bird"])
    assert learned(PAIRS, sample) == [" bir", "d", "<|end|>"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        ("the bird", "s sing", ["s", "\u2581sing", "</s>"]),
        ("the", " bird", ["\u2581bird", "</s>"]),
        ("who?\n", "bird", ["bird", "</s>"]),
        ("who?", "\nbird", ["\n", "bird", "</s>"]),
    ],
)
def test_no_space_is_put_into_the_middle(legacy: bool, prompt: str, completion: str, tokens: list[str]) -> None:
    tokenizer = piece_tokenizer(legacy)
    assert tokenizer.tokenize("bird") == ["\u2581bird"]  # what it does at the beginning of a text
    [sample] = samples(CompletionEncoder(tokenizer, 99, False), prompt=[prompt], completion=[completion])
    written = [token for token in sample["labels"] if token != -100]
    assert tokenizer.convert_ids_to_tokens(written) == tokens
    assert sample["input_ids"][: -len(tokens)] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(sample["input_ids"], skip_special_tokens=True) == prompt + completion


def test_prompts_are_those_of_generation() -> None:
    tokenizer = piece_tokenizer()
    [started] = samples(CompletionEncoder(tokenizer, 99, False), prompt=["<s>the"], completion=[" bird"])
    assert started["input_ids"].count(tokenizer.bos_token_id) == 1
    from tokenizers.processors import TemplateProcessing

    ending = bpe_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    plain, ended = samples(CompletionEncoder(ending, 99, False), prompt=["ab", "ab<|end|>"], completion=["c", "c"])
    assert ending.decode(plain["input_ids"]) == "abc<|end|>"
    assert ending.decode(ended["input_ids"]) == "ab<|end|>c<|end|>"  # the end that the user wrote stays


def test_all_of_a_completion_is_learned_where_asked(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"prompt": ["ab"], "completion": ["cd"]}
    data = DataSettings(path="x", learn="all")
    encoder = make_encoder(layout("completion", "prompt", "completion"), CAUSAL, data, byte_tokenizer)
    [sample] = samples(encoder, **rows)
    assert "labels" not in sample and sample["targets"] == 4
    [other] = samples(CompletionEncoder(byte_tokenizer, 99, False), **rows)
    assert other["input_ids"] == sample["input_ids"] and other["targets"] == 3


# ---- conversations ----------------------------------------------------------------------------------------------------


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str) -> str:
    roles = ["user", "assistant"] * len(contents)
    return json.dumps([{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)])


def test_only_the_assistant_is_learned() -> None:
    tokenizer = chat_tokenizer()
    encoder = ChatEncoder(tokenizer, 99, False)
    rows = {"messages": [turns("Hi", "Ho"), turns("a", "b", "c", "d")], "tools": [None, None], "given": [0, 2]}
    one, two = samples(encoder, **rows)
    assert "".join(learned(tokenizer, one)) == "Ho<|end|>"
    assert tokenizer.decode(one["input_ids"]) == "<user>Hi<|end|><assistant>Ho<|end|>"
    assert "".join(learned(tokenizer, two)) == "d<|end|>"
    assert one["ended"] and one["targets"] == 3 and not one["cut"]


def test_a_long_conversation_is_cut_and_says_what_is_lost() -> None:
    tokenizer = chat_tokenizer()
    rows = {
        "messages": [turns("Hi", "Ho"), turns("A very long question indeed", "Ho")],
        "tools": [None] * 2,
        "given": [0, 0],
    }
    one, two = samples(ChatEncoder(tokenizer, 22, False), **rows)
    assert (one["targets"], one["lost"], one["cut"], one["ended"]) == (2, 1, True, False)
    assert (two["targets"], two["lost"], two["labels"]) == (0, 3, [-100] * 22)
    whole = samples(ChatEncoder(tokenizer, 22, True), **rows)[0]
    assert whole["targets"] == 21 and "labels" not in whole


def test_the_end_of_a_turn_need_not_be_the_end_token() -> None:
    tokenizer = chat_tokenizer(CHATML.replace("<|end|>", "<|im_end|>\n"))
    rows = {"messages": [turns("Hi", "Ho")], "tools": [None], "given": [0]}
    assert not samples(ChatEncoder(tokenizer, 99, False), **rows)[0]["ended"]  # as text, no token of its own
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    [sample] = samples(ChatEncoder(tokenizer, 99, False), **rows)
    assert sample["ended"] and learned(tokenizer, sample) == ["H", "o", "<|im_end|>"]
    assert samples(ChatEncoder(tokenizer, 99, True), **rows)[0]["ended"]
    endless = chat_tokenizer(CHATML.replace("<|end|>", ""))
    assert not samples(ChatEncoder(endless, 99, False), **rows)[0]["ended"]


def test_a_row_that_cannot_be_rendered_says_why() -> None:
    bad = json.dumps([{"role": "robot", "content": "Hi"}])
    rows = {"messages": [turns("a", "b"), bad], "tools": [None] * 2, "given": [0, 0]}
    encoded = ChatEncoder(chat_tokenizer(), 99, False)(rows, [10, 11])
    [(row, fault)] = encoded.faults
    assert encoded.columns["row"] == [10] and row == 11 and fault.code == "template"
    assert "role 'robot'" in fault.message
    error = cannot_encode([(f"a.jsonl:{n}", fault) for n in range(5)], "a.jsonl")
    assert error.message.startswith("5 rows of a.jsonl cannot be learned: a.jsonl:0: malformed conversation")
    assert error.message.endswith("; and 2 more")
    changed, also = Fault("template", "changed", "try all"), Fault("template", "also")
    hinted = cannot_encode([("a:1", changed), ("a:2", also)], "a")
    assert (hinted.message, hinted.hint) == ("2 rows of a cannot be learned: a:1: changed; a:2: also", "try all")


def test_without_a_chat_template_instructions_are_plain_and_conversations_refused() -> None:
    tokenizer = chat_tokenizer(None)
    data = DataSettings(path="x")
    encoder = make_encoder(layout("messages", "instruction", "output"), CAUSAL, data, tokenizer)
    assert isinstance(encoder, InstructionEncoder)
    told = json.dumps(
        [{"role": r, "content": c} for r, c in [("system", "Be."), ("user", "Do it"), ("assistant", "Done")]]
    )
    [sample] = samples(encoder, messages=[told], tools=[None], given=[0])
    assert tokenizer.decode(sample["input_ids"]) == "Be.\n\nDo it\n\nDone<|end|>"
    assert "".join(learned(tokenizer, sample)) == "Done<|end|>"
    with pytest.raises(BaseModelError, match="a-model has no chat template") as caught:
        make_encoder(layout("messages", "messages"), CAUSAL, data, tokenizer)
    assert "prompt and completion" in str(caught.value.hint)


def test_what_does_not_go_together() -> None:
    with pytest.raises(DataError, match="the rows are plain texts"):
        make_encoder(layout("text", "text"), CAUSAL, DataSettings(path="x", learn="completion"), bpe_tokenizer())
    with pytest.raises(DataError, match="rows of text are not for SEQ_CLS"):
        make_encoder(layout("text", "text"), TaskSettings(type="SEQ_CLS"), DataSettings(path="x"), bpe_tokenizer())
