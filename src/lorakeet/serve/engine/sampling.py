"""Choice of the next token from its logits, by the settings of one request.

In NumPy, row by row: each choice is a function of its row, settings and generator alone, so of no other request. Over one
row, NumPy is several times as fast as torch over a batch.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakeet.serve.engine.requests import Sampling, TokenLogprob

Numbers = NDArray[np.floating]

#: Temperatures between which a quotient of fp32 is finite; beyond them nothing changes any more.
_COLDEST, _HOTTEST = 1e-6, 1e6
#: Distances from the largest logit, in which the most likely tokens are looked for first. All of them follow at last.
_DISTANCES = (4.0, 8.0, 16.0)
#: Share of a probability by which rounding may move a border.
_ROUNDING = 1e-6
#: Share of the vocabulary from which on a mask of allowed tokens is faster than a list of them.
_MOST = 0.75
#: Tokens whose weights are summed at once.
_BLOCK = 256


class Sampler:
    """The sampler of one request: its own generator, and the tokens that it has chosen."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._penalizes = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._changes = _Changes()
        for token, value in sampling.logit_bias.items():
            self._changes.set(token, value)

    def choose(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits: fp32 [vocabulary], on the CPU; unchanged.

        Returns:
            The token, and its log probability if the request asks for it.
        """
        given = logits.numpy()
        scores, tokens = self._allowed(self._changes.added_to(given))
        if self.sampling.temperature == 0:
            place = int(scores.argmax())
        else:
            number = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            place = _drawn(scores, self.sampling, number)
        token = place if tokens is None else int(tokens[place])
        return token, _log_probability(given, token, self.sampling.logprobs)

    def accept(self, token: int) -> None:
        """Take the chosen token into account for the next ones."""
        wanted = self.sampling
        self.counts[token] += 1
        if self._penalizes:
            penalty = wanted.presence_penalty + wanted.frequency_penalty * self.counts[token]
            self._changes.set(token, wanted.logit_bias.get(token, 0.0) - penalty)
        if wanted.grammar is not None:
            wanted.grammar.accept(token)

    def _allowed(self, scores: Numbers) -> tuple[Numbers, NDArray[np.intp] | None]:
        """Return the logits to choose from, by what the grammar allows, and their tokens; None: those from 0 on.

        Where few are allowed, as in most places of a JSON text, the choice is among few. Where most are, to lay them out anew
        costs more than it saves, and the others get minus infinity.

        Raises:
            ValueError: There is none.
        """
        if self.sampling.grammar is None:
            return scores, None
        allowed = self.sampling.grammar.allowed()[: len(scores)]
        count = np.count_nonzero(allowed)
        if not count:
            raise ValueError("the grammar allows none here")
        if count > _MOST * len(allowed):
            return np.where(allowed, scores[: len(allowed)], np.float32(-np.inf)), None
        tokens = np.flatnonzero(allowed)
        return scores.take(tokens), tokens


class _Changes:
    """Numbers to add to logits, by token."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._values: list[float] = []
        self._arrays: tuple[NDArray[np.intp], NDArray[np.float32]] | None = None

    def set(self, token: int, value: float) -> None:
        """Set the number of a token."""
        place = self._places.setdefault(token, len(self._values))
        if place == len(self._values):
            self._values.append(value)
            self._arrays = None
        else:
            self._values[place] = value
            if self._arrays is not None:
                self._arrays[1][place] = value

    def added_to(self, logits: Numbers) -> Numbers:
        """Return the sums; the logits themselves where there is nothing to add."""
        if not self._values:
            return logits
        if self._arrays is None:
            self._arrays = np.fromiter(self._places, np.intp), np.array(self._values, np.float32)
        tokens, values = self._arrays
        scores = logits.copy()
        scores[tokens] += values
        return scores


def _drawn(scores: Numbers, sampling: Sampling, number: float) -> int:
    """Return the first token at which the sum of weights, in the order of ids, exceeds a share of the whole sum.

    Args:
        scores: Logits.
        sampling: Settings.
        number: The share, of [0, 1).
    """
    temperature = min(max(sampling.temperature, _COLDEST), _HOTTEST)
    scaled = (scores - scores.max()) / np.float32(temperature)
    weights = np.exp(scaled)
    least = _least(scaled, weights, sampling)
    if least is None:
        return _reached(weights, number)
    kept = np.flatnonzero(scaled >= least)
    return int(kept[_reached(weights[kept], number)])


def _reached(weights: Numbers, share: float) -> int:
    """Return the first place at which the sum of the weights exceeds a share of the whole; block by block, in fp64."""
    whole = len(weights) // _BLOCK * _BLOCK
    blocks = np.add.reduce(weights[:whole].reshape(-1, _BLOCK), axis=1, dtype=np.float64)
    sums = np.cumsum(np.append(blocks, weights[whole:].sum(dtype=np.float64)))
    target = share * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    if block == len(sums):  # a share next to 1 may round up to the whole
        return int(np.flatnonzero(weights)[-1])
    first = block * _BLOCK
    inner = np.cumsum(weights[first : first + _BLOCK], dtype=np.float64)
    before = sums[block - 1] if block else 0.0
    place = int(np.searchsorted(inner, target - before, side="right"))
    if place == len(inner):  # two ways to sum a block differ by a rounding
        place = int(np.flatnonzero(inner < inner[-1])[-1] + 1) if inner[0] < inner[-1] else 0
    return first + place


def _least(scaled: Numbers, weights: Numbers, sampling: Sampling) -> float | None:
    """Return the least logit that top_k, top_p and min_p keep; None where they keep all.

    Of tokens with equal probability at the border all stay, so the result does not depend on the order of a sort.

    Args:
        scaled: Logits divided by the temperature, at most 0.
        weights: Their exponentials.
        sampling: Settings.
    """
    least = -math.inf
    if 0 < sampling.top_k < len(scaled):
        least = float(_largest(scaled, sampling.top_k)[-1])
    if sampling.top_p < 1:
        least = max(least, _least_of_top_p(scaled, weights, least, sampling.top_p))
    if sampling.min_p > 0:
        least = max(least, math.log(sampling.min_p) - _ROUNDING)
    return None if least == -math.inf else least


def _least_of_top_p(scaled: Numbers, weights: Numbers, least: float, top_p: float) -> float:
    """Return the least logit in the smallest set of tokens with a share ``top_p`` of the weight that is kept so far."""
    kept = weights if least == -math.inf else weights[scaled >= least]
    wanted = top_p * float(kept.sum(dtype=np.float64))
    for distance in (*_DISTANCES, math.inf):
        best = scaled[scaled >= max(-distance, least)]
        best.sort()
        best = best[::-1]
        place = int(np.searchsorted(np.cumsum(np.exp(best), dtype=np.float64), wanted * (1 - _ROUNDING)))
        if place < len(best):
            break
    return float(best[min(place, len(best) - 1)])


def _largest(scores: Numbers, count: int) -> Numbers:
    """Return the largest numbers in descending order, ``count`` of them or all."""
    top = scores.max()
    for distance in (*_DISTANCES, math.inf):
        found = scores[scores >= top - distance]
        if len(found) >= count:
            break
    found.sort()
    return found[::-1][:count]


def _log_probability(logits: Numbers, token: int, count: int | None) -> TokenLogprob | None:
    """Return the log probabilities of a token and of the most likely ones, by the model's own logits.

    Args:
        logits: Those of the model.
        token: The chosen token.
        count: Number of likely tokens; None: nothing is wanted.
    """
    if count is None:
        return None
    top = logits.max()
    norm = float(top) + math.log(np.exp(logits - top).sum(dtype=np.float64))
    count = min(count, len(logits))
    likely = np.flatnonzero(logits >= _largest(logits, count)[-1]) if count else np.empty(0, np.intp)
    likely = likely[np.argsort(-logits[likely], kind="stable")][:count]
    best = tuple((int(one), float(logits[one]) - norm) for one in likely)
    return TokenLogprob(token, float(logits[token]) - norm, best)
