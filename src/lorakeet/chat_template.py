"""Conversations become text by the tokenizer's chat template: one renderer for training and inference alike.

Where only the assistant's turns are learned, their place in the rendered text is proven, never guessed:

- a template with ``{% generation %}`` marks says itself what the assistant writes;
- else a turn is what the rendering has beyond the prompt that generation would see at this point, if that prompt is
  the beginning of the text, and the rendering up to this turn as well;
- else (a template that renders a turn differently once others follow) the turns are rendered with a sentinel in place
  of their contents, and the pieces around the sentinels must make up the true text together with the contents.

The text is then tokenised once, and characters become tokens by their offsets.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorakeet.errors import BaseModelError, DataError

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TRIMS = (  # what templates do to contents, the first that explains a text; str: nothing
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda content: content.strip("\n"),
    lambda content: content.lstrip("\n"),
    lambda content: content.rstrip("\n"),
)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Tools | None = None,
) -> str:
    """The text of a conversation, as the model's authors rendered it.

    The template writes the special tokens itself: tokenise the result with ``add_special_tokens=False``.

    Args:
        messages: each with ``role`` (system, user, assistant, tool) and ``content``; calls of tools may have none.
        add_generation_prompt: end with the opening of the assistant's turn, for the model to go on.
        tools: JSON schemas of the tools that may be called.

    Raises:
        BaseModelError: the tokenizer has no chat template.
        DataError: names every malformed message at once, or tells why the template refuses the conversation.
    """
    return _render(tokenizer, messages, tools, add_generation_prompt)[0]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None, given: int = 0
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant writes it: [length] both.

    The end of the assistant's turn is learned with it, as far as the template marks one.

    Args:
        given: the first so many messages are never learned, whoever wrote them.

    Raises:
        BaseModelError: no chat template, or a tokenizer that does not tell the place of its tokens.
        DataError: see :func:`render_chat` and :func:`assistant_turns`.
    """
    check_offsets(tokenizer)
    text, turns = assistant_turns(tokenizer, messages, tools, given)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], learned_tokens(text, encoded["offset_mapping"], turns)


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot tell where in the text its tokens stand."""
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} does not tell where in a text its tokens stand",
            "use a model that has a tokenizer.json, or learn every token: data.learn=all",
        )


def assistant_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None, given: int = 0
) -> tuple[str, list[Span]]:
    """The rendered conversation, and where in it the assistant's turns stand, each with the sign that ends it.

    Raises:
        BaseModelError: the tokenizer has no chat template.
        DataError: the conversation is malformed, or the template changes a turn so that its place cannot be proven.
    """
    text, marked = _render(tokenizer, messages, tools, False)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k >= given]
    if marked is not None:
        spans = _after(tokenizer, messages[:given], tools, text, marked)
    else:
        spans = _by_prompts(tokenizer, messages, tools, text, turns)
        if spans is None:
            spans = _by_sentinels(tokenizer, messages, tools, text, turns)
    if spans is None:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} changes what the assistant says, so that its turns cannot be "
            "told from the rest",
            "learn every token: data.learn=all; or put {% generation %} marks into the template",
        )
    return text, spans


def learned_tokens(text: str, offsets: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token stands in one of ``spans``, which are in order; ``offsets``: first and last + 1 character of each.

    A token across a border counts as inside only where all that it holds of the outside is white space.
    """
    learned, before, at = [], 0, 0
    for start, end in offsets:
        if before < start and text[before:start].isspace():  # some tokenizers leave white space out of their offsets
            start, end = before, max(end, start)
        before = max(before, end)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        first, last = spans[at] if at < len(spans) else (len(text) + 1, len(text) + 1)
        touches = start < last and (end > first or start == end >= first)
        outside = text[start:first] + text[last:end]
        learned.append(touches and (not outside or outside.isspace()))
    return learned


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None, prompt: bool
) -> tuple[str, list[Span] | None]:
    """The text, and what its ``{% generation %}`` marks enclose; None for a template without them."""
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it cannot render a conversation",
            "use a model that was trained to chat (often named ...-Instruct), or plain text",
        )
    if problems := _problems(messages):
        raise DataError(f"malformed conversation: {'; '.join(problems)}")
    listed = None if tools is None else [dict(tool) for tool in tools]
    try:
        template = tokenizer.get_chat_template(tools=listed)
        marks = bool(_MARK.search(template))
        [text], spans = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=listed,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the conversation: {error}") from error
    return text, [(start, end) for start, end in spans[0]] if marks else None


