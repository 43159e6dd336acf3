"""Two adapters and their base on the same rows: losses, Kullback-Leibler divergence of each token, and who wins.

KL(p‖q) = Σ p·(log p - log q) over the vocabulary, in nats, at each position in the loss. A win is a row with the lower loss
per token; equal losses are half a win. The interval of the share of wins is Wilson's (1927). That of the loss difference is
the percentile bootstrap over rows (Efron 1979), where both losses of a row are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lorakeet.errors import DataError
from lorakeet.eval_mode import evaluating
from lorakeet.facts.vocabulary import vocabulary_size
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.loaded_model import LoadedModel
from lorakeet.train.evaluate import autocast_of, longest_first
from lorakeet.workshop.evaluate import Samples

Array = NDArray[np.float64]

#: Logits of a forward pass; fewer rows are run together if these would be more.
_LOGITS = 1 << 25
#: Positions whose distributions are compared at once.
_POSITIONS = 256
#: Quantile of the standard normal distribution for intervals of 95 %.
_Z = 1.959964
#: Bootstrap samples.
_RESAMPLES = 2000
#: Name of the base in a report.
BASE = "base"


def compare_on_rows(
    opened: LoadedModel,
    adapters: Sequence[str],
    samples: Samples,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the base and two adapters on the same samples.

    Args:
        opened: A language model with both adapters.
        adapters: The two, as they were opened.
        samples: The samples.
        progress: Function of the rows done and their number.

    Returns:
        ``{"rows", "tokens", "loss", "kl_to_base", "kl_between", "wins", "loss_difference"}``.

    Raises:
        DataError: No token of the samples is in the loss.
    """
    rows = longest_first(samples.rows)
    width = (vocabulary_size(opened.model.config) or 1) * max(1, len(rows[0]["input_ids"]))
    batch_size = max(1, min(samples.batch_size, _LOGITS // width))
    found: list[Array] = []
    with evaluating(opened.model), torch.no_grad():
        for batch in DataLoader(rows, batch_size=batch_size, collate_fn=samples.collator):
            found.append(_row_figures(opened, adapters, batch))
            if progress:
                progress(sum(map(len, found)), len(rows))
    figures = np.concatenate(found)  # [rows, tokens | losses of base, one, other | KLs]
    figures = figures[figures[:, 0] > 0]
    if not len(figures):
        raise DataError("there is nothing to compare: no token of the data is a target", "check data.learn")
    return _summary(figures, adapters)


def _row_figures(opened: LoadedModel, adapters: Sequence[str], batch: Mapping[str, Any]) -> Array:
    """Return for each row: tokens, summed losses of base, one and other, and summed KLs (see :func:`_divergences`)."""
    device = next(opened.model.parameters()).device
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    shifted = not opened.model.config.is_encoder_decoder
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels" or not shifted}
    counted = labels.ne(IGNORE_INDEX)
    logits = []
    for adapter in (None, *adapters):
        with opened.answering(adapter), autocast_of(opened.model, device):
            whole = opened.model(**inputs, use_cache=False).logits
        logits.append((whole[:, :-1] if shifted else whole)[counted])  # [targets, vocabulary]
    figures = torch.zeros(len(labels), 8, dtype=torch.float64)
    row_of = torch.arange(len(labels), device=device)[:, None].expand_as(labels)[counted].cpu()
    for start in range(0, len(row_of), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        scores = [each[part].float().log_softmax(-1) for each in logits]
        columns = [torch.ones(len(row_of[part])), *_losses(scores, labels[counted][part]), *_divergences(scores)]
        figures.index_add_(0, row_of[part], torch.stack([column.double().cpu() for column in columns], 1))
    return figures.numpy()


def _losses(scores: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    return [-score.gather(1, targets[:, None])[:, 0] for score in scores]


def _divergences(scores: Sequence[Tensor]) -> list[Tensor]:
    """Return the KL of one and other to the base, of one to other, and of other to one, at each position."""
    base, one, other = scores
    return [(p.exp() * (p - q)).sum(-1) for p, q in ((one, base), (other, base), (one, other), (other, one))]


def _summary(figures: Array, adapters: Sequence[str]) -> dict[str, Any]:
    tokens, losses = figures[:, 0], figures[:, 1:4]
    names = [BASE, *adapters]
    means = figures[:, 1:].sum(0) / tokens.sum()
    wins = []
    for winner, loser in ((2, 1), (1, 0), (2, 0)):
        gaps = (losses[:, loser] - losses[:, winner]) / tokens
        rate = float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
        interval = wilson_interval(rate, len(gaps))
        wins.append({"winner": names[winner], "loser": names[loser], "rate": rate, "interval": interval})
    return {
        "rows": len(figures),
        "tokens": int(tokens.sum()),
        "loss": dict(zip(names, means[:3].tolist(), strict=True)),
        "kl_to_base": dict(zip(adapters, means[3:5].tolist(), strict=True)),
        "kl_between": means[5:].tolist(),
        "wins": wins,
        "loss_difference": {
            "mean": float(means[2] - means[1]),
            "interval": bootstrap_interval(losses[:, 2] - losses[:, 1], tokens),
        },
    }


def wilson_interval(rate: float, count: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson 1927).

    Args:
        rate: The share that was observed.
        count: Number of observations.
    """
    middle = (rate + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap_interval(sums: Array, tokens: Array) -> list[float]:
    """Return the 95 % percentile bootstrap interval of Σ sums / Σ tokens over rows; the same in every call.

    Args:
        sums: Summed difference of each row.
        tokens: Tokens of each row.
    """
    random = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        drawn = random.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / tokens[drawn].sum())
    return [float(value) for value in np.quantile(means, (0.025, 0.975))]
