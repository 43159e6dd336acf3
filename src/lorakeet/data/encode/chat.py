"""Encoders of conversations: rendered by the model's chat template, with the assistant's turns in the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakeet.chat.messages import Message
from lorakeet.chat.template import render_chat
from lorakeet.chat.turns import assistant_turns, check_offsets, learned_tokens
from lorakeet.data.encode.encoder import Batch, CausalEncoder, Sample
from lorakeet.data.encode.text import CompletionEncoder
from lorakeet.data.read.record import Fault
from lorakeet.data.rows.kinds import Layout
from lorakeet.errors import BaseModelError, DataError

Spans = list[tuple[int, int]]


def chat_encoder(layout: Layout, tokenizer: Any) -> type[CausalEncoder]:
    """Choose the encoder for messages: conversations need a chat template, instructions do not."""
    plain = "instruction" in layout.columns and not tokenizer.chat_template
    return InstructionEncoder if plain else ChatEncoder


@dataclass(frozen=True)
class ChatEncoder(CausalEncoder):
    """A conversation as the chat template renders it, tokenized once; see :mod:`lorakeet.chat.template`."""

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise BaseModelError(
                f"the data are conversations, but the tokenizer of {self.tokenizer.name_or_path} has no chat template",
                "use a chat model (often named ...-Instruct), or rows with prompt and completion",
            )
        if not self.learn_all:
            check_offsets(self.tokenizer)

    def settings(self) -> list[Any]:
        template = self.tokenizer.chat_template
        return [*super().settings(), template, sorted(map(str, self.tokenizer.special_tokens_map.items()))]

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        rendered = [self._rendered(batch, number) for number in range(len(batch["messages"]))]
        texts = ["" if isinstance(one, Fault) else one[0] for one in rendered]
        encoded = self.tokens(texts, add_special_tokens=False, return_offsets_mapping=not self.learn_all)
        for number, (one, ids) in enumerate(zip(rendered, encoded["input_ids"], strict=True)):
            if isinstance(one, Fault):
                yield number, one
                continue
            in_loss = [True] * len(ids)
            if not self.learn_all:
                in_loss = learned_tokens(texts[number], encoded["offset_mapping"][number], one[1])
            sample = self.sample(ids, in_loss)
            yield number, {**sample, "ended": not sample["cut"] and self._ends(ids, in_loss)}

    def _rendered(self, batch: Batch, number: int) -> tuple[str, Spans] | Fault:
        """Render a conversation; returns its text and the spans of the assistant's turns."""
        messages: list[Message] = json.loads(batch["messages"][number])
        tools = batch["tools"][number] if "tools" in batch else None
        tools = json.loads(tools) if tools else None
        unlearned = [number for number, message in enumerate(messages, start=1) if message.get("train") is False]
        if self.learn_all and unlearned:
            marked = f"message {unlearned[0]} is marked as not to be learned, but data.learn=all learns every token"
            return Fault("template", marked, "leave out data.learn, or the marks")
        try:
            if self.learn_all:
                return render_chat(self.tokenizer, messages, False, tools), []
            return assistant_turns(self.tokenizer, messages, tools, batch["given"][number] or 0)
        except DataError as error:
            return Fault("template", error.message, error.hint)

    def _ends(self, ids: Sequence[int], in_loss: Sequence[bool]) -> bool:
        """Whether the last target, apart from white space, is a special token: the end of the turn."""
        written = [token for token, flag in zip(ids, in_loss, strict=True) if flag]
        while written and written[-1] not in self._special and not self.tokenizer.decode(written[-1:]).strip():
            written.pop()
        return bool(written) and written[-1] in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        """Special tokens: the end of a turn is one of them, usually not the tokenizer's end token."""
        return frozenset(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)


@dataclass(frozen=True)
class InstructionEncoder(CompletionEncoder):
    """Instructions, for a model without template: the prompt is all turns before the answer, a blank line after each."""

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        conversations = [json.loads(messages) for messages in batch["messages"]]
        parts = {
            "prompt": ["".join(f"{turn['content']}\n\n" for turn in turns[:-1]) for turns in conversations],
            "completion": [turns[-1]["content"] for turns in conversations],
        }
        yield from super().samples(parts)
