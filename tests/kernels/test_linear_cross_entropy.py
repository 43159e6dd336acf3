"""Cross-entropy in chunks against cross-entropy of all logits: loss, gradients, and what is in memory."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels import linear_cross_entropy as kernel
from lorakeet.kernels.cpu import bindings, features, gemm
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.frozen_linear import frozen_linear
from lorakeet.kernels.linear_cross_entropy import (
    LogitMap,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    row_losses,
)

MAPS = [LogitMap(), LogitMap(scale=0.3), LogitMap(softcap=2.0), LogitMap(scale=1.7, softcap=3.0)]
HIDDEN, VOCABULARY = 12, 37


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 5 * VOCABULARY)
    monkeypatch.setattr(kernel, "MIN_ROWS", 1)


class Adapted(nn.Module):
    """A head with a low-rank update, and parameters that are not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, VOCABULARY)
        self.a, self.b = nn.Parameter(torch.randn(3, HIDDEN)), nn.Parameter(torch.randn(VOCABULARY, 3))
        self.asleep = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def problem(rows: int = 23, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, HIDDEN, dtype=dtype) * 2
    return x.requires_grad_(), torch.randint(0, VOCABULARY, (rows,))


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("learns", ["all", "adapter", "nothing"])
@pytest.mark.parametrize("rows", [1, 5, 23])
def test_loss_and_gradients_are_those_of_all_logits(rows: int, learns: str, logit_map: LogitMap) -> None:
    head = Adapted()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(learns == "all" or (learns == "adapter" and name in "ab"))
    parameters = [p for p in head.parameters() if p.requires_grad]
    x, targets = problem(rows)
    found = linear_cross_entropy(x, targets, head, list(head.parameters()), logit_map)
    expected = linear_cross_entropy_reference(x, targets, head, logit_map).sum()
    torch.testing.assert_close(found, expected)
    wanted = [x, *parameters]
    pairs = zip(
        torch.autograd.grad(found * 0.37, wanted, allow_unused=True),
        torch.autograd.grad(expected * 0.37, wanted, allow_unused=True),
        strict=True,
    )
    for got, right in pairs:
        assert (got is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=2e-6 * float(right.abs().max()))


@pytest.mark.parametrize("logit_map", MAPS)
def test_losses_of_rows(logit_map: LogitMap) -> None:
    x, targets = problem()
    head = Adapted()
    torch.testing.assert_close(
        row_losses(x, targets, head, logit_map),
        linear_cross_entropy_reference(x, targets, head, logit_map).detach(),
    )


def test_no_rows_give_a_zero_with_zero_gradients() -> None:
    x, targets = problem(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    loss = linear_cross_entropy(x, targets, head, list(head.parameters()))
    loss.backward()
    assert loss.item() == 0.0 and x.grad is not None and x.grad.shape == (0, HIDDEN)
    assert head.weight.grad is not None and not head.weight.grad.any()
    assert row_losses(x, targets, head).shape == (0,)


def test_large_logits_stay_finite_and_bad_ones_do_not() -> None:
    x, targets = problem()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.mul_(1e4)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, targets, head), x)
    assert gradient.isfinite().all()
    with torch.no_grad():
        x[3, 2] = torch.nan
    assert linear_cross_entropy(x, targets, head).isnan()


