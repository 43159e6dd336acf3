"""Special tokens of a text: one rule for training, evaluation, prediction and generation.

A tokenizer puts its own special tokens before and after a text, such as a start token. Where the text has the same
tokens there already, they count once. A rendered conversation has all of its special tokens from the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Options of a tokenizer's call that returns ids alone, uncut, without a warning about their number.
_IDS_ONLY = {
    "padding": False,
    "truncation": False,
    "verbose": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
}


def added_tokens(tokenizer: Any, as_target: bool = False) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before a text, or a target text, and those that it puts after."""
    text = {"text_target" if as_target else "text": "a"}
    alone: list[int] = tokenizer(**text, add_special_tokens=False, **_IDS_ONLY)["input_ids"]
    whole: list[int] = tokenizer(**text, **_IDS_ONLY)["input_ids"]
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    return [], []


def once(ids: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the ids of a text without its own copies of the special tokens that the tokenizer added.

    Args:
        ids: Token ids, with ``before`` at the start and ``after`` at the end.
        before: See :func:`added_tokens`.
        after: See :func:`added_tokens`.
    """
    start, end = len(before), len(ids) - len(after)
    same_start = _overlap(before, ids[start:end])
    same_end = _overlap(ids[start + same_start : end], after)
    if not (same_start or same_end):
        return list(ids)
    return [*before, *ids[start + same_start : end - same_end], *after]


def kept_positions(ids: Sequence[int], added: Sequence[int]) -> Sequence[int]:
    """Return the positions that remain where the texts of a sample repeat special tokens beside them.

    Args:
        ids: Token ids of one text, or of several with special tokens between them.
        added: For each 1 if the tokenizer added it, as its ``special_tokens_mask``.
    """
    specials = {token for token, is_added in zip(ids, added, strict=True) if is_added}
    if sum(map(ids.count, specials)) == sum(added):  # no text has one of them
        return range(len(ids))
    dropped: set[int] = set()
    start = 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and added[end] == added[start]:
            end += 1
        if not added[start]:  # a text between two runs of added tokens
            before, after = _run(ids, added, start, -1), _run(ids, added, end, 1)
            same_start = _overlap(before, ids[start:end])
            same_end = _overlap(ids[start + same_start : end], after)
            dropped |= {*range(start, start + same_start), *range(end - same_end, end)}
        start = end
    return [at for at in range(len(ids)) if at not in dropped]


def trimmed(tokenizer: Any, text: str, is_whole: bool = True) -> str:
    """Return a text without white space before its own start token and, if it is whole, after its own end token."""
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if start and text[:1].isspace() and text.lstrip().startswith(start):
        text = text.lstrip()
    ends = is_whole and end and text[-1:].isspace() and text.rstrip().endswith(end)
    return text.rstrip() if ends else text


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts, uncut, with special tokens around each."""
    around = added_tokens(tokenizer)
    given = [trimmed(tokenizer, text) for text in texts]
    return [once(ids, *around) for ids in tokenizer(given, **_IDS_ONLY)["input_ids"]]


def target_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that an encoder-decoder writes, uncut, with the special tokens of a target."""
    around = added_tokens(tokenizer, as_target=True)
    given = [trimmed(tokenizer, text) for text in texts]
    return [once(ids, *around) for ids in tokenizer(text_target=given, **_IDS_ONLY)["input_ids"]]


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that a causal model continues: without the tokens that end every text."""
    before, after = added_tokens(tokenizer)
    given = [trimmed(tokenizer, text, is_whole=False) for text in texts]
    whole = tokenizer(given, **_IDS_ONLY)["input_ids"]
    return [once(ids[: len(ids) - len(after)], before, ()) for ids in whole]


def rendered_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a rendered conversation, whose special tokens are all in the text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, **_IDS_ONLY)["input_ids"]
    return ids


def _run(ids: Sequence[int], added: Sequence[int], border: int, step: int) -> Sequence[int]:
    """Return the run of added tokens that ends before position ``border`` (step -1), or begins at it (step 1)."""
    at = border - 1 if step < 0 else border
    while 0 <= at < len(ids) and added[at]:
        at += step
    return ids[at + 1 : border] if step < 0 else ids[border:at]


def _overlap(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens at the end of ``first`` that ``second`` begins with."""
    most = min(len(first), len(second))
    return next((count for count in range(most, 0, -1) if list(first[-count:]) == list(second[:count])), 0)
