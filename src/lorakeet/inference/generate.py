"""Completion of prompts with any model that has ``generate``: streamed for a single prompt, in batches for several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lorakeet.chat.messages import Message
from lorakeet.chat.template import render_chat
from lorakeet.errors import ConfigError, DataError
from lorakeet.eval_mode import evaluating
from lorakeet.facts.padding import padding_token
from lorakeet.facts.special_tokens import prompt_ids, rendered_ids, text_ids
from lorakeet.facts.vocabulary import check_token_ids, embedding_rows
from lorakeet.facts.window import window
from lorakeet.inference.fast_decode import fast_decode
from lorakeet.log import warn
from lorakeet.rng import seeded

#: Plain text, or a conversation.
Prompt = str | Sequence[Message]

#: Tokens of the prompt that are decoded before the new ones, so that the first new word keeps its leading space.
CONTEXT = 8


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Complete prompts.

    The model runs in eval mode and is restored afterwards; quantized models use :mod:`~lorakeet.inference.fast_decode`.
    Prompts of a batch are padded on the left.

    Args:
        model: The model, with or without an active adapter.
        tokenizer: Its tokenizer.
        prompts: Plain texts; or conversations (lists of messages), which the model continues with an assistant turn.
        max_new_tokens: Largest number of new tokens; fewer, with a warning, if the model's context window ends.
        greedy: Take the most likely token; ``temperature``, ``top_p`` and ``seed`` are then ignored.
        temperature: Sampling temperature; below 1 the text is more predictable.
        top_p: Sample from the smallest set of tokens with this total probability.
        seed: Seed of the sampling, which is repeatable for the same prompts and batch size. torch's global state is not
            changed.
        stream: Function that receives the new text piece by piece; for a single prompt only.
        batch_size: Prompts per batch.

    Returns:
        The new text of each prompt, without the end token.

    Raises:
        ConfigError: A setting is out of range, or there are several prompts to stream.
        DataError: A prompt is empty, fills the model's context window, or has a token that the model cannot read.
        BaseModelError: The tokenizer has no chat template for a conversation.
    """
    _check(prompts, max_new_tokens, temperature, top_p, stream)
    encoded = _encode(model, tokenizer, prompts)
    device = next(model.parameters()).device
    settings = _settings(model, tokenizer, _fitting_tokens(model, encoded, max_new_tokens))
    if not greedy:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    texts: list[str] = []
    with evaluating(model), fast_decode(model), seeded(None if greedy else seed), torch.inference_mode():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            ids, mask = _left_padded(batch, settings.pad_token_id, device)
            streamer = (
                _Streamer(_Decoder(model, tokenizer, batch[0], settings.eos_token_id), stream) if stream else None
            )
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, streamer=streamer)
            # An encoder-decoder returns its start token and the new ones, a decoder the prompt and the new ones.
            new = output[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
            texts += [
                _Decoder(model, tokenizer, prompt, settings.eos_token_id)(row)
                for prompt, row in zip(batch, new, strict=True)
            ]
    return texts


def _check(
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stream: Callable[[str], None] | None,
) -> None:
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}: expected 1 or more")
    if not temperature > 0:
        problems.append(f"temperature = {temperature}: expected more than 0 (the limit at 0 is greedy)")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}: expected more than 0, at most 1")
    if stream is not None and len(prompts) != 1:
        problems.append(f"{len(prompts)} prompts to stream: expected 1")
    if problems:
        raise ConfigError("; ".join(problems))
    if empty := [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt]:
        raise DataError(f"prompt {', '.join(empty)} is empty, expected text", "remove empty prompts")


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt, as in training."""
    rows, to_ids = embedding_rows(model), text_ids if model.config.is_encoder_decoder else prompt_ids
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            [ids] = to_ids(tokenizer, [prompt])
        else:
            ids = rendered_ids(tokenizer, render_chat(tokenizer, prompt, True))
        if not ids:
            raise DataError(f"prompt {number} has no token that the model knows", "remove it, or write another text")
        check_token_ids(ids, tokenizer, rows, f"prompt {number}")
        encoded.append(ids)
    return encoded


def _fitting_tokens(model: PreTrainedModel, encoded: Sequence[Sequence[int]], requested: int) -> int:
    """Return the number of new tokens, at most ``requested``, that fit the context window after the longest prompt."""
    most, longest = window(model.config), max(map(len, encoded), default=0)
    if most is None:
        return requested
    if longest >= most:
        raise DataError(
            f"a prompt has {longest} tokens, expected fewer than the model's window of {most}", "shorten the prompt"
        )
    before = 1 if model.config.is_encoder_decoder else longest  # a decoder of its own begins with its start token
    if before + requested > most:
        warn(f"only {most - before} of {requested} new tokens fit the model's window of {most} tokens")
    return min(requested, most - before)


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Build greedy settings that stop at the end tokens of the model and of the tokenizer."""
    stops = end_tokens(model, tokenizer)
    pad = padding_token(model.config, tokenizer)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0) if pad is None else pad,
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: those of the model and of the tokenizer."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def _left_padded(batch: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Build ids and mask, int64 [len(batch), longest]; the mask depends on the position, not on the token id."""
    longest = max(map(len, batch))
    ids = [[pad] * (longest - len(row)) + list(row) for row in batch]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in batch]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class _Decoder:
    """Decoder of new tokens as a continuation of the prompt: it keeps a leading space and drops the end token."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        ends: Sequence[int] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.ends = set(ends or ())
        self.context = [] if model.config.is_encoder_decoder else list(prompt[-CONTEXT:])

    def __call__(self, ids: Sequence[int]) -> str:
        end = next((position for position, token in enumerate(ids) if token in self.ends), len(ids))
        before, text = self._decode(self.context), self._decode([*self.context, *ids[:end]])
        return text[len(before) :] if text.startswith(before) else self._decode(list(ids[:end]))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Streamer(BaseStreamer):
    """Streamer that passes on new text; an incomplete multi-byte character waits for its remaining bytes."""

    def __init__(self, decoder: _Decoder, stream: Callable[[str], None]) -> None:
        self.decoder, self.stream = decoder, stream
        self.ids: list[int] | None = None  # None until the prompt has been seen
        self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.decoder(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        self._show(self.decoder(self.ids or []))

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.stream(text[len(self.shown) :])
            self.shown = text
