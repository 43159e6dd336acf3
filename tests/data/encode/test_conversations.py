"""Conversations are learned as they are meant: calls of tools, missing contents, and turns that are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from helpers.bytewise import byte_tokenizer
from lorakeet.chat.template import render_chat
from lorakeet.config import DataSettings, TaskSettings
from lorakeet.data.doctor.examine import examine
from lorakeet.data.prepare import prepare
from lorakeet.errors import DataError

CHAT = "CAUSAL_LM"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CONTENT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
HERMES = (
    CONTENT + '{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}' + END
)
AS_TEXT = HERMES.replace(" | tojson", "")  # expects a string, as OpenAI writes it
ADDED = HERMES.replace("{{ call.function.arguments | tojson }}}", "{{ '' + call.function.arguments + '}' }}")
EITHER = HERMES.replace(
    "{{ call.function.arguments | tojson }}",
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}",
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}" + END
)


def learned(
    folder: Path, messages: Any, template: str = HERMES, suffix: str = "jsonl", learn: Any = "auto", **more: Any
) -> tuple[str, str]:
    """Return the text of the only sample of a conversation, and the part of it that is learned."""
    tokenizer, path = byte_tokenizer(), folder / f"rows.{suffix}"
    tokenizer.chat_template = template
    row = {"messages": messages, **more}
    if suffix == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps(row) + "\n")
    settings = DataSettings(path=str(path), eval_fraction=0, max_length=4096, learn=learn)
    sample = prepare(settings, TaskSettings(type=CHAT), tokenizer, seed=1).train[0]
    written = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != -100]
    return tokenizer.decode(sample["input_ids"]), tokenizer.decode(written)


def calling(arguments: Any, **members: Any) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "weather?"}, {"role": "assistant", "tool_calls": [call], **members}]


OBJECT = {"city": "Hà Nội", "days": None, "near": []}
FORMS = [OBJECT, json.dumps(OBJECT), json.dumps(json.dumps(OBJECT))]


@pytest.mark.parametrize("arguments", FORMS)
@pytest.mark.parametrize("template", [HERMES, AS_TEXT, ADDED, EITHER])
def test_arguments_of_a_call_are_one_object(arguments: Any, template: str, tmp_path: Path) -> None:
    text, target = learned(tmp_path, calling(arguments), template)
    shown = target.partition('"arguments": ')[2].removesuffix("}</tool_call><|im_end|>")
    assert json.loads(shown) == OBJECT and target in text
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert render_chat(tokenizer, calling(arguments), False) == text


def test_arguments_stay_as_they_were_written(tmp_path: Path) -> None:
    assert '"arguments": {"a":1}}' in learned(tmp_path, calling('{"a":1}'), AS_TEXT)[1]
    assert '"arguments": {}}' in learned(tmp_path, calling(""))[1]


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": json.dumps(calling(OBJECT)[1]["tool_calls"])},
        {"function_call": {"name": "f", "arguments": json.dumps(OBJECT)}, "content": None},
    ],
)
def test_calls_in_other_forms(calls: dict[str, Any], tmp_path: Path) -> None:
    conversation = [calling(OBJECT)[0], {"role": "assistant", **calls}]
    assert learned(tmp_path, conversation) == learned(tmp_path, calling(OBJECT))


def test_a_table_gives_no_call_the_arguments_of_others(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "g", "arguments": {"other": 1}}}
    conversation = [
        *calling({"city": "Hue"}),
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    target = learned(tmp_path, conversation, suffix="parquet")[1]
    assert '{"city": "Hue"}' in target and '{"other": 1}' in target


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        (calling("not JSON"), "arguments of a tool call in message 2 that are no JSON object"),
        (calling("[1]"), "no JSON object"),
        ([calling({})[0], {"role": "assistant", "tool_calls": ["f"]}], "tool_calls in message 2 that are no list"),
        (
            [calling({})[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
            "type 'image' in message 2",
        ),
        (
            [calling({})[0], {"role": "assistant", "content": "x", "weight": 0.5}],
            "weight 0.5 in message 2, expected 0 or 1",
        ),
        ([calling({})[0], {"role": "assistant", "content": "x", "mask": True}], "'mask' in message 2"),
        ([calling({})[0], {"role": "assistant", "content": "x", "train_detail": []}], "'train_detail' in message 2"),
        ([{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}], "role 'narrator'"),
    ],
)
def test_what_is_unclear_is_refused(conversation: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        learned(tmp_path, conversation)
    assert words in caught.value.message and "\n" not in caught.value.message


SHOWN = [
    "{{ m.content }}",
    "{{ '' ~ m.content }}",
    "{{ m.content + '' }}",
    "{% if m.content is defined %}{{ m.content }}{% endif %}",
]


@pytest.mark.parametrize("member", [{}, {"content": None}])
@pytest.mark.parametrize("shown", SHOWN)
def test_a_missing_content_is_nothing(member: dict[str, Any], shown: str, tmp_path: Path) -> None:
    template = HERMES.replace("{{ m.content }}", shown)
    text, target = learned(tmp_path, calling({}, **member), template)
    assert "None" not in text and target.startswith("<tool_call>")


def test_a_template_without_calls_is_no_template_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no rule for tool calls \(message 2\)"):
        learned(tmp_path, calling({}), CONTENT + END)


MARKS: list[dict[str, Any]] = [
    *({name: value} for name in ("weight", "loss", "train", "loss_weight", "loss_mask") for value in (0, False, 0.0)),
    *({name: False} for name in ("calculate_loss", "trainable", "training", "learn", "train_on_turn")),
    *({name: value} for name in ("masked", "no_loss") for value in (True, 1, "true")),
    {"weight": "0"},
    {"weight": 1, "train": False},
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_turns_that_are_marked_are_not_learned(mark: dict[str, Any], tmp_path: Path) -> None:
    conversation = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "WRONG", **mark},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "right", "weight": 1},
    ]
    text, target = learned(tmp_path, conversation)
    assert "WRONG" in text and target == "right<|im_end|>"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("template", [HERMES, MARKED])
def test_turns_are_left_out_with_any_template_and_format(suffix: str, template: str, tmp_path: Path) -> None:
    said = ["yes", "NO", "again", "NO", "end"]
    conversation = [
        turn
        for text in said
        for turn in (
            {"from": "human", "value": "?"},
            {"from": "gpt", "value": text, "weight": int(text != "NO")},
        )
    ]
    tokenizer_end = "" if template == MARKED else "<|im_end|>"
    target = learned(tmp_path, None, template, suffix, conversations=conversation)[1]
    assert target == "".join(text + tokenizer_end for text in said if text != "NO")


def test_a_system_text_comes_before_the_messages(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "be brief"}
    wanted = learned(tmp_path, [system, asked, said])
    assert learned(tmp_path, [asked, said], system="be brief") == wanted
    assert learned(tmp_path, None, prompt=[asked], completion=[said], system="be brief") == wanted
    with pytest.raises(DataError, match="the first message is a system turn too"):
        learned(tmp_path, [system, asked, said], system="be brief")


def test_columns_that_may_matter_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "completion": "b", "system": "be brief", "history": [["x", "y"]], "weight": 0, "id": 7}
    path.write_text(json.dumps(row) + "\n")
    prepare(DataSettings(path=str(path), eval_fraction=0), TaskSettings(type=CHAT), byte_tokenizer(), seed=1)
    assert "CAUSAL_LM has no use for the column 'system' and 'history' and 'weight', which may matter" in caplog.text
    found = examine(DataSettings(path=str(path)), TaskSettings(type=CHAT))
    assert found.count("unused_column") == 3 and not found.stops


def test_marks_and_the_doctor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    conversation = [
        {"role": "user", "content": "a?", "weight": 1},
        {"role": "assistant", "content": "WRONG", "weight": 0, "reasoning_content": "hm"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "right", "id": "x"},
    ]
    learned(tmp_path, conversation, tools=[{"name": "f"}], weight=1)
    for words in ("message 2 of the assistant is marked as not to be learned", "message 1 of the user is marked"):
        assert words in caplog.text
    assert "message 2 has 'reasoning_content', which the template does not read" in caplog.text
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = HERMES
    found = examine(DataSettings(path=str(tmp_path / "rows.jsonl")), TaskSettings(type=CHAT), tokenizer)
    assert [group.code for group in found.issues] == ["unused_column", "unlearned_turn", "marked_turn", "unread"]
    assert "WRONG<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n⟧right" in found.samples[0].plain
    with pytest.raises(DataError, match=r"message 2 is marked as not to be learned, but data\.learn=all"):
        learned(tmp_path, conversation, learn="all")
