"""Rendering of conversations with the tokenizer's chat template, the same for training and inference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import UndefinedError
from transformers import PreTrainedTokenizerBase

from lorakeet.chat.messages import Message, plain_message
from lorakeet.chat.sandbox import render
from lorakeet.errors import BaseModelError, DataError
from lorakeet.security.shown import cut

#: Roles of a message.
ROLES = ("system", "user", "assistant", "tool")

#: Characters of a template's own message that an error shows.
_SHOWN = 1000

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    The template adds the special tokens; tokenize the result with ``add_special_tokens=False``.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Each has ``role`` (system, user, assistant, tool) and ``content``, which may be None beside tool calls.
        add_generation_prompt: End with the opening of an assistant turn, to be continued by the model.
        tools: JSON schemas of the available tools.

    Raises:
        BaseModelError: The tokenizer has no chat template.
        DataError: Messages are malformed (all are listed), or the template refuses the conversation.
    """
    return render_marked(tokenizer, messages, tools, add_generation_prompt)[0]


def with_system_turn(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return a conversation that begins with a system turn: its own if it has one, else ``system`` unless that is empty."""
    if not system or has_system_turn(messages):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def has_system_turn(messages: Sequence[Message]) -> bool:
    """Whether a conversation begins with a system turn."""
    return bool(messages) and messages[0].get("role") in ("system", "developer")


def render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None, prompt: bool
) -> tuple[str, list[Span] | None]:
    """Render a conversation, with the spans that its template marks.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The turns.
        tools: Tools that the template lists.
        prompt: End with the opening of an assistant turn.

    Returns:
        The text and the spans of its ``{% generation %}`` marks; None for the spans of a template without marks.

    Raises:
        BaseModelError: The tokenizer has no chat template.
        DataError: The conversation is malformed, or the template refuses it.
    """
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render a conversation",
            "use a chat model (often named ...-Instruct), or plain text",
        )
    if problems := _problems(messages):
        raise DataError(f"malformed conversation: {'; '.join(problems)}", "give each message a role and a content")
    _check_calls(tokenizer, messages)
    listed = None if tools is None else [dict(tool) for tool in tools]
    try:
        template = tokenizer.get_chat_template(tools=listed)
        try:
            return _apply(tokenizer, template, [plain_message(message) for message in messages], listed, prompt)
        except (UndefinedError, TypeError):  # e.g. a text is added to a content that is missing
            filled = [{"content": "", **plain_message(message)} for message in messages]
            return _apply(tokenizer, template, filled, listed, prompt)
    except Exception as error:  # whatever its expressions raise
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses the conversation: {cut(str(error), _SHOWN)}",
            "check the roles, their order and empty contents; some templates take no system turn or no tool calls",
        ) from error


def _check_calls(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Refuse calls of tools to a template that would leave them out: the turn would be rendered as an empty one."""
    calling = [str(number) for number, message in enumerate(messages, start=1) if message.get("tool_calls")]
    if calling and "tool_calls" not in str(tokenizer.chat_template):
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} has no rule for tool calls (message {', '.join(calling)})",
            "use a model whose template renders them, or leave these conversations out",
        )


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    prompt: bool,
) -> tuple[str, list[Span] | None]:
    variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
    marks = bool(_GENERATION_MARK.search(template))
    return render(template, marks, {**tokenizer.special_tokens_map, **variables})


def _problems(messages: Sequence[Message]) -> list[str]:
    """List the malformed messages of a conversation."""
    if not messages:
        return ["it has no messages"]
    problems = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {type(message).__name__}, expected role and content")
            continue
        if message.get("role") not in ROLES:
            problems.append(f"message {number} has role {message.get('role')!r}, expected {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and message.get("tool_calls")
        ):
            problems.append(f"message {number} has content {message.get('content')!r}, expected text")
    return problems
