"""Calls of tools in the text of an answer, in the form that chat templates of Hermes, Qwen and SmolLM3 state."""

from __future__ import annotations

import json
import uuid
from typing import Any

from transformers import PreTrainedTokenizerBase

#: Signs around a call, which is JSON with a name and arguments.
OPENING, CLOSING = "<tool_call>", "</tool_call>"


def reads_tool_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template lists tools, and asks for calls in the form that is read here."""
    template = str(tokenizer.chat_template or "")
    special = {OPENING, CLOSING} & set(tokenizer.all_special_tokens)  # these would be left out of the text
    return "tools" in template and OPENING in template and not special


class ToolCallReader:
    """Reader of an answer, piece by piece: text passes through, and calls are kept for its end."""

    def __init__(self) -> None:
        self._held = ""  # text that is a call, or may be the beginning of one

    def add(self, text: str) -> str:
        """Return the text that is certainly no part of a call."""
        self._held += text
        place = self._held.find(OPENING)
        if place < 0:
            most = min(len(self._held), len(OPENING) - 1)
            kept = next((n for n in range(most, 0, -1) if OPENING.startswith(self._held[-n:])), 0)
            place = len(self._held) - kept
        passed, self._held = self._held[:place], self._held[place:]
        return passed

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text, and the calls; text with a call that is not whole is text."""
        rest, self._held = self._held, ""
        calls, between = [], []
        while (start := rest.find(OPENING)) >= 0 and (stop := rest.find(CLOSING, start)) >= 0:
            call = _parse(rest[start + len(OPENING) : stop])
            if call is None:
                break
            calls.append(call)
            between.append(rest[:start])
            rest = rest[stop + len(CLOSING) :]
        text = "".join([*between, rest])
        return (text if text.strip() else "") if calls else text, calls


def _parse(text: str) -> dict[str, Any] | None:
    """Return a call in OpenAI's form; None if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    called = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": called}
