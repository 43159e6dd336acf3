"""The 8-bit product: both back ends against their slow truths, forward and backward, on odd shapes and odd numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorakeet.kernels.cpu import bindings
from lorakeet.kernels.int8 import linear
from lorakeet.kernels.lora_linear import lora_linear, lora_linear_reference
from lorakeet.quant.int8 import Int8Weight

SHAPES = [(1, 5, 3), (0, 5, 3), (7, 1, 1), (33, 384, 700), (40, 257, 129), (3, 64, 1)]


@pytest.fixture(params=["blocked", "pairs", "vnni"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(linear, "choose_backend", lambda: request.param)
    return request.param


def layer(rows: int, inner: int, out: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(rows + inner + out)
    weight, scale = linear.quantize_rows(torch.randn(out, inner) / inner**0.5)
    return torch.randn(rows, inner, dtype=dtype), weight, scale, torch.randn(out, dtype=dtype)


def close(a: torch.Tensor, b: torch.Tensor, share: float) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.numel():
        assert float((a - b).abs().max()) <= share * float(b.abs().max())


@given(st.integers(0, 20), st.integers(1, 40), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_rounding_is_within_half_a_step(rows: int, columns: int, size: float) -> None:
    x = torch.randn(rows, columns) * size
    rounded, scale = linear.quantize_rows(x)
    assert rounded.dtype == torch.int8 and scale.shape == (rows,) and bool((scale > 0).all())
    assert rounded.numel() == 0 or int(rounded.abs().max()) <= 127
    error = (linear.dequantize(rounded, scale) - x).abs()
    assert bool((error <= scale.unsqueeze(1) * 0.5001 + 1e-30).all())


def test_a_row_of_zeros_has_a_scale() -> None:
    rounded, scale = linear.quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert rounded.tolist() == [[0, 0], [64, -127]] and scale.tolist() == pytest.approx([1.0, 2 / 127])


def uneven(out: int, inner: int) -> torch.Tensor:
    """A weight whose columns differ in size, as those of real models do."""
    torch.manual_seed(out * inner)
    return torch.randn(out, inner) * torch.logspace(-1.5, 1.5, inner) * torch.rand(out, 1).add(0.5)


def test_even_columns_are_rounded_finely() -> None:
    """Columns of small values meet large activations: there the step of the large ones would cost the product dearly."""
    weight = uneven(96, 96)
    rounded, scale = linear.quantize_weight(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (96 + 96,)
    columns = scale[96:]
    assert torch.equal(columns, columns.log2().round().exp2()) and float(columns.max() / columns.min()) > 100
    assert bool(
        ((linear.dequantize(rounded, scale) - weight).abs() <= 0.501 * linear.rounding_steps(rounded, scale)).all()
    )
    x = torch.randn(200, 96) / torch.logspace(-1.5, 1.5, 96)
    errors = [
        float((x @ (linear.dequantize(*r) - weight).T).norm()) for r in ((rounded, scale), linear.quantize_rows(weight))
    ]
    assert errors[0] < errors[1] / 5


def test_columns_are_even_where_rows_are() -> None:
    """Large rows must not decide alone what a column's size is."""
    weight = uneven(64, 96)
    weight[:8] = 100 * weight[:8].flip(1)
    even = weight / linear.even_columns(weight)
    even /= even.square().mean(1, keepdim=True).sqrt()
    spread = even.square().mean(0).sqrt()
    assert float(spread.max() / spread.min()) < 4  # powers of two leave a factor of two, chance the rest


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (0, 5), (5, 0), (3, 4)])
def test_even_columns_of_odd_weights(shape: tuple[int, int]) -> None:
    for weight in (torch.zeros(shape), torch.randn(shape) * 1e-20, torch.randn(shape) * 1e20):
        if min(shape) > 1:
            weight[:, 0] = 0  # a column of nothing
            weight[1] = 0  # and a row
        rounded, scale = linear.quantize_weight(weight)
        rows, columns = linear.split_scale(rounded, scale)
        kept = linear.kept_columns(rounded, scale)
        assert scale.isfinite().all() and bool((rows > 0).all()) and columns is not None
        assert (columns == 0).nonzero()[:, 0].tolist() == ([] if kept is None else kept[0].tolist())
        assert bool(((linear.dequantize(rounded, scale) - weight).abs() <= 0.501 * rows.unsqueeze(1) * columns).all())


