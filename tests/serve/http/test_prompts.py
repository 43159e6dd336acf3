"""Conversations are rendered as the adapter was taught: its template, its system turn, and no part left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.chat_templates import CHATML
from helpers.http_server import BASE, save_adapters, save_chat_base
from helpers.tiny_base import byte_tokenizer
from lorakeet.adapter.peft_model import PeftModel
from lorakeet.base.load import load_base
from lorakeet.config import BaseSettings
from lorakeet.serve.http.errors import ApiError
from lorakeet.serve.http.prompts import chat_ids
from lorakeet.serve.http.routes.completions import _begin
from lorakeet.serve.http.schema.chat import ChatBody
from lorakeet.serve.http.schema.completions import CompletionBody
from lorakeet.serve.http.service import Service
from lorakeet.serve.http.start import Served, open_service
from lorakeet.serve.http.tools.forms import MISTRAL
from lorakeet.serve.http.tools.reader import ToolCallReader, joined

TURN = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Return a service with an adapter that was taught with a system turn, and one with a template of its own."""
    folder = tmp_path_factory.mktemp("prompts")
    base = save_chat_base(folder / "base")
    save_adapters(base, folder / "adapters", {"plain": 1, "other": 2})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("im_start", "IM_START")
    tokenizer.save_pretrained(folder / "adapters" / "other")
    loaded = load_base(BaseSettings(model=str(base), dtype="fp32"))
    adapted = PeftModel.from_pretrained(loaded.model, str(folder / "adapters" / "plain"))
    notes: dict[str, Any] = {"taught": {"chat": {"system": "be brief", "share": 1.0}}}
    adapted.save_pretrained(str(folder / "adapters" / "brief"), notes=notes)
    return open_service(BaseSettings(model=str(base), dtype="fp32"), Served(folder / "adapters", base_name=BASE))


def rendered(service: Service, adapter: str | None, *messages: dict[str, Any], **fields: Any) -> str:
    body = ChatBody(model=BASE, messages=list(messages), **fields)
    text: str = service.tokenizer.decode(chat_ids(service, body, adapter))
    return text


def test_the_system_turn_of_the_training(service: Service) -> None:
    plain = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(service, None, TURN) == rendered(service, "plain", TURN) == plain
    assert rendered(service, "brief", TURN) == f"<|im_start|>system\nbe brief<|im_end|>\n{plain}"
    own = {"role": "developer", "content": "be long"}
    assert rendered(service, "brief", own, TURN) == f"<|im_start|>system\nbe long<|im_end|>\n{plain}"


def test_the_template_of_the_adapter(service: Service) -> None:
    assert rendered(service, "other", TURN) == "<|IM_START|>user\nhi<|im_end|>\n<|IM_START|>assistant\n"
    tokenizers = service.tokenizers
    assert tokenizers.of("plain") is tokenizers.of(None) is service.tokenizer is not tokenizers.of("other")
    assert tokenizers.of("other") is tokenizers.of("other")
    service.engine.residents.load("again", "other")
    assert tokenizers.of("again") is tokenizers.of("other")
    service.engine.residents.unload("again")


def test_tools_and_their_results(service: Service) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "c", "content": "a bird"}
    text = rendered(service, None, TURN, asked, answered, tools=[tool])
    assert '"name": "look"' in text and "<tool_call>" in text and "<|im_start|>tool\na bird<|im_end|>" in text
    assert "Tools:" not in rendered(service, None, TURN, tools=[tool], tool_choice="none")
    with pytest.raises(ApiError, match="tool calls"):
        rendered(service, "other", TURN, tools=[tool])
    with pytest.raises(ApiError, match="no rule for tool calls|does not read it"):
        rendered(service, "other", TURN, asked, answered)


def test_a_template_that_reads_ids_of_calls_gets_them(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}[TOOL_CALLS] [{{ call.function.name }} {{ call.id }}]"
        "{% endfor %}{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "[TOOL_RESULTS] {{ m.content }} {{ m.tool_call_id }}{% endif %}{% endfor %}{# tools #}"
    )
    monkeypatch.setattr(service.tokenizer, "chat_template", template)
    reader = ToolCallReader(MISTRAL)
    _, [call] = joined(reader.add('[TOOL_CALLS] [{"name": "look", "arguments": {}}]') + reader.end())
    answered = {"role": "tool", "tool_call_id": call["id"], "content": "a bird"}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    expected = f"[TOOL_CALLS] [look {call['id']}][TOOL_RESULTS] a bird {call['id']}"
    assert rendered(service, None, TURN, asked, answered) == expected


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Return a service with an adapter whose tokenizer has ``a`` and ``b`` in each other's place."""
    folder = tmp_path_factory.mktemp("shifted")
    base = save_chat_base(folder / "base")
    save_adapters(base, folder / "adapters", {"plain": 1, "own": 2})
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "adapters" / "own")
    file = folder / "adapters" / "own" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return open_service(BaseSettings(model=str(base), dtype="fp32"), Served(folder / "adapters", base_name=BASE))


def test_answers_are_read_with_the_tokenizer_of_the_adapter(shifted: Service) -> None:
    """Text, log probabilities and schemas of an answer are in the adapter's own tokens."""
    vocabulary = shifted.tokenizer.get_vocab()
    own, engine = shifted.tokenizers.of("own"), shifted.engine
    assert own.get_vocab()["a"] == vocabulary["b"]
    biased = {"model": "own", "prompt": "x", "max_tokens": 3, "temperature": 0, "logprobs": 1}
    body = CompletionBody(**biased, logit_bias={str(vocabulary["a"]): 100})
    tokenizer, [ticket] = _begin(shifted, body, "own")
    while not ticket.done:
        engine.step()
    assert ticket.result().text == "bbb" and tokenizer is own
    grammar = shifted.grammars_of("own").for_schema({"const": "a"})
    assert grammar.allowed().sum() == 1
    grammar.accept(vocabulary['"'])
    assert list(grammar.allowed().nonzero()[0]) == [vocabulary["b"]]
    assert shifted.grammars_of("plain") is shifted.grammars_of(None) is shifted.grammars
