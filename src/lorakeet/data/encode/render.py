"""Rendering of a sample as text: the input of the model, and which parts of it are targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from lorakeet.config import TaskName
from lorakeet.ignore_index import IGNORE_INDEX

_LEARNED, _GIVEN, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f]"
)  # a text must not control the terminal; tab and line feed are harmless


def show_sample(
    tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int] | None = None, *, colour: bool = False
) -> str:
    """Decode a sample, special tokens included, with ``⟦ ⟧`` around tokens outside the loss, and a legend below.

    The first token is never a target, whatever its label: no token precedes it.

    Args:
        tokenizer: the one that made ``input_ids``.
        input_ids: token ids of one sample [length].
        labels: the targets [length], -100 outside the loss; None: every token is a target.
        colour: use ANSI colors in place of the brackets: green in the loss, dim outside.
    """
    learned = [at > 0 and (labels is None or labels[at] != IGNORE_INDEX) for at in range(len(input_ids))]
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


def describe_sample(
    tokenizer: Any,
    sample: Mapping[str, Any],
    task: TaskName = "CAUSAL_LM",
    names: Sequence[str] | None = None,
    *,
    colour: bool = False,
) -> str:
    """Render a sample of any task: the decoded text, and its targets.

    Args:
        tokenizer: the one that made the sample.
        sample: its columns, as the model gets them.
        task: that the sample is for.
        names: of the classes or tags, by number.
        colour: use ANSI colors in place of signs.
    """
    ids = sample["input_ids"]
    if task == "CAUSAL_LM":
        return show_sample(tokenizer, ids, sample.get("labels"), colour=colour)
    if task == "TOKEN_CLS":
        return _tagged(tokenizer, ids, sample["labels"], names, colour)
    if task == "QUESTION_ANS":
        return _answered(tokenizer, ids, sample["start_positions"], sample["end_positions"], colour)
    text = _decoded(tokenizer, ids)
    if task == "SEQ_CLS":
        return f"{text}\n({_labelled(sample['labels'], names)})"
    if task == "SEQ_2_SEQ_LM":
        return f"{text}\n→ {_marked(_decoded(tokenizer, sample['labels']), colour)}"
    others = {"+": "positive_ids", "-": "negative_ids"}
    return text + "".join(
        f"\n{sign} {_decoded(tokenizer, sample[name])}" for sign, name in others.items() if name in sample
    )


def _marked(text: str, colour: bool, signs: str = "  ") -> str:
    return f"{_LEARNED}{text}{_PLAIN}" if colour else f"{signs[0]}{text}{signs[1]}".strip(" ")


def _tagged(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int], names: Sequence[str] | None, colour: bool
) -> str:
    """Render each word with its tag after its first token."""
    shown = ""
    for at, label in enumerate(labels):
        shown += _decoded(tokenizer, ids[: at + 1])[len(_decoded(tokenizer, ids[:at])) :]
        if label != IGNORE_INDEX:
            shown += _marked(names[label] if names else str(label), colour, "⟨⟩")
    return f"{shown}\n({sum(label != IGNORE_INDEX for label in labels)} words with a tag)"


def _answered(tokenizer: Any, ids: Sequence[int], start: int, end: int, colour: bool) -> str:
    if not end:
        return f"{_decoded(tokenizer, ids)}\n(no answer in this part of the text)"
    before, upto, whole = (_decoded(tokenizer, part) for part in (ids[:start], ids[: end + 1], ids))
    answer = upto[len(before) :]
    blank = answer[: len(answer) - len(answer.lstrip())]
    return f"{before}{blank}{_marked(answer.lstrip(), colour, '⟨⟩')}{whole[len(upto) :]}"


def _labelled(label: Any, names: Sequence[str] | None) -> str:
    if isinstance(label, float):
        return f"value {label:g}"
    if isinstance(label, Sequence):
        marked = [names[at] if names else str(at) for at, value in enumerate(label) if value]
        return f"labels {', '.join(marked) or 'none'}"
    return f"label {names[label] if names else label}"


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