@pytest.mark.parametrize("shape", [(4, 9), (40, 41), (1, 3)])
def test_columns_of_the_largest_values_are_kept_where_a_weight_narrows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).clamp_(-2, 2)
    weight[0, 1], weight[-1, 2] = 5, -4
    rounded, scale = linear.quantize_weight(weight)
    kept = linear.kept_columns(rounded, scale)
    assert kept is not None and kept[0].tolist() == [1, 2] and torch.equal(kept[1], weight[:, 1:3].T)
    assert torch.equal(linear.dequantize(rounded, scale)[:, 1:3], weight[:, 1:3]) and not rounded[:, 1:3].any()
    rest = weight.abs()
    rest[:, 1:3] = 0
    assert float(linear.rounding_steps(rounded, scale).max()) <= 2 * float(rest.max()) / 127  # theirs, and not of 5
    for other in ((9, 4), (4, 4), (1, 2), (0, 5)):
        assert linear.kept_columns(*linear.quantize_weight(torch.randn(other))) is None


def test_an_activation_a_thousand_times_larger_meets_columns_that_are_kept(backend: str) -> None:
    """As a text's first token has in some layers: its part of the product would be off by more than all others are large."""
    torch.manual_seed(0)
    weight = torch.randn(64, 200) / 14
    weight[7, 90] = 3.0
    x = torch.randn(20, 200)
    x[0, 90] = 3000.0
    h, truth = linear.int8_linear(x, *linear.quantize_weight(weight)), x.double() @ weight.double().T
    error = (h - truth).norm(dim=1) / truth[1:].norm(dim=1).mean()
    assert float(error.max()) < 0.02
    plain = linear.int8_linear(x, *linear.quantize_rows(weight)) - truth
    assert float(plain[0].norm() / truth[1:].norm(dim=1).mean()) > 1


