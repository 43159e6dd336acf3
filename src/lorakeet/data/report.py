"""What became of the data, in figures and for a person."""

from __future__ import annotations

from dataclasses import dataclass

_MUCH = 0.2  # share of cut samples from which on it is a warning


@dataclass(frozen=True)
class Report:
    """What became of the data. Tokens are those of the samples, end tokens included; targets are those learned.

    Attributes:
        source: what was read.
        rows: rows read, of which ``empty`` held no text, and ``short`` no second token: neither becomes a sample.
        distinct: different texts; ``duplicates`` are the others, kept on the same side as the text they repeat.
        moved: held-out samples that became equal to a training sample when both were cut, and so were moved to it.
        train_samples, train_tokens, train_targets: the part that is learned.
        held_out_samples, held_out_tokens, held_out_targets: the part that is only measured.
        cut: samples cut to ``max_length`` tokens; they have no end token.
        median_length, longest: tokens per sample.
        end_token: the end token as text, None if the tokenizer has none; ``ended`` samples learn it.
        damaged: texts with U+FFFD, the sign for a character that was lost in an earlier conversion.
        content_hash: SHA-256 of the texts in their order.
    """

    source: str
    rows: int
    empty: int
    short: int
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
    max_length: int
    median_length: float
    longest: int
    end_token: str | None
    ended: int
    damaged: int
    content_hash: str

    @property
    def samples(self) -> int:
        return self.train_samples + self.held_out_samples

    @property
    def cut_percent(self) -> float:
        return 100 * self.cut / self.samples

    def lines(self) -> list[str]:
        """The report for a person."""
        dropped = [f"{self.empty:,} empty"] * bool(self.empty) + [f"{self.short:,} of one token"] * bool(self.short)
        repeated = (
            f"{self.duplicates:,} duplicates, on the side of what they repeat" if self.duplicates else "no duplicates"
        )
        moved = f"; {self.moved:,} more became equal to a training sample when cut" if self.moved else ""
        end = f"{self.end_token} ends {self.ended:,} of {self.samples:,} samples and is learned"
        return [
            f"data       {self.source}",
            f"rows       {self.rows:,}" + (f", dropped: {', '.join(dropped)}" if dropped else ""),
            f"texts      {self.distinct:,} distinct, {repeated}",
            f"train      {self.train_samples:,} samples, {self.train_tokens:,} tokens, {self.train_targets:,} learned",
            f"held out   {self.held_out_samples:,} samples, {self.held_out_tokens:,} tokens{moved}",
            f"length     median {self.median_length:g}, longest {self.longest:,} tokens",
            f"cut        {self.cut:,} samples ({self.cut_percent:.1f} %) at {self.max_length:,} tokens, end token lost",
            f"end token  {end if self.end_token else 'none: the model will not learn where to stop'}",
        ]

    def warnings(self) -> list[str]:
        """What may spoil the result."""
        warnings = []
        if self.end_token is None:
            warnings.append("the tokenizer has no end token: the model will not learn where a text ends")
        if self.cut >= _MUCH * self.samples:
            warnings.append(
                f"{self.cut:,} of {self.samples:,} samples ({self.cut_percent:.0f} %) are cut at {self.max_length} "
                "tokens and their end is never learned; raise data.max_length or split the texts"
            )
        if self.damaged:
            warnings.append(f"{self.damaged:,} texts hold U+FFFD: characters were lost when they were converted")
        return warnings
