"""Bits that do not depend on the number of threads: each operation of torch in a training, and each of our own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers.tiny_architectures import build
from lorakeet.kernels import fixed_order as fixed
from lorakeet.kernels.attention.pattern import Pattern
from lorakeet.kernels.attention.segment import segment_attention
from lorakeet.kernels.cpu import bindings, features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.dropout import dropped, plus_dropped
from lorakeet.kernels.fixed_order import fixed_order
from lorakeet.kernels.glu import gated
from lorakeet.kernels.int8 import registry
from lorakeet.kernels.int8.format import quantize_rows, quantize_weight
from lorakeet.kernels.int8.linear import int8_linear
from lorakeet.kernels.linear_cross_entropy import linear_cross_entropy
from lorakeet.kernels.lora_linear import lora_linear
from lorakeet.kernels.rms_norm import rms_norm
from lorakeet.kernels.rotary import rotary

THREADS = (1, 2, 3)
RUNNABLE = [one.name for one in registry.implementations() if registry.missing(one) is None]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensors: Any) -> list[bytes]:
    leaves = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return [t.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes() for t in leaves if t.numel()]


def by_threads(compute: Callable[[], Any]) -> list[list[bytes]]:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(bits(compute()))
    return found


def with_gradients(function: Callable[..., Tensor], *given: Tensor) -> Callable[[], Any]:
    def compute() -> Any:
        leaves = [t.clone().requires_grad_() for t in given]
        h = function(*leaves)
        grad = random(h.numel(), seed=9).view(h.shape).to(h.dtype)
        return h, torch.autograd.grad(h, leaves, grad)

    return compute


def assert_one_order(compute: Callable[[], Any]) -> None:
    first, *others = by_threads(compute)
    assert all(other == first for other in others)


# ---- operations of torch ------------------------------------------------------------------------------------------------


class Compare(TorchDispatchMode):
    """Runs each operation with every number of threads and collects those whose bits differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.differ: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in str(func) or func.is_view:
            return func(*args, **kwargs)
        self.seen.add(str(func))

        def run() -> Any:
            copies: dict[int, Any] = {}
            copy = lambda t: copies.setdefault(id(t), t.clone()) if isinstance(t, Tensor) else t  # noqa: E731
            given = tree_map(copy, (args, kwargs)) if func._schema.is_mutable else (args, kwargs)
            return func(*given[0], **given[1]), given

        first, *others = by_threads(run)
        if any(other != first for other in others):
            self.differ.add(str(func))
        return func(*args, **kwargs)


def compared_step(model: torch.nn.Module, batch: dict[str, Tensor]) -> Compare:
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    with Compare() as compare:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return compare


