"""Choice of tokens: each setting does what it says, and a seed gives the same in any company."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lorakeet.serve.engine.requests import Sampling
from lorakeet.serve.engine.sampling import Sampler, _drawn, _largest

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 3


def kept(sampling: Sampling, count: int = 3000) -> Counter[int]:
    sampler = Sampler(sampling)
    return Counter(sampler.choose(LOGITS)[0] for _ in range(count))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 7])
def test_same_tokens_as_transformers(top_p: float, top_k: int) -> None:
    scores = LOGITS[None]
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores)[0]
    expected = torch.softmax(scores.double(), -1)
    found = kept(Sampling(seed=1, top_p=top_p, top_k=top_k))
    assert all(expected[token] > 0 for token in found)
    shares = torch.tensor([found[token] / 3000 for token in range(50)])
    assert (shares - expected).abs().max() < 0.035  # four standard deviations


def test_min_p() -> None:
    probabilities = torch.softmax(LOGITS, -1)
    found = kept(Sampling(seed=1, min_p=0.1))
    assert {int(token) for token in (probabilities >= 0.1 * probabilities.max()).nonzero()} == set(found)


def test_seed() -> None:
    first, second = (Sampler(Sampling(seed=5)) for _ in range(2))
    one = [first.choose(LOGITS)[0] for _ in range(20)]
    other = []
    for _ in range(20):
        kept(Sampling(seed=None), 1)  # another request beside it
        torch.rand(3)
        other.append(second.choose(LOGITS)[0])
    assert one == other
    assert [Sampler(Sampling(seed=6)).choose(LOGITS)[0] for _ in range(20)] != one


def test_bias_and_penalties() -> None:
    best = int(LOGITS.argmax())
    assert Sampler(Sampling(temperature=0, logit_bias={best: -100.0})).choose(LOGITS)[0] != best
    assert Sampler(Sampling(temperature=0, logit_bias={3: 100.0})).choose(LOGITS)[0] == 3
    for penalty in ({"presence_penalty": 100.0}, {"frequency_penalty": 100.0}):
        sampler = Sampler(Sampling(temperature=0, **penalty))
        chosen = []
        for _ in range(5):
            chosen.append(sampler.choose(LOGITS)[0])
            sampler.accept(chosen[-1])
        assert len(set(chosen)) == 5
    counted = Sampler(Sampling(temperature=0, frequency_penalty=0.5))
    for _ in range(3):
        counted.accept(best)
    assert counted._changes.added_to(LOGITS.numpy())[best] == pytest.approx(float(LOGITS[best]) - 1.5)


def test_log_probabilities() -> None:
    token, found = Sampler(Sampling(temperature=0, logprobs=3, logit_bias={4: 100.0})).choose(LOGITS)
    expected = torch.log_softmax(LOGITS, -1)
    assert token == 4 and found is not None  # the bias chooses, the report is of the model
    assert found.logprob == pytest.approx(float(expected[4]), rel=1e-5)
    assert [value for _, value in found.top] == pytest.approx(sorted(expected.tolist())[:-4:-1], rel=1e-5)


class Among:
    """A grammar of some of the first twenty tokens."""

    def __init__(self, tokens: range) -> None:
        self.tokens = tokens

    def allowed(self) -> NDArray[np.bool_]:
        allowed = np.zeros(20, np.bool_)
        allowed[self.tokens] = True
        return allowed

    def accept(self, token: int) -> None:
        assert token in self.tokens

    def is_complete(self) -> bool:
        return False


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.05}, {"logit_bias": {2: 3.0}}]
)
@pytest.mark.parametrize("tokens", [range(2, 20), range(0, 20, 2), range(18, 19)])
def test_other_tokens_than_those_of_a_grammar_have_no_weight(settings: dict[str, Any], tokens: range) -> None:
    """Most of the tokens may come, half of them, or one."""
    bound = Sampler(Sampling(seed=3, grammar=Among(tokens), **settings))
    free = Sampler(Sampling(seed=3, **settings))
    masked = torch.full_like(LOGITS, -torch.inf)
    masked[tokens] = LOGITS[tokens]
    assert [bound.choose(LOGITS)[0] for _ in range(50)] == [free.choose(masked)[0] for _ in range(50)]


def test_grammar() -> None:
    found = kept(Sampling(seed=0, temperature=5.0, grammar=Among(range(0, 20, 2))), 300)
    assert set(found) <= set(range(0, 20, 2)) and len(found) > 5


def reference(logits: torch.Tensor, wanted: Sampling) -> torch.Tensor:
    """Return the probabilities of all tokens, by sorting and in fp64."""
    kept = torch.softmax(logits.double() / wanted.temperature, -1)
    likely, top = kept.sort(descending=True).values, kept.max()
    if wanted.top_k:
        kept = kept.where(kept >= likely[wanted.top_k - 1], 0.0)
    if wanted.top_p < 1:
        likely = kept.sort(descending=True).values
        kept = kept.where(kept >= likely[int((likely.cumsum(0) < wanted.top_p * likely.sum() * (1 - 1e-6)).sum())], 0.0)
    return kept.where(kept >= wanted.min_p * top * (1 - 1e-6), 0.0)


@pytest.mark.parametrize("size", [5, 255, 256, 3001, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_draws_are_those_of_a_sort(size: int, spread: float) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    for wanted in (
        Sampling(),
        Sampling(temperature=0.3),
        Sampling(top_p=0.9),
        Sampling(temperature=1.5, top_p=0.5, top_k=4, min_p=0.01),
        Sampling(top_k=4),
        Sampling(min_p=0.2),
    ):
        sums = reference(logits, wanted).cumsum(0)
        for number in (0.0, 0.31, 0.77, 1 - 2**-53):
            token = _drawn(logits.numpy(), wanted, number)
            before = float(sums[token - 1]) if token else 0.0
            target, slack = number * float(sums[-1]), 1e-6 * float(sums[-1])
            assert before - slack <= target <= float(sums[token]) + slack
            assert float(sums[token]) > before  # a token that was kept


def test_a_row_is_by_itself() -> None:
    """A row's choice has the same bits wherever the row lies in memory, and whatever is beside it."""
    rows = torch.randn(8, 4099, generator=torch.Generator().manual_seed(3)) * 3
    settings = {"seed": 4, "temperature": 0.8, "top_p": 0.95, "logprobs": 5, "logit_bias": {5: 1.0}}
    for index, row in enumerate(rows):
        for shift in range(3):
            other = torch.cat([torch.zeros(shift), row])[shift:]
            assert Sampler(Sampling(**settings)).choose(rows[index]) == Sampler(Sampling(**settings)).choose(other)


def test_ties_stay_together() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert set(kept_of(logits, Sampling(seed=0, top_k=2))) == {1, 2, 4}
    assert set(kept_of(logits, Sampling(seed=0, top_p=0.4))) == {1, 2, 4}
    assert Sampler(Sampling(temperature=0, logprobs=2)).choose(logits)[1].top[0][0] == 1  # type: ignore[union-attr]
    assert _largest(logits.numpy(), 99).tolist() == [3.0, 3.0, 3.0, 1.0, 0.0]


def kept_of(logits: torch.Tensor, sampling: Sampling) -> Counter[int]:
    sampler = Sampler(sampling)
    return Counter(sampler.choose(logits)[0] for _ in range(200))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_far_temperatures(temperature: float) -> None:
    found = kept_of(LOGITS, Sampling(seed=0, temperature=temperature))
    assert set(found) == {int(LOGITS.argmax())} if temperature < 1 else len(found) > 40
