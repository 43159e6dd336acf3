"""Choice of the next token from its logits, by the settings of one request."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from lorakeet.serve.engine.requests import Sampling, TokenLogprob

#: Tokens among which the smallest set of ``top_p`` is looked for first; a sort of the whole vocabulary takes far longer.
_FEW = 1024


class Sampler:
    """The sampler of one request: its own generator, and the tokens that it has chosen.

    Its choices depend on the logits, the settings and the seed alone, so on no other request.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        penalized = sampling.presence_penalty or sampling.frequency_penalty
        #: Whether the most likely token is always the answer, so that a batch of rows can be decided at once.
        self.is_plain = not (
            sampling.temperature
            or penalized
            or sampling.logit_bias
            or sampling.grammar
            or sampling.logprobs is not None
        )

    def choose(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits: fp32 [vocabulary]; unchanged.

        Returns:
            The token, and its log probability if the request asks for it.
        """
        scores = self._adjusted(logits)
        if self.sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = self._draw(scores)
        return token, self.log_probability(logits, token)

    def accept(self, token: int) -> None:
        """Take the chosen token into account for the next ones."""
        self.counts[token] += 1
        if self.sampling.grammar is not None:
            self.sampling.grammar.accept(token)

    def log_probability(self, logits: Tensor, token: int) -> TokenLogprob | None:
        """Return the log probabilities of the chosen and the most likely tokens, by the model's own logits."""
        if self.sampling.logprobs is None:
            return None
        all_of_them = torch.log_softmax(logits.double(), dim=-1)
        best = all_of_them.topk(min(self.sampling.logprobs, len(all_of_them)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprob(token, float(all_of_them[token]), top)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Return the logits after bias, penalties and grammar."""
        wanted, bias = self.sampling, self.sampling.logit_bias
        change: dict[int, float] = dict(bias)
        if wanted.presence_penalty or wanted.frequency_penalty:
            for token, count in self.counts.items():
                penalty = wanted.presence_penalty + wanted.frequency_penalty * count
                change[token] = change.get(token, 0.0) - penalty
        scores = logits
        if change:
            tokens = torch.tensor(list(change), device=logits.device)
            values = torch.tensor(list(change.values()), dtype=logits.dtype, device=logits.device)
            scores = logits.index_add(0, tokens, values)
        if wanted.grammar is not None:
            allowed = wanted.grammar.allowed()
            if not bool(allowed.any()):
                raise ValueError("the grammar allows none here")
            scores = _masked(scores, allowed)
        return scores

    def _draw(self, scores: Tensor) -> int:
        """Draw a token: the first at which the sum of probabilities, in the order of ids, exceeds a random number."""
        probabilities = torch.softmax(scores.double() / self.sampling.temperature, dim=-1)
        kept = _truncated(probabilities, self.sampling)
        sums = kept.cumsum(0)
        number = torch.rand((), generator=self.generator, dtype=torch.float64).to(sums.device) * sums[-1]
        token = int(torch.searchsorted(sums, number, right=True))
        return min(token, int(kept.nonzero()[-1]))  # a random number next to 1 may round up to the last sum


def _masked(scores: Tensor, allowed: Tensor) -> Tensor:
    """Return the scores with minus infinity where a token is not allowed."""
    masked = torch.full_like(scores, -torch.inf)
    allowed = allowed[: len(scores)].to(scores.device)
    masked[: len(allowed)] = scores[: len(allowed)].masked_fill(~allowed, -torch.inf)
    return masked


def _truncated(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities with zeros where top_k, top_p or min_p leave a token out.

    Of tokens with equal probability at the border all stay, so the result does not depend on the order of a sort.
    """
    least = probabilities.new_zeros(())
    size = len(probabilities)
    if 0 < sampling.top_k < size:
        least = torch.maximum(least, probabilities.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        kept = probabilities.where(probabilities >= least, 0.0)
        least = torch.maximum(least, _least_of_top_p(kept / kept.sum(), sampling.top_p) * kept.sum())
    if sampling.min_p > 0:
        least = torch.maximum(least, sampling.min_p * probabilities.max())
    # the border was divided and multiplied by a sum, so it may be off by a rounding
    return probabilities.where(probabilities >= least * (1 - 1e-12), 0.0)


def _least_of_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability in the smallest set of tokens whose sum reaches ``top_p``."""
    for count in (min(_FEW, len(probabilities)), len(probabilities)):
        best = probabilities.topk(count).values
        reached = (best.cumsum(0) >= top_p).nonzero()
        if len(reached):
            return best[reached[0, 0]]
    return best[-1]
