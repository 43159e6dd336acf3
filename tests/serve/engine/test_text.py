"""Text of new tokens: pieces join to the whole text, characters are whole, and stop strings are cut."""

from __future__ import annotations

import pytest

from helpers.bytewise import byte_tokenizer
from lorakeet.serve.engine.text import TextStream

TOKENIZER = byte_tokenizer()


def pieces(text: str, *stop: str, prompt: str = "he said: ") -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, TOKENIZER(prompt)["input_ids"], stop)
    found = [stream.add(token) for token in TOKENIZER(text)["input_ids"]]
    return [*found, stream.end()], stream


@pytest.mark.parametrize("text", ["the weather", " a b  c ", "naïve — 日本語 🦜", "\N{REPLACEMENT CHARACTER}x", ""])
def test_whole_text(text: str) -> None:
    found, _ = pieces(text)
    assert "".join(found) == text


def test_characters_are_whole() -> None:
    found, _ = pieces("🦜é")
    assert [piece for piece in found if piece] == ["🦜", "é"]


def test_incomplete_end() -> None:
    stream = TextStream(TOKENIZER, [], ())
    tokens = TOKENIZER("a🦜")["input_ids"][:-1]
    assert "".join(map(stream.add, tokens)) + stream.end() == TOKENIZER.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("the the end", ("he e",), "the t"),  # over two tokens, after a beginning that came to nothing
        ("ab🦜cd", ("🦜c",), "ab"),
        ("aXbYc", ("Yc", "Xb"), "a"),
        ("aab", ("ab",), "a"),
        ("nothing", ("no stop",), "nothing"),
        ("stop", ("",), "stop"),
        ("\n\nuser", ("\n\nuser",), ""),
    ],
)
def test_stop(text: str, stop: tuple[str, ...], expected: str) -> None:
    found, stream = pieces(text, *stop)
    assert "".join(found) == expected
    assert stream.stopped == (expected != text)


def test_held_back() -> None:
    stream = TextStream(TOKENIZER, [], ("xyz",))
    assert [stream.add(token) for token in TOKENIZER("axyb")["input_ids"]] == ["a", "", "", "xyb"]
