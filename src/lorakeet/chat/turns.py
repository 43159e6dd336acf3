"""The assistant's turns in a rendered conversation, and its tokens.

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
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lorakeet.chat.messages import Message
from lorakeet.chat.template import Span, Tools, render_chat, render_marked
from lorakeet.errors import BaseModelError, DataError

_TRIMS = (  # ways in which templates trim contents; the first that reproduces the text is taken
    str,  # no trimming
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda content: content.strip("\n"),
    lambda content: content.lstrip("\n"),
    lambda content: content.rstrip("\n"),
)


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
    text, marked = render_marked(tokenizer, messages, tools, False)
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
