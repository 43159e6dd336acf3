"""Prediction for texts: classes with scores, tagged words, answer spans, embeddings, masked tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from lorakeet.base.quiet import quiet
from lorakeet.errors import DataError
from lorakeet.inference.generate import evaluating

#: Tokens. Longest answer span of QUESTION_ANS.
LONGEST_ANSWER = 30


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[str | Mapping[str, str]],
    *,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Predict the answer of a task for each text.

    Args:
        model: The model with the head of the task.
        tokenizer: Its tokenizer.
        task: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION or MASKED_LM.
        rows: Texts; for QUESTION_ANS mappings with ``question`` and ``context``.
        batch_size: Rows per batch.

    Returns:
        A dictionary for each row, by task:

        - SEQ_CLS: ``{"label", "score", "scores"}``; multi-label ``{"labels", "scores"}``; regression ``{"value"}``.
        - TOKEN_CLS: ``{"words": [{"word", "tag", "score", "start", "end"}]}``.
        - QUESTION_ANS: ``{"answer", "start", "end", "score"}``; an empty answer means that the text has none.
        - FEATURE_EXTRACTION: ``{"embedding"}``.
        - MASKED_LM: ``{"text", "fillings": [{"text", "token", "score"}]}``.

    Raises:
        DataError: A row is empty, or not of the form that the task needs.
    """
    _check(task, rows)
    with evaluating(model), quiet():
        if task == "SEQ_CLS":
            return _classes(model, tokenizer, rows, batch_size)
        if task == "TOKEN_CLS":
            return _tags(model, tokenizer, rows, batch_size)
        if task == "MASKED_LM":
            return _fillings(model, tokenizer, rows, batch_size)
        if task == "FEATURE_EXTRACTION":
            return [{"embedding": vector} for vector in _vectors(model, tokenizer, rows, batch_size)]
        return [_answer(model, tokenizer, row["question"], row["context"]) for row in rows]  # type: ignore[index]


def embed(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Compute an embedding per text: the mean of the last hidden states over its tokens, normalized to length 1.

    Args:
        model: The encoder.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 1 at tokens, 0 at padding.

    Returns:
        fp32 [B, hidden].
    """
    states = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()  # [B, T, hidden]
    real = attention_mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)


def _check(task: str, rows: Sequence[str | Mapping[str, str]]) -> None:
    needs = ("question", "context") if task == "QUESTION_ANS" else ()
    problems = []
    for number, row in enumerate(rows, start=1):
        if needs and not (isinstance(row, Mapping) and all(isinstance(row.get(key), str) for key in needs)):
            problems.append(f"row {number} is {row!r:.60}, expected question and context")
        elif not needs and not (isinstance(row, str) and row.strip()):
            problems.append(f"row {number} is {row!r:.60}, expected text")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(f"invalid rows for {task}: {'; '.join(problems[:3])}{more}", "fix or remove these rows")


def _classes(model: Any, tokenizer: Any, rows: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    problem = model.config.problem_type
    function = {"regression": "none", "multi_label_classification": "sigmoid"}.get(problem, "softmax")
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device)
    answers = classify(list(rows), top_k=None, function_to_apply=function, batch_size=batch_size, truncation=True)
    found: list[dict[str, Any]] = []
    for scores in answers:
        table = {item["label"]: float(item["score"]) for item in scores}
        best = max(table, key=table.__getitem__)
        if function == "none":
            found.append({"value": table[best]})
        elif function == "sigmoid":
            found.append({"labels": [name for name, score in table.items() if score > 0.5], "scores": table})
        else:
            found.append({"label": best, "score": table[best], "scores": table})
    return found


def _tags(model: Any, tokenizer: Any, rows: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    """Predict the tag of each word, from its first token, as in training."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch_size):
        texts = list(rows[start : start + batch_size])
        encoded = tokenizer(texts, padding=True, truncation=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping").tolist()
        scores, tags = model(**encoded.to(model.device)).logits.float().softmax(-1).max(-1)  # [B, T]
        for number, text in enumerate(texts):
            pieces: dict[int, list[int]] = {}  # word -> positions of its tokens
            for position, word in enumerate(encoded.word_ids(number)):
                if word is not None:
                    pieces.setdefault(word, []).append(position)
            words = [_word(text, offsets[number], p, tags[number], scores[number], model) for p in pieces.values()]
            found.append({"words": words})
    return found


def _word(text: str, offsets: Any, pieces: Sequence[int], tags: Tensor, scores: Tensor, model: Any) -> dict[str, Any]:
    start, end, first = offsets[pieces[0]][0], offsets[pieces[-1]][1], pieces[0]
    tag = model.config.id2label[int(tags[first])]
    return {"word": text[start:end], "tag": tag, "score": float(scores[first]), "start": start, "end": end}


def _fillings(model: Any, tokenizer: Any, rows: Sequence[Any], batch_size: int) -> list[dict[str, Any]]:
    if bad := [number for number, row in enumerate(rows, start=1) if row.count(tokenizer.mask_token) != 1]:
        raise DataError(
            f"row {bad[0]} has {rows[bad[0] - 1].count(tokenizer.mask_token)} masked tokens, expected 1",
            f"write {tokenizer.mask_token} for the token to predict",
        )
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device=model.device)
    answers = fill(list(rows), batch_size=batch_size)
    answers = [answers] if len(rows) == 1 else answers
    return [
        {
            "text": row,
            "fillings": [
                {"text": item["sequence"], "token": item["token_str"], "score": float(item["score"])} for item in best
            ],
        }
        for row, best in zip(rows, answers, strict=True)
    ]


def _vectors(model: Any, tokenizer: Any, rows: Sequence[Any], batch_size: int) -> Iterator[list[float]]:
    for start in range(0, len(rows), batch_size):
        batch = tokenizer(list(rows[start : start + batch_size]), padding=True, truncation=True, return_tensors="pt")
        yield from embed(model, *(batch[name].to(model.device) for name in ("input_ids", "attention_mask"))).tolist()


def _answer(model: Any, tokenizer: Any, question: str, context: str) -> dict[str, Any]:
    """Find the most likely span of the context, over all windows of a long one.

    The score of a span is the sum of the log-probabilities of its start and its end. The first token of a window stands for
    "no answer in this window".
    """
    window = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=window,
        stride=min(128, window // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping")
    encoded.pop("overflow_to_sample_mapping", None)
    outputs = model(**encoded.to(model.device))
    best, answer = -float("inf"), {"answer": "", "start": 0, "end": 0}
    for number, spans in enumerate(offsets.tolist()):
        inside = torch.tensor([part == 1 for part in encoded.sequence_ids(number)])
        start, end = (outputs[name][number].float().log_softmax(-1).cpu() for name in ("start_logits", "end_logits"))
        allowed = (
            inside[:, None]
            & inside[None, :]
            & torch.ones(len(inside), len(inside), dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        )
        both = (start[:, None] + end[None, :]).masked_fill(~allowed, -float("inf"))
        score, at = both.flatten().max(0)
        first, last = divmod(int(at), len(inside))
        no_answer = float(start[0] + end[0])
        if float(score) > max(best, no_answer):
            best, begin, stop = float(score), spans[first][0], spans[last][1]
            answer = {"answer": context[begin:stop], "start": begin, "end": stop}
    return {**answer, "score": math.exp(best)}
