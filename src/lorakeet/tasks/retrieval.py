"""Pairs of texts with one meaning: which candidates are right for an anchor, and the loss and figures of finding them.

The candidates of an anchor are the positives of all rows, and the negatives where there are some. A text that repeats
counts once. No candidate is wrong that is the positive of the same anchor in another row, or the anchor itself: these are
left out. In training the candidates are those of a micro-batch, on held-out rows those of all rows. So the held-out loss
does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lorakeet.tasks.text_metrics import Figures, nothing_to_measure

Array = NDArray[Any]

#: Factor of cosine similarities before the softmax, as in sentence-transformers (an inverse temperature).
SCALE = 20.0
#: Difference of cosine similarities below which two are a tie.
TIE = 1e-6
#: Anchors that are compared with all candidates at once; bounds the matrix of similarities.
CHUNK = 1024


class CandidateTexts:
    """Distinct candidates of some anchors, and which of them are right.

    Args:
        anchors: The text of each anchor, as anything that can be compared.
        candidates: The texts of the positives, in the order of the anchors, and of the negatives behind them.

    Attributes:
        places: Where each distinct text stands first among the candidates.
        own: Number of the distinct text that is the positive of each anchor.
    """

    def __init__(self, anchors: Sequence[Hashable], candidates: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self.places: list[int] = []
        for place, text in enumerate(candidates):
            if text not in numbers:
                numbers[text] = len(numbers)
                self.places.append(place)
        self.own = [numbers[text] for text in candidates[: len(anchors)]]
        right: dict[Hashable, set[int]] = {}
        for anchor, own in zip(anchors, self.own, strict=True):
            right.setdefault(anchor, {numbers[anchor]} if anchor in numbers else set()).add(own)
        self._also = [sorted(right[anchor] - {own}) for anchor, own in zip(anchors, self.own, strict=True)]

    def also_right(self, start: int, end: int) -> Array:
        """Return which candidates are right for the anchors ``start`` to ``end``, besides their own positive.

        Returns:
            Bool [end - start, distinct candidates].
        """
        right = np.zeros((end - start, len(self.places)), dtype=bool)
        for row, others in enumerate(self._also[start:end]):
            right[row, others] = True
        return right


def pair_loss(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None = None, texts: CandidateTexts | None = None
) -> Tensor:
    """Compute the loss of finding each anchor's own positive among all of the batch.

    Henderson et al. 2017, arXiv:1705.00652, section 4.4 (multiple negatives ranking).

    Args:
        anchors, positives, negatives: [B, hidden], of length 1.
        texts: Of the anchors and candidates; None: all of them differ.

    Returns:
        The mean over the anchors of −log softmax(:data:`SCALE`·cos), a scalar.
    """
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    texts = texts or CandidateTexts(range(-len(anchors), 0), range(len(candidates)))
    if len(texts.places) < len(candidates):
        candidates = candidates[texts.places]
    scores = SCALE * anchors @ candidates.T
    also_right = torch.from_numpy(texts.also_right(0, len(anchors)))
    if also_right.any():
        scores = scores.masked_fill(also_right.to(scores.device), -torch.inf)
    return F.cross_entropy(scores, torch.tensor(texts.own, device=anchors.device))


def summed_pair_loss(anchors: Array, candidates: Array, texts: CandidateTexts) -> float:
    """Compute the sum of the losses of :func:`pair_loss` over all anchors, in float64 and in constant memory.

    Args:
        anchors: [N, hidden].
        candidates: [M, hidden], the positives in the order of the anchors, then the negatives.
        texts: Of both.
    """
    left, right = _unit(anchors), _unit(candidates[texts.places])
    own, total = np.array(texts.own), 0.0
    for start in range(0, len(left), CHUNK):
        scores = SCALE * left[start : start + CHUNK] @ right.T
        scores[texts.also_right(start, start + len(scores))] = -np.inf
        highest = scores.max(1)
        norms = highest + np.log(np.exp(scores - highest[:, None]).sum(1))
        total += float((norms - scores[np.arange(len(scores)), own[start : start + CHUNK]]).sum())
    return total


def retrieval(anchors: Array, positives: Array, texts: CandidateTexts | None = None) -> Figures:
    """Compute ``accuracy_at_1`` and ``mrr`` (mean reciprocal rank) of each anchor's own positive, by cosine similarity.

    Ties are broken at random, and the expected value is returned: a model that gives every text the same vector gets
    1/N, not 1.

    Args:
        anchors, positives: [N, hidden]; row i of one belongs to row i of the other.
        texts: Of the anchors and positives; None: all of them differ.

    Raises:
        DataError: There are no pairs.
    """
    if not len(anchors):
        raise nothing_to_measure(anchors)
    texts = texts or CandidateTexts(range(-len(anchors), 0), range(len(positives)))
    left, right = _unit(anchors), _unit(positives[texts.places])
    first, reciprocal, own_place = 0.0, 0.0, np.array(texts.own)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(right) + 1))])  # 1 + 1/2 + … + 1/n
    for start in range(0, len(left), CHUNK):
        cosines = left[start : start + CHUNK] @ right.T  # [≤CHUNK, distinct]
        own = cosines[np.arange(len(cosines)), own_place[start : start + CHUNK]][:, None]
        cosines[texts.also_right(start, start + len(cosines))] = -np.inf
        above = (cosines > own + TIE).sum(1)
        level = (np.abs(cosines - own) <= TIE).sum(1)  # ties, with itself
        first += float(((above == 0) / level).sum())
        reciprocal += float(((harmonic[above + level] - harmonic[above]) / level).sum())
    return {"accuracy_at_1": first / len(left), "mrr": reciprocal / len(left)}


def _unit(vectors: Array) -> Array:
    floats = np.asarray(vectors, np.float64)
    return floats / np.maximum(np.linalg.norm(floats, axis=1, keepdims=True), 1e-12)
