"""Conversations become text by the tokenizer's chat template: one renderer for training and inference alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorakeet.errors import BaseModelError, DataError

ROLES = ("system", "user", "assistant", "tool")


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    """The text of a conversation, as the model's authors rendered it.

    The template writes the special tokens itself: tokenise the result with ``add_special_tokens=False``.

    Args:
        messages: each with ``role`` (system, user, assistant, tool) and ``content``.
        add_generation_prompt: end with the opening of the assistant's turn, for the model to go on.

    Raises:
        BaseModelError: the tokenizer has no chat template.
        DataError: names every malformed message at once, or tells why the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render a conversation",
            "use a model that was trained to chat (often named ...-Instruct), or plain text",
        )
    if problems := _problems(messages):
        raise DataError(f"malformed conversation: {'; '.join(problems)}")
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the conversation: {error}") from error


def _problems(messages: Sequence[Mapping[str, str]]) -> list[str]:
    if not messages:
        return ["it has no message"]
    problems = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            problems.append(f"message {number} is {type(message).__name__}, expected role and content")
            continue
        if message.get("role") not in ROLES:
            problems.append(f"message {number} has role {message.get('role')!r}, expected {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            problems.append(f"message {number} has content {message.get('content')!r}, expected text")
    return problems
