"""Choice of tokens: each setting does what it says, and a seed gives the same in any company."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lorakeet.serve.engine.requests import Sampling
from lorakeet.serve.engine.sampling import Sampler

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
    assert counted._adjusted(LOGITS)[best] == pytest.approx(float(LOGITS[best]) - 1.5)


def test_log_probabilities() -> None:
    token, found = Sampler(Sampling(temperature=0, logprobs=3, logit_bias={4: 100.0})).choose(LOGITS)
    expected = torch.log_softmax(LOGITS, -1)
    assert token == 4 and found is not None  # the bias chooses, the report is of the model
    assert found.logprob == pytest.approx(float(expected[4]), rel=1e-5)
    assert [value for _, value in found.top] == pytest.approx(sorted(expected.tolist())[:-4:-1], rel=1e-5)


class Even:
    """A grammar of even tokens."""

    def allowed(self) -> Tensor:
        return torch.arange(20) % 2 == 0

    def accept(self, token: int) -> None:
        assert token % 2 == 0

    def is_complete(self) -> bool:
        return False


def test_grammar() -> None:
    found = kept(Sampling(seed=0, temperature=5.0, grammar=Even()), 300)
    assert set(found) <= set(range(0, 20, 2)) and len(found) > 5
