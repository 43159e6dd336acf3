"""Attention patterns for the tests of every back end."""

from __future__ import annotations

from lorakeet.kernels.attention.pattern import Pattern

PATTERNS = [
    Pattern(causal=True),
    Pattern(causal=False),
    Pattern(causal=True, window=1),
    Pattern(causal=True, window=3),
    Pattern(causal=False, window=2),
    Pattern(causal=True, softcap=0.7),
    Pattern(causal=False, window=3, softcap=0.7),
]
