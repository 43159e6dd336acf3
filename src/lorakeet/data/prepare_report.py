"""Report of prepared data, as figures and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorakeet.config import TaskName

#: Share of cut samples, or of rows without target, that is a warning.
_MUCH = 0.2

#: Tasks that generate text, and must learn where to stop.
_WRITES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class PrepareReport:
    """Figures of prepared data. Tokens are those of the samples, end tokens included; targets are those in the loss.

    Attributes:
        source: what was read, and how it was understood.
        kind, task: of the rows, and the task that they are for.
        rows: rows read. ``empty`` ones lacked a value or text, ``unlearnable`` ones have no target; neither is a sample.
        distinct: different texts, by which the rows were split.
        duplicates: rows that repeat an earlier one, apart from case, white space or encoding; on the same side as that.
        moved: held-out samples that became equal to a training sample when both were cut, and so were moved to it.
        train_samples, train_tokens, train_targets: of the training part; 0 for a stream, which is not counted.
        held_out_samples, held_out_tokens, held_out_targets: of the held-out part.
        cut: samples cut to ``max_length`` tokens; ``lost``: targets that were cut away.
        median_length, longest: tokens per sample.
        end_token: the end token as text, None if the tokenizer has none; ``ended`` samples have an end in the loss.
        damaged: rows with U+FFFD, the sign for a character that was lost in an earlier conversion.
        labels: training samples (of tags: words) by label; None where there are no classes.
        streamed: the training part is read during training. Its first ``checked`` rows were examined before; ``sound``
            of them are usable.
        content_hash: SHA-256 of the rows in their order; of a stream, of what describes it.
    """

    source: str
    kind: str
    task: TaskName
    rows: int
    empty: int
    unlearnable: int
    distinct: int
    duplicates: int
    moved: int
    train_samples: int
    train_tokens: int
    train_targets: int
    held_out_samples: int
    held_out_tokens: int
    held_out_targets: int
    cut: int
    lost: int
    max_length: int
    median_length: float
    longest: int
    end_token: str | None
    ended: int
    damaged: int
    labels: Mapping[str, int] | None
    streamed: bool
    content_hash: str
    checked: int = 0
    sound: int = 0

    @property
    def samples(self) -> int:
        return self.train_samples + self.held_out_samples

    @property
    def cut_percent(self) -> float:
        return 100 * self.cut / max(self.samples, 1)

    @property
    def lost_percent(self) -> float:
        """Percentage of the targets that was cut away."""
        return 100 * self.lost / max(self.lost + self.train_targets + self.held_out_targets, 1)

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        lines = [f"data       {self.source}"]
        if self.streamed:
            lines.append("train      streamed: read while it is learned, rows that cannot be used are left out")
            lines.append(f"checked    only the first {self.checked:,} rows, of which {self.sound:,} can be used")
        else:
            lines += self._rows()
            learned = self._learned(self.train_tokens, self.train_targets)
            lines.append(f"train      {self.train_samples:,} samples, {self.train_tokens:,} tokens{learned}")
        moved = f"; {self.moved:,} more became equal to a training sample when cut" if self.moved else ""
        lines.append(f"held out   {self.held_out_samples:,} samples, {self.held_out_tokens:,} tokens{moved}")
        if self.samples:
            lines.append(f"length     median {self.median_length:g}, longest {self.longest:,} tokens")
            lines.append(f"cut        {self._cut()}")
        if self.labels is not None and not self.streamed:
            lines.append(f"labels     {self._labels()}")
        if self.task in _WRITES:
            lines.append(f"end token  {self._end()}")
        return lines

    def warnings(self) -> list[str]:
        """Return warnings of what may spoil the result."""
        warnings = []
        if self.task in _WRITES and self.end_token is None and not self.ended:
            warnings.append("the tokenizer has no end token: the model will not learn where a text ends")
        elif self.task in _WRITES and self.samples and not self.ended:
            warnings.append("no sample learns an end: the model will not learn where to stop")
        if self.cut >= _MUCH * self.samples and self.cut:
            what = "and their end is never learned; " if self.task in _WRITES else "and what is beyond is never seen; "
            warnings.append(
                f"{self.cut:,} of {self.samples:,} samples ({self.cut_percent:.0f} %) are cut at {self.max_length} "
                f"tokens {what}raise data.max_length or split the texts"
            )
        if self.unlearnable >= _MUCH * (self.samples + self.unlearnable) and self.unlearnable:
            warnings.append(
                f"{self.unlearnable:,} rows have nothing to learn and are left out; look at data.max_length"
            )
        return warnings + ([] if self.streamed else self._missing_labels())

    def _rows(self) -> list[str]:
        dropped = [f"{self.empty:,} empty"] * bool(self.empty)
        dropped += [f"{self.unlearnable:,} with nothing to learn"] * bool(self.unlearnable)
        repeated = (
            f"{self.duplicates:,} duplicates, on the side of what they repeat" if self.duplicates else "no duplicates"
        )
        return [
            f"rows       {self.rows:,}" + (f", dropped: {', '.join(dropped)}" if dropped else ""),
            f"texts      {self.distinct:,} distinct, {repeated}",
        ]

    def _learned(self, tokens: int, targets: int) -> str:
        if self.kind in ("completion", "messages"):
            return f", {targets:,} learned ({100 * targets / max(tokens, 1):.0f} %), the others only given"
        if self.task == "MASKED_LM":
            return f", {targets:,} of them may become gaps"
        if self.task == "TOKEN_CLS":
            return f", {targets:,} tags"
        return f", {targets:,} learned" if self.task in _WRITES else ""

    def _cut(self) -> str:
        told = f"{self.cut:,} samples ({self.cut_percent:.1f} %) at {self.max_length:,} tokens"
        if self.lost:
            told += f", {self.lost:,} learned tokens ({self.lost_percent:.1f} %) lost"
        return told + (", end token lost" if self.task in _WRITES else "")

    def _end(self) -> str:
        if self.samples and not self.ended:
            return f"{self.end_token or 'none'}: no sample learns an end, so the model will not learn where to stop"
        if self.kind == "messages":
            return f"the end of a turn is learned in {self.ended:,} of {self.samples:,} samples"
        if not self.end_token:
            return "none: the model will not learn where to stop"
        return f"{self.end_token} ends {self.ended:,} of {self.samples:,} samples and is learned"

    def _labels(self, most: int = 12) -> str:
        counts = sorted((self.labels or {}).items(), key=lambda item: -item[1])
        more = f", and {len(counts) - most} more" if len(counts) > most else ""
        return ", ".join(f"{name} {count:,}" for name, count in counts[:most]) + more

    def _missing_labels(self) -> list[str]:
        missing = [name for name, count in (self.labels or {}).items() if not count]
        if not missing or not self.train_samples:
            return []
        return [f"no training sample for the label {', '.join(map(repr, missing[:5]))}: it cannot be learned"]
