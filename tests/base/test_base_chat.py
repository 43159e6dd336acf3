"""One renderer of conversations."""

from __future__ import annotations

from typing import Any

import pytest
from bytewise import byte_tokenizer

from lorakeet.base.chat import render_chat
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
        ([], ["no message"]),
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