def ragged(rows: int = 6, width: int = 33) -> dict[str, Tensor]:
    ids = torch.randint(2, 60, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, width - 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


MODELS = [
    *((tf.AutoModelForCausalLM, kind) for kind in ("llama", "gemma2", "phi", "gpt2", "mixtral")),
    *((tf.AutoModelForMaskedLM, kind) for kind in ("bert", "modernbert")),
    *((tf.AutoModelForSeq2SeqLM, kind) for kind in ("t5", "bart")),
]


@pytest.mark.parametrize(("auto", "kind"), MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_no_operation_of_a_training_step_depends_on_the_threads(auto: type, kind: str) -> None:
    """All parameters are trained, so that the backward of every layer is there."""
    with fixed_order():
        compare = compared_step(build(auto, kind), ragged())
    assert len(compare.seen) > 30 and not compare.differ


def test_the_comparison_finds_what_differs() -> None:
    with Compare() as compare:
        F.layer_norm(random(500, 16).requires_grad_(), (16,), random(16).requires_grad_()).sum().backward()
    assert compare.differ == {"aten.native_layer_norm_backward.default"}


#: Elements: shared by threads, of an odd number, so that the shares have edges.
ODD = 70_003
DIFFER: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "dot": lambda x: x @ x,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
    "glu": lambda x: F.glu(x[1:]),
    "pow": lambda x: x.abs() ** 1.7,
    "mse": lambda x: F.mse_loss(x, x * 0.5),
    "huber": lambda x: F.huber_loss(x, x * 0.5),
    "softmax": lambda x: x[1:].view(3, -1).softmax(0),
    "index": lambda x: x[torch.arange(ODD) % 50].cumsum(0),
    "conv1d": lambda x: F.conv1d(x[: 16 * 1000].view(1, 16, -1), x[:128].view(4, 16, 2)),
}


@pytest.mark.parametrize("name", DIFFER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_that_differ_in_torch_do_not(name: str, dtype: torch.dtype) -> None:
    with fixed_order(half_precision=dtype != torch.float32):
        assert_one_order(with_gradients(DIFFER[name], random(ODD).to(dtype)))


def test_products_of_bf16_have_no_edges() -> None:
    x, y = (random(ODD, seed=seed).bfloat16() for seed in (1, 2))
    with fixed_order(half_precision=True):
        assert_one_order(lambda: (x * y, x * 1.7, 3 * x, x.abs().rsqrt()))
        assert (torch.arange(3) * 1.5).dtype == torch.float32 and (x * 1.7).dtype == torch.bfloat16
        found = x * 1.7
    assert torch.equal(found, x * 1.7)


@pytest.mark.skipif(not features.has(Feature.AVX2), reason="torch multiplies on this processor")
@pytest.mark.parametrize(
    ("n", "k", "columns"), [(1, 33, 65), (7, 576, 16), (16, 640, 96), (170, 65, 133), (171, 576, 33)]
)
def test_products_have_one_order_and_torchs_value(n: int, k: int, columns: int) -> None:
    a, b, h, bias = random(n, k), random(k, columns, seed=4), random(n, columns, seed=5), random(columns, seed=6)
    layouts = [(a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T), (a.repeat_interleave(2, 1)[:, ::2], b)]
    products = [
        *(lambda x=x, y=y: x @ y for x, y in layouts),
        lambda: torch.addmm(bias, a, b),
        lambda: torch.addmm(h, a, b, beta=0.5, alpha=2.0),
        lambda: h.clone().addmm_(a, b, alpha=3.0),
        lambda: torch.mm(a, b, out=torch.empty(0)),
        lambda: torch.bmm(a.expand(3, n, k), b.expand(3, k, columns)),
        lambda: F.linear(a[None], b.T, bias),
    ]
    plain = [product() for product in products]
    with fixed_order():
        for product, expected in zip(products, plain, strict=True):
            assert_one_order(product)
            torch.testing.assert_close(product(), expected, rtol=1e-4, atol=1e-4)


def test_torchs_kernels_return() -> None:
    x = random(ODD)
    with fixed_order():
        with fixed_order(half_precision=True):
            pass
        assert_one_order(lambda: F.silu(x))
        assert fixed._depth["silu"] == 1 and fixed._depth["mul.Tensor"] == 0
    assert not any(fixed._depth.values())
    first, *others = by_threads(lambda: F.silu(x))
    assert any(other != first for other in others)


# ---- our own kernels ----------------------------------------------------------------------------------------------------


def test_every_elementwise_kernel_has_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are odd, so that the shares of threads have edges; each name of the module must have run."""
    if bindings.library() is None:
        pytest.skip("nothing is compiled on this machine")
    ran = set()

    def seen(name: str) -> Callable[..., Any]:
        kernel = getattr(bindings, name)
        return lambda *args: (ran.add(name), kernel(*args))[1]

    for name in bindings.ELEMENTWISE:
        monkeypatch.setattr(bindings, name, seen(name))
    a, b, weight = random(211, 333), random(211, 333, seed=4), random(333, seed=5)
    angles = random(1, 1, 211, 48, seed=6), random(1, 1, 211, 48, seed=7)
    heads = random(1, 211, 7, 48)
    targets = torch.randint(0, 333, (211,), generator=torch.Generator().manual_seed(0))
    assert_one_order(with_gradients(lambda x, y: gated(x, y, "silu"), a, b))
    assert_one_order(with_gradients(lambda x, y: gated(x, y, "gelu_tanh", torch.bfloat16), a, b))
    assert_one_order(with_gradients(lambda x: rms_norm(x, weight, 1e-5), a))
    assert_one_order(with_gradients(lambda x, w: rms_norm(x, w, 1e-5), a, weight))
    assert_one_order(with_gradients(lambda x: rotary(x.transpose(1, 2), *angles).transpose(1, 2), heads))
    assert_one_order(lambda: (dropped(a, 0.3, 5), plus_dropped(b.clone(), a, 0.3, 5)))
    head = torch.nn.Linear(333, 333)
    assert_one_order(with_gradients(lambda x: linear_cross_entropy(x, targets, head), a))
    assert ran == set(bindings.ELEMENTWISE)


@pytest.mark.parametrize("pattern", [Pattern(True), Pattern(False), Pattern(True, 5)], ids=str)
@pytest.mark.parametrize("width", [16, 8])
def test_attention_has_one_order(pattern: Pattern, width: int) -> None:
    q, k, v = random(1, 6, 120, width), random(1, 2, 120, width, seed=4), random(1, 2, 120, width, seed=5)
    lengths = (31, 31, 1, 50, 7)
    with fixed_order():
        assert_one_order(with_gradients(lambda *given: segment_attention(*given, lengths, pattern), q, k, v))


@pytest.mark.parametrize("rank", [3, 8, 16, 65])
@pytest.mark.parametrize(("n", "width", "out"), [(5, 40, 33), (17, 64, 96), (300, 70, 40), (401, 200, 97)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_on_a_dense_weight_has_one_order(rank: int, n: int, width: int, out: int, p: float) -> None:
    weight = random(out, width, seed=4)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, weight, None, a, b, 0.7, p)

    with fixed_order():
        assert_one_order(
            with_gradients(layer, random(n, width), random(rank, width, seed=5), random(out, rank, seed=6))
        )


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(("n", "width", "out"), [(3, 70, 33), (17, 64, 97), (211, 200, 70), (300, 130, 260)])
def test_every_back_end_of_8_bits_has_one_order(name: str, n: int, width: int, out: int) -> None:
    weight, scale = quantize_weight(random(out, width, seed=4))
    head = quantize_rows(random(out, width, seed=5))
    with registry.using(name), fixed_order():
        for given in ((weight, scale), head):
            assert_one_order(with_gradients(lambda x, given=given: int8_linear(x, *given), random(n, width)))


@pytest.mark.parametrize("shape", [(96, 333), (1000, 65)])
def test_quantizing_has_one_order(shape: tuple[int, int]) -> None:
    with fixed_order():
        assert_one_order(lambda: quantize_weight(random(*shape)))