@pytest.mark.parametrize("out", [48, 64])  # with columns that are kept, and without
@pytest.mark.parametrize("rows", [0, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_scales_of_input_channels(rows: int, dtype: torch.dtype, out: int, backend: str) -> None:
    weight, scale = linear.quantize_weight(uneven(out, 64))
    assert (linear.kept_columns(weight, scale) is None) == (out == 64)
    x = torch.randn(rows, 64) / torch.logspace(-1.5, 1.5, 64)
    x[:, [2, 60]] *= 50  # outliers, where the scales are small and where they are large
    x = x.to(dtype).requires_grad_()
    bias = torch.randn(out, dtype=dtype)
    a, b = torch.randn(4, 64) / 8, torch.randn(out, 4)
    for low in (False, True):
        h = (
            lora_linear(x, Int8Weight(weight, scale), bias, a, b, 0.5)
            if low
            else linear.int8_linear(x, weight, scale, bias)
        )
        wide, exact = linear.dequantize(weight, scale, torch.float64), x.double()
        update = 0.5 * (exact @ a.double().T) @ b.double().T if low else 0
        truth = exact @ wide.T + bias.double() + update
        g = torch.randn(rows, out)
        dx, wanted = torch.autograd.grad(h, x, g.to(dtype))[0], torch.autograd.grad(truth, x, g.double())[0]
        assert h.dtype == dx.dtype == dtype and h.shape == truth.shape
        near = {torch.float32: 2e-4, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
        for mine, right, limit in ((h, truth, near), (dx, wanted, 0.02 if backend == "vnni" else near)):
            assert float((mine.double() - right).norm()) <= limit * float(right.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_equals_the_dequantised_weight(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "blocked")
    monkeypatch.setattr(linear, "BLOCK", 1000)
    x, weight, scale, bias = layer(*shape)
    x.requires_grad_()
    h, truth = linear.int8_linear(x, weight, scale, bias), linear.int8_linear_reference(x, weight, scale, bias)
    close(h, truth, 1e-5)
    g = torch.randn_like(truth)
    close(torch.autograd.grad(h, x, g)[0], torch.autograd.grad(truth, x, g)[0], 1e-5)


needs_pairs = pytest.mark.skipif(not bindings.has_pairs(), reason="no AVX2, or no C compiler, on this machine")
#: Odd in every direction, deeper than one block of the sums: 640, and with more rows than one thread takes of few columns.
PAIRS = [
    (17, 1, 1),
    (18, 5, 3),
    (19, 16, 16),
    (24, 33, 31),
    (23, 640, 48),
    (37, 641, 50),
    (61, 1300, 700),
    (17, 2, 1400),
    (275, 40, 33),
]


@needs_pairs
@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("biased", [False, True])
def test_pairs_is_near_the_exact_product(
    shape: tuple[int, int, int], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer than bfloat16 by far, forward and backward, also beside outlier columns and for rows of unlike size."""
    monkeypatch.setattr(linear, "choose_backend", lambda: "pairs")
    x, weight, scale, bias = layer(*shape)
    x *= torch.logspace(-12, 12, len(x)).unsqueeze(1)
    bias = bias * 1e-3 if biased else None
    wide = linear.dequantize(weight, scale, torch.float64)
    h, dx = linear.product(x, weight, scale, bias), linear.input_gradient(h_like(x, weight), weight, scale)
    exact = x.double() @ wide.T + (0 if bias is None else bias)
    for mine, right in ((h, exact), (dx, h_like(x, weight).double() @ wide)):
        size = right.norm(dim=1, keepdim=True) / right.shape[1] ** 0.5 + 1e-30
        assert float(((mine.double() - right) / size).abs().max()) < 1e-3
    ordinary = exact.clone()
    x[:, 0] *= 100
    large = linear.product(x, weight, scale, bias)
    ordinary += (x.double()[:, :1] * 0.99) @ wide[:, :1].T
    size = ordinary.norm(dim=1, keepdim=True) / ordinary.shape[1] ** 0.5 + 1e-30
    assert float(((large.double() - ordinary) / size).abs().max()) < 4e-3


def h_like(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient [n, out] with rows of the sizes of x's."""
    torch.manual_seed(3)
    return torch.randn(len(x), len(weight)) * x.norm(dim=1, keepdim=True)


@needs_pairs
def test_the_sums_of_pairs_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values as large as they may be, of one sign, at every depth around the size of a block."""
    monkeypatch.setattr(linear, "choose_backend", lambda: "pairs")
    for inner in (1, 15, 16, 17, 512, 625, 640, 641, 656, 1279, 1280, 1281, 4096):
        for sign in (1, -1):
            weight, scale = torch.full((20, inner), 127 * sign, dtype=torch.int8), torch.ones(20)
            x = torch.full((20, inner), 3.0)
            assert torch.allclose(
                linear.product(x, weight, scale), torch.full((20, 20), 381.0 * sign * inner), rtol=1e-4
            )
            g = torch.full((20, inner), 3.0)
            got = linear.input_gradient(g, weight.T.contiguous(), torch.ones(inner))
            assert torch.allclose(got, torch.full((20, 20), 381.0 * sign * inner), rtol=1e-4)


@needs_pairs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pairs_keep_what_is_not_finite_in_its_row(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "pairs")
    x, weight, scale, _ = layer(20, 40, 33)
    for where in (0, 7, 39):
        broken, g = x.clone(), torch.randn(20, 33)
        broken[4, where] = g[4, where % 33] = value
        others = [i for i in range(20) if i != 4]
        for got in (linear.product(broken, weight, scale), linear.input_gradient(g, weight, scale)):
            assert got[4].isnan().all() and got[others].isfinite().all()
    assert bindings._strips(torch.zeros(2, 40), None)[1].tolist() == [1.0, 1.0]
    zeros = linear.product(torch.zeros(20, 40), weight, scale, torch.ones(33))
    assert bool((zeros == 1).all())


def gradient_of(rows: int, inner: int, out: int) -> tuple[torch.Tensor, ...]:
    """A gradient of rows of unlike size, a weight and all of its scales."""
    torch.manual_seed(rows * inner + out)
    weight, scale = linear.quantize_weight(uneven(out, inner))
    return torch.randn(rows, out) * torch.logspace(-12, 12, rows).unsqueeze(1), weight, scale


#: Odd in every direction; around one group of 64, one panel, and deeper than one block: 2,048.
GROUPS = [
    (17, 1, 1),
    (18, 5, 3),
    (19, 16, 64),
    (24, 33, 65),
    (25, 32, 63),
    (61, 1300, 700),
    (37, 50, 2049),
    (130, 31, 4200),
]


@needs_pairs
@pytest.mark.parametrize("shape", GROUPS)
def test_vnni_gradient_equals_its_slow_truth(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    g, weight, scale = gradient_of(*shape)
    dx, same = linear.input_gradient(g, weight, scale), linear.vnni_gradient_reference(g, weight, scale)
    size = same.double().norm(dim=1, keepdim=True) / same.shape[1] ** 0.5 + 1e-30
    assert float(((dx.double() - same) / size).abs().max()) < 2e-5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [s for s in GROUPS if min(s) > 16])
def test_vnni_gradient_is_near_the_exact_one(
    shape: tuple[int, int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every row, whatever the sizes of others; also where there is no compiler."""
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    if not compiled:
        monkeypatch.setattr(bindings, "library", lambda: None)
    g, weight, scale = gradient_of(*shape)
    exact = g.double() @ linear.dequantize(weight, scale, torch.float64)
    error = (linear.input_gradient(g, weight, scale) - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.mean()) < (0.015 if compiled else 0.03) and float(error.max()) < 0.08


@needs_pairs
@pytest.mark.parametrize("shape", GROUPS)
@pytest.mark.parametrize("kind", ["pairs", "vnni"])
def test_what_rounding_takes_is_given_to_a_later_value(
    kind: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In gradients to a vocabulary: a sum over a row is off by what the last values lost, and by no more."""
    monkeypatch.setattr(linear, "choose_backend", lambda: kind)
    g, weight, scale = gradient_of(*shape)
    rows = scale[: shape[2]]
    sums = linear.input_gradient(g, torch.ones_like(weight), rows).double()
    carried = (g * rows).double()
    step = carried.abs().amax(1) / (127 if kind == "vnni" else 26000)
    wanted = carried.sum(1)
    assert bool(
        ((sums - wanted.unsqueeze(1)).abs().amax(1) <= 0.6 * linear.LANES * step + 1e-5 * carried.norm(dim=1)).all()
    )
    if kind == "vnni":  # near its slow truth: where a value lies between two steps, one may go up and the other down
        dx, same = linear.input_gradient(g, weight, rows), linear.vnni_gradient_reference(g, weight, rows)
        assert float(((dx.double() - same).norm(dim=1) / (same.double().norm(dim=1) + 1e-30)).median()) < 0.01


@pytest.mark.parametrize("compiled", [True, False])
def test_the_gradient_to_a_vocabulary_is_off_to_no_side(
    compiled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax less target: a few large values and many small ones, and tokens' vectors that have much in common."""
    if not compiled:
        monkeypatch.setattr(bindings, "library", lambda: None)
    torch.manual_seed(0)
    vocabulary, tokens = 4000, 60
    weight, scale = linear.quantize_rows(torch.randn(vocabulary, 48) + 2)
    p = (3 * torch.randn(tokens, vocabulary)).softmax(1)
    g = p - torch.nn.functional.one_hot(p.multinomial(1)[:, 0], vocabulary)
    exact = g.double() @ linear.dequantize(weight, scale, torch.float64)
    error = linear.input_gradient(g, weight, scale).double() - exact
    alone = (linear.rounded_groups(g * scale) @ weight.float()).double() - exact
    assert float(error.norm()) < 0.02 * float(exact.norm())
    assert float(error.sum(0).norm()) < 0.01 * float(exact.sum(0).norm()) < 0.2 * float(alone.sum(0).norm())


def test_on_a_gpu_the_gradient_to_a_vocabulary_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a token has one scale; of the small values nothing would be left."""
    monkeypatch.setattr(linear, "backend_for", lambda x: "triton")
    weight, scale = linear.quantize_rows(torch.randn(300, 48))
    g = torch.randn(20, 300)
    close(linear.input_gradient(g, weight, scale), g @ linear.dequantize(weight, scale), 1e-5)


@needs_pairs
def test_large_values_of_a_gradient_cost_no_more_than_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 640 channels is a thousand times the others: the other groups are rounded as finely as ever."""
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    g, weight, scale = gradient_of(40, 70, 640)
    g /= g.norm(dim=1, keepdim=True)
    weight[320] = 0  # what is left is what rounding loses
    exact = g.double() @ linear.dequantize(weight, scale, torch.float64)
    g[:, 320] *= 1000
    error = float((linear.input_gradient(g, weight, scale) - exact).norm() / exact.norm())
    assert 0.1 < error < 0.35  # the 63 neighbours are lost, a tenth of all channels


@needs_pairs
def test_the_sums_of_groups_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    for out in (1, 63, 64, 65, 2047, 2048, 2049, 4096):
        for sign in (1, -1):
            weight = torch.full((out, 20), 127 * sign, dtype=torch.int8)
            got = linear.input_gradient(torch.full((20, out), 3.0), weight, torch.ones(out))
            assert torch.allclose(got, torch.full((20, 20), 381.0 * sign * out), rtol=1e-5)


@needs_pairs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vnni_keeps_what_is_not_finite_in_its_row(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "vnni")
    _, weight, scale, _ = layer(20, 40, 133)
    for where in (0, 63, 64, 132):
        g = torch.randn(20, 133)
        g[4, where] = value
        g[5] = 0
        got = linear.input_gradient(g, weight, scale)
        assert got[4].isnan().all() and not got[5].any() and got[6:].isfinite().all() and got[:4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_those_of_the_input(dtype: torch.dtype, backend: str) -> None:
    x, weight, scale, bias = layer(24, 64, 48, dtype)
    for view in (x, x.view(2, 12, 64), x.view(2, 12, 64).transpose(0, 1), x[::2]):
        h = linear.int8_linear(view, weight, scale, bias)
        truth = linear.int8_linear_reference(view.double(), weight, scale, bias.double())
        assert h.shape == truth.shape and h.dtype == dtype
        assert float((h.double() - truth).abs().max() / truth.abs().max()) < 0.03


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(20, 40, 33), (1, 40, 33), (0, 40, 33)])
def test_with_a_low_rank_update(shape: tuple[int, int, int], p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "blocked")
    x, weight, scale, bias = layer(*shape)
    a, b = torch.randn(4, shape[1]), torch.randn(shape[2], 4)
    dense = linear.dequantize(weight, scale)
    grads = []
    for w in (Int8Weight(weight, scale), dense):
        torch.manual_seed(7)  # the same dropout
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        h = lora_linear(leaves[0], w, bias, *leaves[1:], 2.0, p)
        h.sum().mul(0.1).add((h**2).sum()).backward()
        grads.append([h.detach(), *(t.grad for t in leaves)])
    for mine, right in zip(*grads, strict=True):
        close(mine, right, 1e-4)
    if p == 0.0:
        close(grads[0][0], lora_linear_reference(x, Int8Weight(weight, scale), bias, a, b, 2.0), 1e-5)


def test_the_weight_is_never_wide_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "choose_backend", lambda: "blocked")
    x, weight, scale, _ = layer(4, 1024, 3000)
    blocks = linear._blocks(weight)
    assert len(blocks) > 8 and all(weight[rows].numel() <= 2 * linear.TILE * 1024 for rows in blocks)
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.shape[-1:] == (1024,):
                made.append(out.numel())
            return out

    with Watch():
        linear.input_gradient(linear.product(x, weight, scale), weight, scale)
    assert len(made) > 16 and max(made) <= 2 * linear.TILE * 1024 < weight.numel() / 10


def test_the_processor_decides_and_may_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    has = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    pairs = "pairs" if bindings.has_pairs() else "blocked"
    best = "vnni" if has else pairs
    wanted = {
        None: best,
        "vnni": "vnni",
        "blocked": "blocked",
        "pairs": "vnni" if has and pairs == "blocked" else pairs,
    }
    for asked, expected in wanted.items():
        linear.choose_backend.cache_clear()
        monkeypatch.delenv("LORAKEET_INT8", raising=False)
        if asked:
            monkeypatch.setenv("LORAKEET_INT8", asked)
        assert linear.choose_backend() == expected
    linear.choose_backend.cache_clear()


def test_rows_come_out_as_no_view_so_that_a_loss_may_overwrite_them() -> None:
    x, weight, scale, _ = layer(5, 7, 9)
    assert not linear.int8_linear(x.requires_grad_(), weight, scale)._is_view()
    a, b = torch.ones(2, x.shape[1], requires_grad=True), torch.ones(len(weight), 2, requires_grad=True)
    assert not lora_linear(x, Int8Weight(weight, scale), None, a, b, 0.5)._is_view()
