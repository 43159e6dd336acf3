"""Healthy rows of every kind and task, by their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

NOUNS = "amber birch cedar dune ember fjord grove heath islet juniper knoll lagoon marsh nook oasis".split()  # noqa: SIM905


def sentence(number: int) -> str:
    """Return a sentence that no other number has."""
    return f"{NOUNS[number % 15]} {NOUNS[number * 7 % 13]} number {number} by the {NOUNS[number * 11 % 14]}"


def turns(*pairs: str) -> list[dict[str, str]]:
    """Build messages from texts such as ``user:Hello``."""
    return [{"role": role, "content": content} for role, content in (pair.split(":", 1) for pair in pairs)]


def _question(number: int) -> Row:
    context = sentence(number)
    answers = {"text": [str(number)], "answer_start": [context.index(str(number))]}
    return {"question": f"which number, {number}?", "context": context, "answers": answers}


#: Task and kind -> a row of it by its number.
HEALTHY: dict[tuple[str, str], Callable[[int], Row]] = {
    ("CAUSAL_LM", "text"): lambda n: {"text": sentence(n)},
    ("CAUSAL_LM", "completion"): lambda n: {"prompt": f"{sentence(n)}? ", "completion": sentence(n)},
    ("CAUSAL_LM", "messages"): lambda n: {"messages": turns(f"user:{sentence(n)}?", f"assistant:{sentence(n)}.")},
    ("SEQ_CLS", "classes"): lambda n: {
        "text": sentence(n),
        "text_pair": sentence(n + 1),
        "label": ("tree", "water")[n % 2],
    },
    ("TOKEN_CLS", "tags"): lambda n: {"tokens": sentence(n).split(), "tags": ["AB"[n % 2]] * len(sentence(n).split())},
    ("SEQ_2_SEQ_LM", "translation"): lambda n: {"source": sentence(n), "target": sentence(n)[::-1]},
    ("QUESTION_ANS", "question"): _question,
    ("FEATURE_EXTRACTION", "pairs"): lambda n: {
        "anchor": sentence(n),
        "positive": f"a {sentence(n)}",
        "negative": sentence(n + 9),
    },
    ("MASKED_LM", "text"): lambda n: {"text": sentence(n)},
}
