"""Encoder of source texts with target texts, for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakeet.data.encode.encoder import Batch, Encoder, Sample, ids_type, with_end
from lorakeet.data.read.record import Fault
from lorakeet.facts.special_tokens import target_ids


@dataclass(frozen=True)
class Seq2SeqEncoder(Encoder):
    """A source text and, as labels, its target with an end token; each of at most ``max_length`` tokens."""

    def model_columns(self) -> dict[str, Any]:
        return {**super().model_columns(), "labels": ids_type()}

    def samples(self, batch: Batch) -> Iterator[tuple[int, Sample | Fault]]:
        end = self.tokenizer.eos_token_id
        sources = self.shortened(batch["source"])
        targets = target_ids(self.tokenizer, batch["target"])
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            ids, labels, counts = source.column("input_ids"), with_end(target, end), source.counts()
            kept = labels[: self.max_length]
            yield (
                number,
                {
                    "input_ids": ids,
                    "labels": kept,
                    "length": max(len(ids), len(kept)),
                    "whole": max(source.whole, len(labels)),
                    "targets": len(kept) if ids else 0,
                    "lost": len(labels) - len(kept),
                    "cut": counts["cut"] or len(kept) < len(labels),
                    "ended": end is not None and kept[-1:] == [end],
                },
            )
