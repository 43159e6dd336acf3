"""Conversations to samples: through the model's chat template, learned where the assistant speaks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakeet.chat_template import Message, assistant_turns, check_offsets, learned_tokens, render_chat
from lorakeet.data.encode.encoder import Batch, CausalEncoder, Sample
from lorakeet.data.encode.text import CompletionEncoder
from lorakeet.data.rows.kinds import Layout
from lorakeet.errors import BaseModelError, DataError


def chat_encoder(layout: Layout, tokenizer: Any) -> type[CausalEncoder]:
    """The encoder for messages: instructions need no chat template, real conversations do."""
    plain = "instruction" in layout.columns and not tokenizer.chat_template
    return InstructionEncoder if plain else ChatEncoder


@dataclass(frozen=True)
class ChatEncoder(CausalEncoder):
    """A conversation as the chat template renders it, tokenised once; see :mod:`lorakeet.chat_template`."""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise BaseModelError(
                f"the data are conversations, but the tokenizer of {self.tokenizer.name_or_path} has no chat template",
                "use a model that was trained to chat (often named ...-Instruct), or rows with prompt and completion",
            )
        if not self.learn_all:
            check_offsets(self.tokenizer)

    def settings(self) -> list[Any]:
        template = self.tokenizer.chat_template
        return [*super().settings(), template, sorted(map(str, self.tokenizer.special_tokens_map.items()))]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        texts, turns, faults = [], [], {}
        for number, messages in enumerate(batch["messages"]):
            tools = batch["tools"][number] if "tools" in batch else None
            try:
                text, spans = self._rendered(
                    json.loads(messages), json.loads(tools) if tools else None, batch["given"][number] or 0
                )
            except DataError as error:
                faults[number], text, spans = str(error), "", []
            texts.append(text)
            turns.append(spans)
        encoded = self.tokens(texts, add_special_tokens=False, return_offsets_mapping=not self.learn_all)
        for number, ids in enumerate(encoded["input_ids"]):
            if number in faults:
                yield number, {"fault": faults[number]}
                continue
            learned = [True] * len(ids)
            if not self.learn_all:
                learned = learned_tokens(texts[number], encoded["offset_mapping"][number], turns[number])
            sample = self.sample(ids, learned)
            yield number, {**sample, "ended": not sample["cut"] and self._ends(ids, learned)}

    def _rendered(self, messages: list[Message], tools: Any, given: int) -> tuple[str, list[tuple[int, int]]]:
        if self.learn_all:
            return render_chat(self.tokenizer, messages, False, tools), []
        return assistant_turns(self.tokenizer, messages, tools, given)

    def _ends(self, ids: Sequence[int], learned: Sequence[bool]) -> bool:
        """Whether the last that is learned, but for white space, is a special token: the end of the turn."""
        written = [token for token, flag in zip(ids, learned, strict=True) if flag]
        while written and written[-1] not in self._special and not self.tokenizer.decode(written[-1:]).strip():
            written.pop()
        return bool(written) and written[-1] in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        """The end of a turn is a special token, but as a rule not the one that the tokenizer calls its end token."""
        return frozenset(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)


@dataclass(frozen=True)
class InstructionEncoder(CompletionEncoder):
    """Instructions for a model without a chat template: what precedes the answer, each with a blank line, is the prompt."""

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample]]:
        conversations = [json.loads(messages) for messages in batch["messages"]]
        parts = {
            "prompt": ["".join(f"{turn['content']}\n\n" for turn in turns[:-1]) for turns in conversations],
            "completion": [turns[-1]["content"] for turns in conversations],
        }
        yield from super().samples(parts)