def _after(
    tokenizer: PreTrainedTokenizerBase, given: Sequence[Message], tools: Tools | None, text: str, spans: Sequence[Span]
) -> list[Span] | None:
    """The ``spans`` behind the ``given`` messages; None where these are not the beginning of ``text``."""
    beginning = render_chat(tokenizer, given, False, tools) if given else ""
    if not text.startswith(beginning):
        return None
    return [(start, end) for start, end in spans if start >= len(beginning) and start < end]


def _by_prompts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    text: str,
    turns: Sequence[int],
) -> list[Span] | None:
    """Turn k is what ``messages[:k + 1]`` have beyond the prompt made of ``messages[:k]``."""
    spans = []
    for k in turns:
        prompt = _prompt(tokenizer, messages[:k], tools)
        after = text if k + 1 == len(messages) else render_chat(tokenizer, messages[: k + 1], False, tools)
        if prompt is None or not (after.startswith(prompt) and text.startswith(after)):
            return None
        spans.append((len(prompt), max(len(prompt), len(after.rstrip()))))  # nobody writes the line feed behind the end
    return [(start, end) for start, end in spans if start < end]


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None) -> str | None:
    """What generation would see; None where the template takes no such conversation."""
    try:
        return render_chat(tokenizer, messages, True, tools)
    except DataError:
        return None


def _by_sentinels(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    text: str,
    turns: Sequence[int],
) -> list[Span] | None:
    """Contents are found between the pieces that stand around sentinels, if both together make up ``text``."""
    if any(messages[k].keys() - {"role", "content"} for k in turns):
        return None  # calls of tools, thoughts: parts of a turn that are no content
    secret = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:20]
    marks = {k: f"{secret}x{k}x" for k in turns}
    masked = [{**message, "content": marks[k]} if k in marks else message for k, message in enumerate(messages)]
    rest, pieces = render_chat(tokenizer, masked, False, tools), []
    for mark in marks.values():
        piece, found, rest = rest.partition(mark)
        if not found or secret in piece:
            return None
        pieces.append(piece)
    if secret in rest:
        return None
    for trim in _TRIMS:
        contents = [trim(messages[k]["content"]) for k in turns]
        if text == "".join(piece + content for piece, content in zip(pieces, contents, strict=True)) + rest:
            break
    else:
        return None
    spans, at = [], 0
    for number, (k, content) in enumerate(zip(turns, contents, strict=True)):
        at += len(pieces[number])
        start, at = at, at + len(content)
        following = pieces[number + 1] if number + 1 < len(turns) else rest
        last = render_chat(tokenizer, masked[: k + 1], False, tools).rpartition(marks[k])[2]
        prompt = _prompt(tokenizer, messages[:k], tools)
        if prompt is not None and text.startswith(
            prompt
        ):  # what stands between the prompt and the content is written too
            start = min(start, len(prompt))
        spans.append((start, at + _ending(tokenizer, following, last.rstrip())))
    return [(start, end) for start, end in spans if start < end]


def _ending(tokenizer: PreTrainedTokenizerBase, following: str, last: str) -> int:
    """Characters of ``following`` that end a turn: as after the last turn of all, else up to an added token."""
    if following.startswith(last):
        return len(last)
    blank = len(following) - len(following.lstrip())
    tokens = [token for token in tokenizer.get_added_vocab() if following.startswith(token, blank)]
    return blank + len(max(tokens, key=len)) if tokens else 0


def _problems(messages: Sequence[Message]) -> list[str]:
    if not messages:
        return ["it has no message"]
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
