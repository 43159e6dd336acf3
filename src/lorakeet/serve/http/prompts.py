"""Prompts of requests as token ids, rendered and tokenized as in training."""

from __future__ import annotations

import re
from typing import Any

from lorakeet.chat.messages import unread_members
from lorakeet.chat.template import render_chat, with_system_turn
from lorakeet.errors import LorakeetError
from lorakeet.facts.special_tokens import prompt_ids, rendered_ids
from lorakeet.serve.http.errors import bad_request, from_lorakeet
from lorakeet.serve.http.schema.chat import ChatBody
from lorakeet.serve.http.service import Service
from lorakeet.serve.http.tools.forms import tool_form

#: A template that reads the name of a message.
_READS_NAME = re.compile(r"""message(s\[[^\]]*\])?(\.name\b|\[['"]name['"]\]|\.get\(['"]name['"])""")


def chat_ids(service: Service, body: ChatBody, adapter: str | None) -> list[int]:
    """Return the tokens of a conversation, which ends with the opening of an assistant's turn.

    A conversation without a system turn gets the one that the adapter was taught with, as in ``lorakeet generate``.

    Raises:
        ApiError: The template does not take the conversation, or would leave out a part of it.
    """
    tokenizer, tools = service.tokenizers.of(adapter), body.offered_tools
    if tools and tool_form(tokenizer) is None:
        raise bad_request("the chat template of this model has no form of tool calls that is read here", "tools")
    reads_ids = "tool_call_id" in str(tokenizer.chat_template or "")
    messages = [message.plain(with_call_id=reads_ids) for message in body.messages]
    _check_members(tokenizer, messages)
    try:
        turns = with_system_turn(messages, service.system_turn(adapter))
        return rendered_ids(tokenizer, render_chat(tokenizer, turns, True, tools))
    except LorakeetError as error:
        raise from_lorakeet(error, "messages") from None


def _check_members(tokenizer: Any, messages: list[dict[str, Any]]) -> None:
    """Refuse members of messages that the template would leave out."""
    template = str(tokenizer.chat_template or "")
    for number, member in unread_members(template, messages):
        raise bad_request("the chat template of this model does not read it", f"messages.{number - 1}.{member}")
    for number, message in enumerate(messages):
        if "name" in message and not _READS_NAME.search(template):
            raise bad_request("the chat template of this model does not read names", f"messages.{number}.name")


def completion_ids(service: Service, prompt: str | list[int], adapter: str | None) -> list[int]:
    """Return the tokens of a prompt that is text, or token ids already; the engine checks their range."""
    if not isinstance(prompt, str):
        return prompt
    [ids] = prompt_ids(service.tokenizers.of(adapter), [prompt])
    if not ids:
        raise bad_request("a prompt has no token that the model knows", "prompt")
    return ids
