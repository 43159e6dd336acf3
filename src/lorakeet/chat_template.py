"""Rendering of conversations with the tokenizer's chat template, the same for training and inference.

If only the assistant's turns are in the loss, their spans in the rendered text are proven, never guessed. Three ways are
tried in turn:

- Marks: a template with ``{% generation %}`` marks states the spans itself.
- Prompts: a turn is the text beyond the prompt that generation would see at this point. That holds if the prompt, and the
  rendering up to and including the turn, are both prefixes of the text.
- Sentinels: some templates render a turn differently once others follow. The turns are rendered with a unique sentinel in
  place of each content. The pieces around the sentinels, joined with the contents, must equal the text.

The text is then tokenized once, and offsets map character spans to tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lorakeet.chat_messages import Message, plain_message
from lorakeet.errors import BaseModelError, DataError

#: Roles of a message.
ROLES = ("system", "user", "assistant", "tool")

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TRIMS = (  # ways in which templates trim contents; the first that reproduces the text is taken
    str,  # no trimming
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
    return _render(tokenizer, messages, tools, add_generation_prompt)[0]


def with_system_turn(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return a conversation that begins with a system turn: its own if it has one, else ``system`` unless that is empty."""
    if not system or has_system_turn(messages):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def has_system_turn(messages: Sequence[Message]) -> bool:
    """Whether a conversation begins with a system turn."""
    return bool(messages) and messages[0].get("role") in ("system", "developer")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None, given: int = 0
) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation, and mark the tokens of assistant turns.

    The token that ends a turn counts as part of it, if the template has one. A turn with ``train: false`` is left out.

    Args:
        tokenizer: Fast tokenizer with a chat template.
        messages: See :func:`render_chat`.
        tools: JSON schemas of the available tools.
        given: Number of messages at the start of the conversation that are never in the loss.

    Returns:
        Token ids, and for each whether it is in the loss; both of the same length.

    Raises:
        BaseModelError: The tokenizer has no chat template or no offsets.
        DataError: See :func:`render_chat` and :func:`assistant_turns`.
    """
    check_offsets(tokenizer)
    text, turns = assistant_turns(tokenizer, messages, tools, given)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], learned_tokens(text, encoded["offset_mapping"], turns)


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer returns the offsets of its tokens.

    Raises:
        BaseModelError: It is a slow tokenizer, without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BaseModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no token offsets",
            "use a model with a tokenizer.json, or put every token in the loss: data.learn=all",
        )


def assistant_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None = None, given: int = 0
) -> tuple[str, list[Span]]:
    """Render a conversation and locate the assistant turns to learn, each with the token that ends it.

    A turn with the member ``train: false`` is not one of them.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: See :func:`render_chat`.
        tools: JSON schemas of the available tools.
        given: Number of messages at the start of the conversation whose turns are left out.

    Returns:
        The text, and the span of each turn in it: first character, last character + 1.

    Raises:
        BaseModelError: The tokenizer has no chat template.
        DataError: The conversation is malformed, or the template changes a turn so that its span cannot be proven.
    """
    text, marked = _render(tokenizer, messages, tools, False)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k >= given]
    turns = [k for k in turns if messages[k].get("train", True)]
    if marked is not None:
        spans = _spans_by_marks(tokenizer, messages, tools, text, marked, given)
    else:
        spans = _spans_by_prompts(tokenizer, messages, tools, text, turns)
        if spans is None:
            spans = _spans_by_sentinels(tokenizer, messages, tools, text, turns)
    if spans is None:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} changes assistant turns, so they cannot be located in the text",
            "put every token in the loss: data.learn=all; or add {% generation %} marks to the template",
        )
    return text, spans


def learned_tokens(text: str, offsets: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """Mark the tokens inside spans of a text.

    A token across the border of a span counts as inside if its part outside is white space.

    Args:
        text: The text.
        offsets: First character and last character + 1 of each token.
        spans: Spans in order, without overlaps.

    Returns:
        For each token, whether it is inside a span.
    """
    inside, before, current = [], 0, 0
    for start, end in offsets:
        if before < start and text[before:start].isspace():  # some tokenizers leave white space out of their offsets
            start, end = before, max(end, start)
        before = max(before, end)
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        first, last = spans[current] if current < len(spans) else (len(text) + 1, len(text) + 1)
        overlaps = start < last and (end > first or start == end >= first)
        outside = text[start:first] + text[last:end]
        inside.append(overlaps and (not outside or outside.isspace()))
    return inside


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None, prompt: bool
) -> tuple[str, list[Span] | None]:
    """Return the text and the spans of its ``{% generation %}`` marks; None of a template without marks."""
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
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} refuses the conversation: {error}",
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
    marks = bool(_GENERATION_MARK.search(template))
    [text], spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=marks,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens_map,
    )
    return text, [(start, end) for start, end in spans[0]] if marks else None


def _spans_by_marks(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    text: str,
    spans: Sequence[Span],
    given: int,
) -> list[Span] | None:
    """Return the marked ``spans`` outside of messages that are not learned; None if it is not known where those are."""
    unlearned = [k for k, message in enumerate(messages) if message.get("train") is False and k >= given]
    left_out = []
    for first, end in [(0, given)] * bool(given) + [(k, k + 1) for k in unlearned]:
        before, after = (render_chat(tokenizer, messages[:k], False, tools) if k else "" for k in (first, end))
        if not (text.startswith(before) and text.startswith(after)):
            return None
        left_out.append((len(before), len(after)))
    return [
        (start, end)
        for start, end in spans
        if start < end and not any(first <= start < last for first, last in left_out)
    ]


def _spans_by_prompts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    text: str,
    turns: Sequence[int],
) -> list[Span] | None:
    """Locate turn k as the rendering of ``messages[:k + 1]`` beyond the prompt of ``messages[:k]``, or return None."""
    spans = []
    for k in turns:
        prompt = _prompt(tokenizer, messages[:k], tools)
        after = text if k + 1 == len(messages) else render_chat(tokenizer, messages[: k + 1], False, tools)
        if prompt is None or not (after.startswith(prompt) and text.startswith(after)):
            return None
        spans.append(
            (len(prompt), max(len(prompt), len(after.rstrip())))
        )  # a line feed after the end token is not generated
    return [(start, end) for start, end in spans if start < end]


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None) -> str | None:
    """Render the prompt for generation; None if the template refuses the conversation."""
    try:
        return render_chat(tokenizer, messages, True, tools)
    except DataError:
        return None


def _spans_by_sentinels(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Tools | None,
    text: str,
    turns: Sequence[int],
) -> list[Span] | None:
    """Locate the contents of turns between the pieces around sentinels, or return None."""
    if any(messages[k].keys() - {"role", "content", "train"} for k in turns):
        return None  # tool calls and thoughts are parts of a turn outside its content
    secret = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:20]
    sentinels = {k: f"{secret}x{k}x" for k in turns}
    masked = [{**message, "content": sentinels[k]} if k in sentinels else message for k, message in enumerate(messages)]
    pieces = _split_at(render_chat(tokenizer, masked, False, tools), list(sentinels.values()), secret)
    contents = pieces and _trimmed_contents([messages[k]["content"] for k in turns], pieces, text)
    if pieces is None or contents is None:
        return None
    spans, position = [], 0
    for number, k in enumerate(turns):
        position += len(pieces[number])
        start, position = position, position + len(contents[number])
        last = render_chat(tokenizer, masked[: k + 1], False, tools).rpartition(sentinels[k])[2]
        prompt = _prompt(tokenizer, messages[:k], tools)
        if prompt is not None and text.startswith(prompt):  # text between prompt and content is generated too
            start = min(start, len(prompt))
        spans.append((start, position + _ending(tokenizer, pieces[number + 1], last.rstrip())))
    return [(start, end) for start, end in spans if start < end]


def _split_at(text: str, sentinels: Sequence[str], secret: str) -> list[str] | None:
    """Split a text at each sentinel; None unless every one occurs once, in order, and ``secret`` nowhere else."""
    pieces = []
    for sentinel in sentinels:
        piece, found, text = text.partition(sentinel)
        if not found:
            return None
        pieces.append(piece)
    pieces.append(text)
    return None if any(secret in piece for piece in pieces) else pieces


def _trimmed_contents(contents: Sequence[str], pieces: Sequence[str], text: str) -> list[str] | None:
    """Trim contents so that with the pieces around them they equal ``text``; None if no way of trimming does."""
    for trim in _TRIMS:
        trimmed = [trim(content) for content in contents]
        if text == "".join(part for pair in zip(pieces, [*trimmed, ""], strict=True) for part in pair):
            return trimmed
    return None


def _ending(tokenizer: PreTrainedTokenizerBase, following: str, last: str) -> int:
    """Count the characters of ``following`` that end a turn: those after the last turn, or else up to an added token."""
    if following.startswith(last):
        return len(last)
    blank = len(following) - len(following.lstrip())
    tokens = [token for token in tokenizer.get_added_vocab() if following.startswith(token, blank)]
    return blank + len(max(tokens, key=len)) if tokens else 0


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
