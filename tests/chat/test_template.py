"""Conversations are rendered alike for training and inference, and assistant turns are found in the text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.bytewise import byte_tokenizer
from helpers.chat_templates import CHATML, STYLES, THINKING, Messages, chat_tokenizer
from lorakeet.chat.template import ROLES, render_chat
from lorakeet.chat.turns import assistant_turns, encode_chat, learned_tokens
from lorakeet.errors import BaseModelError, DataError

ASK = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}


def test_training_and_inference_see_the_same_beginning() -> None:
    tokenizer = byte_tokenizer()
    question = render_chat(tokenizer, [ASK], add_generation_prompt=True)
    whole = render_chat(tokenizer, [ASK, ANSWER], add_generation_prompt=False)
    assert question == "<s>user\nWhy?</s>\n<s>assistant\n"
    assert whole == question + "Because.</s>\n"


def test_no_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(BaseModelError, match="no chat template"):
        render_chat(tokenizer, [ASK], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("messages", "complaints"),
    [
        ([], ["no messages"]),
        ([{"role": "human", "content": "hi"}], ["message 1 has role 'human'", "system, user, assistant, tool"]),
        (
            [ASK, {"role": "bot"}, "text"],
            ["message 2 has role 'bot'", "message 2 has content None", "message 3 is str"],
        ),
        ([ASK, {"role": "system", "content": "late"}], ["system comes first"]),
    ],
)
def test_malformed_conversations(messages: Any, complaints: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        render_chat(byte_tokenizer(), messages, add_generation_prompt=True)
    assert all(complaint in caught.value.message for complaint in complaints)


# ---- tokens of assistant turns --------------------------------------------------------------------------------------

TOKENIZERS = {name: chat_tokenizer(style.template) for name, style in STYLES.items()}
MARKUP = ["<|im_end|>", "\n<|im_start|>assistant\n", "[/INST]", "</s>", "<|eot_id|>", "assistant", " ", "\n", "<think>"]
CONTENTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=3))).map("".join))


@st.composite
def conversations(draw: st.DrawFn, system: bool) -> Messages:
    roles = ["system"] * draw(st.integers(0, int(system))) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [{"role": role, "content": draw(CONTENTS)} for role in roles]


def expected(tokenizer: PreTrainedTokenizerFast, name: str, messages: Messages) -> tuple[list[int], list[bool]]:
    """Encode piece by piece: without merges no token spans two pieces."""
    ids: list[int] = []
    learned: list[bool] = []
    for piece, written in STYLES[name].pieces(messages):
        some = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids, learned = ids + some, learned + [written] * len(some)
    return ids, learned


@pytest.mark.parametrize("name", STYLES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_turns_of_the_assistant_token_by_token(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    messages = data.draw(conversations(STYLES[name].system))
    if name == "thinking":  # what it does to thoughts is another test
        messages = [{**m, "content": m["content"].replace("</think>", "")} for m in messages]
    assert encode_chat(tokenizer, messages) == expected(tokenizer, name, messages)


def test_contents_that_only_lose_their_line_feeds() -> None:
    turns = [ASK, {**ANSWER, "content": " "}, ASK, {**ANSWER, "content": "\n"}]
    assert encode_chat(TOKENIZERS["thinking"], turns) == expected(TOKENIZERS["thinking"], "thinking", turns)


@pytest.mark.parametrize("name", STYLES)
def test_what_is_learned_begins_where_the_prompt_of_generation_ends(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids, learned = encode_chat(tokenizer, [ASK, ANSWER])
    prompt = tokenizer(render_chat(tokenizer, [ASK], True), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt and learned.index(True) == len(prompt)
    told = "".join(tokenizer.decode([i]) for i, flag in zip(ids, learned, strict=True) if flag)
    assert "Because." in told and told.rpartition("Because.")[2] in (
        "<|im_end|>",
        "<|eot_id|>",
        "</s>",
        "<end_of_turn>",
        "<|end|>\n</s>",
    )


@pytest.mark.parametrize("name", STYLES)
def test_given_messages_are_not_learned(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    messages = [ASK, ANSWER, ASK, {"role": "assistant", "content": "Why not?"}]
    ids, learned = encode_chat(tokenizer, messages, given=2)
    assert encode_chat(tokenizer, messages)[0] == ids
    told = tokenizer.decode([i for i, flag in zip(ids, learned, strict=True) if flag])
    assert "Why not?" in told and "Because" not in told
    assert not any(encode_chat(tokenizer, messages, given=4)[1])


def test_a_token_across_the_border() -> None:
    tokenizer = chat_tokenizer(STYLES["mistral"].template, merges=("Ġ B", "e Ċ"))
    ids, learned = encode_chat(tokenizer, [ASK, ANSWER])
    assert [tokenizer.decode([i]) for i, flag in zip(ids, learned, strict=True) if flag][:3] == [" B", "e", "c"]
    plain = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = chat_tokenizer(plain, merges=(": B", ". Ċ"))
    ids, learned = encode_chat(tokenizer, [ASK, ANSWER])
    told = [tokenizer.decode([i]) for i, flag in zip(ids, learned, strict=True) if flag]
    assert told == [*"ecause", ".\n"]  # ":B" is the template's as well, ".\n" has only white space of it


@pytest.mark.parametrize(
    ("offsets", "learned"),
    [
        ([(0, 2), (2, 4), (4, 6)], [False, True, False]),
        ([(0, 3), (3, 6)], [False, False]),  # both hold a letter of the outside
        ([(0, 2), (2, 2), (2, 4), (4, 4), (4, 6)], [False, True, True, False, False]),  # tokens without a letter
        ([(0, 2), (2, 3), (2, 3), (3, 4), (4, 6)], [False, True, True, True, False]),  # bytes of one letter
    ],
)
def test_offsets_and_a_span(offsets: list[tuple[int, int]], learned: list[bool]) -> None:
    assert learned_tokens("ab\u00e9def", offsets, [(2, 4)]) == learned


def test_white_space_that_offsets_leave_out() -> None:
    assert learned_tokens("a: bc d", [(0, 2), (3, 5), (6, 7)], [(3, 5)]) == [False, True, False]
    assert learned_tokens("a: bc d", [(0, 2), (3, 3), (3, 5)], [(3, 5)]) == [False, False, True]
    assert learned_tokens("a: bc d", [(0, 2), (3, 5)], [(2, 5)]) == [False, True]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLING = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_calls_of_tools_are_written_by_the_assistant() -> None:
    tokenizer = chat_tokenizer(CALLING)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Hanoi"}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [ASK, asked, {"role": "tool", "content": "rain"}, ANSWER]
    text, spans = assistant_turns(tokenizer, messages, TOOLS)
    assert [text[start:end] for start, end in spans] == [
        '<tool_call>{"name": "weather", "arguments": {"place": "Hanoi"}}</tool_call><|im_end|>',
        "Because.<|im_end|>",
    ]
    assert text.startswith('<|im_start|>system\n[{"type": "function"')


def test_a_conversation_that_the_assistant_begins() -> None:
    text, spans = assistant_turns(TOKENIZERS["chatml"], [ANSWER, ASK, ANSWER])
    assert [text[start:end] for start, end in spans] == ["Because.<|im_end|>"] * 2


def test_what_cannot_be_proven_is_refused() -> None:
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."}
    with pytest.raises(DataError, match="a-model changes assistant turns") as caught:
        encode_chat(TOKENIZERS["thinking"], [ASK, thought, ASK, ANSWER])
    assert "data.learn=all" in str(caught.value.hint)
    text, spans = assistant_turns(TOKENIZERS["thinking"], [ASK, thought])  # alone, the turn can be told
    assert [text[start:end] for start, end in spans] == ["<think>\n\n</think>\n\nBecause.<|im_end|>"]
    shouting = CHATML.replace("m['content']", "(m['content'] | upper if not loop.last else m['content'])")
    with pytest.raises(DataError, match="changes assistant turns"):
        encode_chat(chat_tokenizer(shouting), [ASK, ANSWER, ASK, ANSWER])


def test_a_tokenizer_that_does_not_tell_where_its_tokens_stand() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(BaseModelError, match="has no token offsets"):
        encode_chat(ByT5Tokenizer(chat_template=CHATML), [ASK, ANSWER])


def test_what_a_template_cannot_add_up_is_told() -> None:
    with pytest.raises(DataError, match=r"a-model has no rule for tool calls \(message 2\)"):
        render_chat(chat_tokenizer(CHATML), [ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}], False)
    assert ROLES == ("system", "user", "assistant", "tool") and "split" in THINKING
