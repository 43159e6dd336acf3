"""One sample as a person can read it: what the model is given, and what it learns to write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lorakeet.data.collate import IGNORED

_LEARNED, _GIVEN, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # a text must not steer the terminal; tab and line feed may pass


def show_sample(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int] | None = None, *, colour: bool = False
) -> str:
    """The decoded sample, special tokens included, with ``⟦ ⟧`` around what is not learned, and a legend below.

    The first token is never learned, whatever its label: nothing stands before it that it could be predicted from.

    Args:
        tokenizer: the one that made ``input_ids``.
        input_ids: token ids of one sample [length].
        labels: the targets [length], -100 where nothing is learned; left out: every token is one.
        colour: use ANSI colours (green: learned, dim: not) in place of the brackets.
    """
    learned = [at > 0 and (labels is None or labels[at] != IGNORED) for at in range(len(input_ids))]
    before, after = (_GIVEN, _PLAIN) if colour else ("⟦", "⟧")
    shown, end = "", 0
    for is_learned, group in groupby(learned):
        start, end = end, end + len(list(group))
        piece = _decoded(tokenizer, input_ids[:end])[len(_decoded(tokenizer, input_ids[:start])) :]
        if not is_learned and end - start > 3 and len(set(input_ids[start:end])) == 1:  # padding
            piece = f"{_decoded(tokenizer, input_ids[start : start + 1])} x {end - start}"
        if is_learned:
            shown += f"{_LEARNED}{piece}{_PLAIN}" if colour else piece
        else:
            shown += f"{before}{piece}{after}"
    legend = f"{sum(learned)} of {len(learned)} tokens are learned; {before}this{after} is given, not learned."
    return f"{shown}\n({legend} {_about_end(tokenizer, input_ids, learned)})"


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return _CONTROL.sub(lambda sign: f"\\x{ord(sign[0]):02x}", text)


def _about_end(tokenizer: Any, input_ids: Sequence[int], learned: Sequence[bool]) -> str:
    end = tokenizer.eos_token_id
    if end is None:
        return "The tokenizer has no end token."
    places = [is_learned for token, is_learned in zip(input_ids, learned, strict=True) if token == end]
    if not places:
        return f"The end token {tokenizer.eos_token} is not in it."
    return f"The end token {tokenizer.eos_token} is {'learned' if any(places) else 'NOT learned'}."