def test_half_precision_heads_are_summed_in_fp32() -> None:
    x, targets = problem(dtype=torch.bfloat16)
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.bfloat16)
    found, expected = (
        linear_cross_entropy(x, targets, head),
        linear_cross_entropy_reference(x, targets, head, LogitMap()),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.sum(), rtol=1e-5, atol=1e-5)
    pair = (torch.autograd.grad(loss, x)[0].float() for loss in (found, expected.sum()))
    torch.testing.assert_close(*pair, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("frozen", [True, False])
def test_under_autocast(frozen: bool) -> None:
    x, targets = problem()
    head = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(not frozen)
    wanted = [x, *([] if frozen else head.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, targets, head, list(head.parameters()))
        expected = linear_cross_entropy_reference(x, targets, head, LogitMap()).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for got, right in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(got, right, rtol=0.05, atol=0.05)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_all_logits_never_exist() -> None:
    x, targets = problem(400)
    head = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
    with Largest() as largest:
        linear_cross_entropy(x, targets, head).backward()
        row_losses(x, targets, head)
    assert largest.numbers == max(400 * HIDDEN, 5 * VOCABULARY) < 400 * VOCABULARY


def test_the_logits_of_one_chunk_are_gone_before_the_next() -> None:
    x, targets = problem()
    head, seen = Adapted(), []

    def watched(rows: Tensor) -> Tensor:
        assert all(logits.expired() for logits in seen)
        logits = head(rows)
        seen.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    linear_cross_entropy(x, targets, watched, list(head.parameters())).backward()
    assert len(seen) > 3


@pytest.mark.skipif(bindings.library() is None, reason="nothing is compiled on this machine")
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_loop_over_a_large_vocabulary(scale: float) -> None:
    """Tens of thousands of small terms, against fp64; the loss is off by less than what torch's own is."""
    draw = torch.Generator().manual_seed(3)
    z, targets = torch.randn(5, 49_152, generator=draw) * 3, torch.tensor([0, 49_151, 7, 1024, 1023])
    exact = z.double().requires_grad_()
    losses = nn.functional.cross_entropy(exact * scale, targets, reduction="none")
    (right,) = torch.autograd.grad(losses.sum(), exact)
    untouched = z.clone()
    torch.testing.assert_close(
        bindings.cross_entropy(untouched, targets, scale, False).double(), losses, rtol=2e-7, atol=1e-6
    )
    assert torch.equal(untouched, z)
    torch.testing.assert_close(bindings.cross_entropy(z, targets, scale, True).double(), losses, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(z.double(), right, rtol=2e-6, atol=1e-9)
    assert float(z.double().sum(1).abs().max()) < 1e-6


def test_logits_that_are_not_finite_and_targets_that_are_none() -> None:
    z, targets = torch.zeros(3, VOCABULARY), torch.tensor([1, 2, 3])
    z[0, 5], z[1, 5] = torch.nan, torch.inf
    losses, _ = kernel._loss_and_gradient(z, targets, LogitMap())
    assert losses.isfinite().tolist() == [False, False, True]
    for wrong in (-1, VOCABULARY):
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            kernel._loss_and_gradient(torch.zeros(1, VOCABULARY), torch.tensor([wrong]), LogitMap())


# ---- a frozen head of nothing but a weight, in C ------------------------------------------------------------------------

compiled = pytest.mark.skipif(not features.has(Feature.AVX2), reason="nothing is compiled for this processor")
#: Tokens, hidden size, vocabulary: parts of tiles, runs, blocks and chunks; rows that share sets of the cache.
HEADS = [(17, 5, 3), (33, 12, 37), (40, 33, 1100), (70, 650, 257), (45, 1024, 130), (100, 40, 2050)]


def frozen_head(n: int, hidden: int, vocabulary: int, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Return loss, gradient and row losses by one call of C, and by the reference in fp64."""
    draw = torch.Generator().manual_seed(n)
    x, weight = torch.randn(n, hidden, generator=draw), torch.randn(vocabulary, hidden, generator=draw) / hidden**0.5
    targets = torch.randint(0, vocabulary, (n,), generator=draw)
    calls: list[int] = []

    def head(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows @ weight.T

    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        if dtype == torch.float32:
            loss = linear_cross_entropy(leaf, targets, head, (), LogitMap(scale), weight)
            losses = row_losses(x, targets, head, LogitMap(scale), weight)
            assert sum(calls) <= gemm.GEMV_TOKENS  # a small last chunk
        else:
            losses = F.cross_entropy(leaf @ weight.T.double() * scale, targets, reduction="none")
            loss = losses.sum()
        results.append([loss.detach(), torch.autograd.grad(loss * 0.37, leaf)[0], losses.detach()])
    return results[0], results[1]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "has_fast_f32", lambda: True)


@compiled
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_frozen_head_is_one_call(shape: tuple[int, int, int], scale: float, fast: None) -> None:
    found, expected = frozen_head(*shape, scale)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=3e-6, atol=3e-6)


@compiled
def test_a_frozen_head_has_the_same_bits_with_any_number_of_threads(fast: None) -> None:
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(frozen_head(100, 40, 2050)[0])
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(mine, right) for mine, right in zip(other, made[0], strict=True))


@compiled
@pytest.mark.parametrize("n", [64, 70, 97])
def test_a_frozen_head_has_the_bits_of_its_chunks(n: int, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles, and a last chunk so small that torch multiplies it; the vocabulary has whole runs of sums."""
    monkeypatch.setattr(kernel, "MIN_ROWS", 32)
    weight, targets = torch.randn(2048, 40) / 6, torch.randint(0, 2048, (n,))
    x = torch.randn(n, 40).requires_grad_()
    head = functools.partial(frozen_linear, weight=weight)
    pair = [linear_cross_entropy(x, targets, head, (), None, given) for given in (weight, None)]
    mine, right = (torch.autograd.grad(loss, x)[0] for loss in pair)
    assert torch.equal(mine, right)
    torch.testing.assert_close(*pair)


@compiled
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_of_a_frozen_head(value: float, fast: None) -> None:
    x, weight, targets = torch.randn(40, 12), torch.randn(37, 12), torch.randint(0, 37, (40,))
    x[5, 3] = value
    losses = row_losses(x, targets, lambda rows: rows @ weight.T, None, weight)
    assert not losses[5].isfinite() and losses.isfinite().sum() == 39
    leaf = x.requires_grad_()
    (dx,) = torch.autograd.grad(linear_cross_entropy(leaf, targets, lambda rows: rows @ weight.T, weight=weight), leaf)
    assert not dx[5].isfinite().any() and dx.isfinite().all(1).sum() == 39


def _note(called: list[int], *_: object) -> None:
    called.append(1)


@compiled
def test_what_c_cannot_read_takes_the_chunks(fast: None) -> None:
    """A cap of the logits, few tokens, another dtype, a weight that learns, and targets out of range."""
    weight, targets = torch.randn(37, 12), torch.randint(0, 37, (40,))
    x = torch.randn(40, 12)
    for rows, matrix, chosen, logit_map in (
        (x, weight, targets, LogitMap(softcap=2.0)),
        (x[:3], weight, targets[:3], LogitMap()),
        (x.double(), weight.double(), targets, LogitMap()),
        (x, nn.Parameter(weight), targets, LogitMap()),
    ):
        head = nn.Linear(12, 37, bias=False).requires_grad_(False)
        head.weight = nn.Parameter(matrix.detach(), requires_grad=False)
        called: list[int] = []
        head.register_forward_hook(functools.partial(_note, called))
        found = row_losses(rows, chosen, head, logit_map, matrix)
        assert called
        expected = linear_cross_entropy_reference(rows, chosen, head, logit_map)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises((IndexError, RuntimeError)):
        row_losses(x, targets + 37, lambda r: r @ weight.T, None, weight)
