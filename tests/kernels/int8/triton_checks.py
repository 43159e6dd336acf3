"""The Triton kernels of the 8-bit product against their references; test_triton.py runs this file in its own process.

With TRITON_INTERPRET=1 they run on the CPU through Triton's interpreter. The variable must be set before Triton is imported,
and changes it for the whole process. Without it the kernels are compiled and run on the GPU.
"""

from __future__ import annotations

import pytest
import torch

from lorakeet.errors import LorakeetError
from lorakeet.kernels.int8 import triton
from lorakeet.kernels.int8.format import quantize_rows
from lorakeet.kernels.int8.reference import int8_linear_reference
from lorakeet.kernels.int8.triton import SLOTS, kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Tolerances by dtype, relative to the value and to the largest value; the interpreter truncates bf16 where a GPU rounds.
ROUNDING = {FP32: (2e-6, 2e-6), BF16: (2**-7, 2e-5), FP16: (2**-10, 2e-5)}
#: Rows, in, out, dtype, whether there is a bias, rank of the low-rank part. Blocks are 64 × 64 × 64 when interpreted; depths
#: that 16 divides go through tensor descriptors, others do not.
CASES = [
    (1, 64, 48, FP32, False, None),
    (1, 64, 48, BF16, True, 3),
    (5, 5, 3, FP32, True, 3),
    (7, 1, 1, FP16, False, 3),
    (3, 64, 1, BF16, False, None),
    (33, 48, 70, FP32, False, 70),
    (33, 48, 70, FP16, True, 3),
    (40, 257, 129, FP32, True, 70),
    (40, 257, 129, BF16, True, None),
    (150, 32, 150, FP32, True, None),
    (2, 304, 20, BF16, False, 70),
]


def normal(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def layer(inner: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scale = quantize_rows(normal(out, inner) / inner**0.5 * torch.rand(out, 1, device=DEVICE))
    return weight, scale


def same(mine: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Every value is right to the last digits of its dtype, or of the largest value in fp32."""
    assert mine.shape == truth.shape and mine.dtype == dtype
    if truth.numel():
        error, size, (own, common) = (mine.double() - truth).abs(), truth.abs(), ROUNDING[dtype]
        assert bool((error <= own * size + common * size.max()).all()), float((error / size.max()).max())


def odd_views(x: torch.Tensor) -> list[torch.Tensor]:
    """x again and again, in memory of other orders."""
    wide = torch.full((2 * x.shape[0], 3 * x.shape[1]), 7.0, dtype=x.dtype, device=DEVICE)
    wide[::2, 1::3] = x
    return [x, x.T.contiguous().T, wide[::2, 1::3]]


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "held"), [(FP32, 2**14), (BF16, 2**14), (FP16, 2**14), (FP16, 64)])
def test_rows_are_rounded_as_by_the_plain_function(
    dtype: torch.dtype, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "HELD", held)  # 64: in several passes, one row a program
    for rows, width in ((1, 1), (5, 100), (4, 257)):
        x, factor = normal(rows, width, dtype=dtype), torch.rand(width, device=DEVICE) * 1e-3
        x[0] *= 100
        x[-1] = 0
        for view, multiplier in zip(odd_views(x), (None, factor, factor), strict=True):
            rounded, scale, apart = triton.quantize_activations(view, multiplier)
            right, right_scale = quantize_rows(x if multiplier is None else x.float() * multiplier)
            assert apart is None and torch.equal(scale, right_scale) and torch.equal(rounded, right)
            assert float(scale[-1]) == 1.0


def test_halves_are_rounded_to_even_and_tiny_rows_to_zeros() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5], [1e-44] * 8], device=DEVICE)
    rounded, scale, _ = triton.quantize_activations(x)
    assert rounded.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126], [0] * 8] and scale.tolist() == [1.0, 1.0]


def test_a_row_that_the_strides_repeat() -> None:
    x = normal(1, 40).expand(5, 40)
    rounded, scale, _ = triton.quantize_activations(x)
    right, right_scale = quantize_rows(x)
    assert torch.equal(rounded, right) and torch.equal(scale, right_scale)


def test_no_rows() -> None:
    rounded, scale, _ = triton.quantize_activations(normal(0, 40))
    assert rounded.shape == (0, 40) and scale.shape == (0,)


# -- outlier columns --------------------------------------------------------------------------------------------------


def with_outliers(rows: int, width: int, columns: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Values, and ``columns`` columns of other sizes far above them, each for one row only."""
    x = normal(rows, width).clamp(-3, 3)
    for at, column in enumerate(torch.randperm(width)[:columns].tolist()):
        x[torch.randint(rows, ()), column] = (-1) ** at * (1000.0 + 16 * at)
    return x.to(dtype)


@pytest.mark.parametrize(
    ("rows", "width", "columns", "dtype", "held"),
    [
        *((40, 64, 0, FP32, 2**14), (40, 64, 1, BF16, 2**14), (40, 64, 4, FP16, 2**14), (60, 64, 9, BF16, 2**14)),
        *((12, 800, 40, FP32, 2**14), (9, 15, 1, FP32, 2**14), (260, 300, 5, FP32, 64)),
    ],
)
def test_columns_that_are_split_off(
    rows: int, width: int, columns: int, dtype: torch.dtype, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "HELD", held)
    x = with_outliers(rows, width, columns, dtype)
    right = triton.split_columns_reference(x)
    assert len(right) == min(columns, SLOTS, width // 16)
    for view in odd_views(x):
        split = triton.split_columns(view)
        if width < 16:
            assert split is None and not len(right)
            continue
        numbers, inside = split
        assert numbers[:SLOTS].tolist() == right.tolist() + [0] * (SLOTS - len(right))
        assert int(numbers[SLOTS]) == len(right)
        assert (inside == 0).nonzero()[:, 0].tolist() == right.tolist()
    if len(right):
        few = x[:, right].abs().amax(1).topk(9).indices  # rows, those with outliers among them
        x = x[few]
        rounded, scale, apart = triton.quantize_activations(x, split=split)
        rest = x.clone()
        rest[:, right] = 0
        plain, plain_scale = quantize_rows(rest)
        assert torch.equal(rounded, plain) and torch.equal(scale, plain_scale)
        assert torch.equal(apart[:, : len(right)], x[:, right]) and not apart[:, len(right) :].any()


def test_equal_columns_at_the_edge_stay_together() -> None:
    x = with_outliers(800, 64, 0)
    x[0, 10:13] = 500.0
    x[0, 20:24] = 400.0  # of these four, one would have been the fourth
    numbers, _ = triton.split_columns(x)
    assert numbers[: numbers[SLOTS]].tolist() == [10, 11, 12] == triton.split_columns_reference(x).tolist()


def test_the_bound_is_a_share_of_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(64, 64, device=DEVICE)
    for size, limit, found in ((9.0, 8.0, True), (7.0, 8.0, False), (7.0, 6.0, True)):
        monkeypatch.setattr(triton, "OUTLIER", limit)
        x[5, 17] = -size
        assert triton.split_columns_reference(x).tolist() == [17] * found
        numbers, _ = triton.split_columns(x)
        assert numbers[: numbers[SLOTS]].tolist() == [17] * found


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "inner", "out", "dtype", "has_bias", "rank"), CASES)
def test_product(rows: int, inner: int, out: int, dtype: torch.dtype, has_bias: bool, rank: int | None) -> None:
    x, (weight, scale) = normal(rows, inner, dtype=dtype), layer(inner, out)
    x[0, inner // 2] = 60.0
    x[1:][-1:] = 0
    bias = normal(out, dtype=dtype) if has_bias else None
    low = None if rank is None else (normal(rows, rank, dtype=dtype), normal(out, rank, dtype=dtype))
    h = triton.product(x, weight, scale, bias, low)
    same(h, triton.product_reference(x, weight, scale, bias, low), dtype)


@pytest.mark.parametrize(("rows", "inner", "out", "dtype"), [case[:4] for case in CASES])
def test_input_gradient(rows: int, inner: int, out: int, dtype: torch.dtype) -> None:
    g, (weight, scale) = normal(rows, out, dtype=dtype), layer(inner, out)
    g[1:][-1:] = 0
    dx = triton.input_gradient(g, weight, scale)
    same(dx, triton.input_gradient_reference(g, weight, scale), dtype)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (132, 200), (64, 8)])
def test_a_weight_is_turned(height: int, width: int) -> None:
    weight = torch.randint(-128, 128, (height, width), dtype=torch.int8, device=DEVICE)
    assert torch.equal(triton.turn(weight), weight.T)


@pytest.mark.parametrize("turn_from", [1, 10**9])
def test_input_gradient_with_the_weight_as_it_is_and_turned(turn_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "TURN_FROM", turn_from)
    turned, turn = [], triton.turn
    monkeypatch.setattr(triton, "turn", lambda w: turned.append(w) or turn(w))
    for inner, out in ((100, 48), (100, 50), (99, 48)):
        g, (weight, scale) = normal(30, out), layer(inner, out)
        right = triton.input_gradient_reference(g, weight, scale)
        same(triton.input_gradient(g, weight, scale), right, FP32)
        stored = torch.zeros(1 + weight.numel(), dtype=torch.int8, device=DEVICE)
        stored[1:] = weight.flatten()  # bytes that are no whole words
        same(triton.input_gradient(g, stored[1:].view_as(weight), scale), right, FP32)
    assert [w.shape for w in turned] == [(48, 100)] * (turn_from == 1)


@pytest.mark.parametrize(("columns", "dtype"), [(1, FP32), (4, BF16), (7, FP16), (50, FP32)])
def test_product_with_outliers(columns: int, dtype: torch.dtype) -> None:
    x, (weight, scale) = with_outliers(70, 96, columns, dtype), layer(96, 33)
    bias, low = normal(33), (normal(70, 4), normal(33, 4))  # fp32 beside any dtype
    assert len(triton.split_columns_reference(x)) == min(columns, 6)
    same(
        triton.product(x, weight, scale, bias, low),
        triton.product_reference(x, weight, scale, bias, low),
        dtype,
    )


def test_tiles_are_tried_once_for_each_kind_of_product(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    tiles = ((64, 64, 64, 4, 1), (32, 64, 64, 4, 1), (32, 32, 32, 4, 1), (16, 16, 32, 4, 1))  # two of them for 32 rows
    tuned = kernels.tune(
        tiles, do_bench=lambda call, quantiles: (call(), tried.append(1), [3 - len(tried) % 2] * 3)[-1]
    )
    monkeypatch.setattr(kernels, "tuned_multiply", tuned)
    for rows, inner, count in ((20, 64, 2), (30, 64, 2), (20, 65, 4), (20, 64, 4)):
        x, (weight, scale) = normal(rows, inner), layer(inner, 48)
        same(triton.product(x, weight, scale), triton.product_reference(x, weight, scale), FP32)
        assert len(tried) == count
    assert {config.kwargs["BLOCK_M"] for config in tuned.cache.values()} == {32}


@pytest.mark.parametrize("bucket", [2**power for power in range(4, 14)])
def test_there_are_tiles_for_every_number_of_rows(bucket: int) -> None:
    configs = kernels.tune(kernels.TILES).configs
    for descriptors in (False, True):
        fitting = kernels._fitting(configs, {"bucket": bucket}, TMA=descriptors)
        assert 1 <= len(fitting) <= 9 and all(config.kwargs["BLOCK_M"] <= bucket for config in fitting)


def test_views_give_what_their_copies_give() -> None:
    x, (weight, scale) = with_outliers(40, 64, 2), layer(64, 48)
    stored = torch.zeros(48, 80, dtype=torch.int8, device=DEVICE)
    stored[:, 3:67] = weight
    h = triton.product_reference(x, weight, scale)
    dx = triton.input_gradient_reference(x[:, :48], weight, scale)
    for view, w in zip(odd_views(x), (stored[:, 3:67], weight, weight.T.contiguous().T), strict=True):
        same(triton.product(view, w, scale), h, FP32)
        same(triton.input_gradient(view[:, :48], w, scale), dx, FP32)


def test_the_split_keeps_the_other_columns_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, scale) = normal(64, 256), layer(256, 64)
    x[:, [5, 17, 200]] *= 100
    weight[:, [5, 17, 200]] = 0  # only the part that plain rounding loses remains
    truth = int8_linear_reference(x.double(), weight, scale)
    errors = []
    for limit in (triton.OUTLIER, float("inf")):
        monkeypatch.setattr(triton, "OUTLIER", limit)
        errors.append(float((triton.product(x, weight, scale).double() - truth).norm() / truth.norm()))
    assert errors[0] < 0.01 and errors[1] > 0.3


def test_extreme_sums_do_not_overflow() -> None:
    weight = torch.full((2, 2048), 127, dtype=torch.int8, device=DEVICE)
    x = torch.full((1, 2048), 3.0, device=DEVICE)
    h = triton.product(x, weight, torch.tensor([1.0, 0.5], device=DEVICE))
    assert h.tolist() == [[pytest.approx(127 * 3 * 2048), pytest.approx(127 * 3 * 1024)]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row_alone(poison: float) -> None:
    x, (weight, scale) = normal(6, 64), layer(64, 48)
    weight[weight == 0] = 1
    x[2, 7] = poison
    for out in (triton.product(x, weight, scale), triton.input_gradient(x[:, :48], weight, scale)):
        finite = out.isfinite()
        assert not finite[2].any() and finite[[0, 1, 3, 4, 5]].all()


@pytest.mark.parametrize("shape", [(0, 64, 48), (3, 64, 0), (3, 0, 48)])
def test_empty(shape: tuple[int, int, int]) -> None:
    rows, inner, out = shape
    weight = torch.zeros(out, inner, dtype=torch.int8, device=DEVICE)
    scale, bias = torch.ones(out, device=DEVICE), normal(out)
    assert torch.equal(triton.product(normal(rows, inner), weight, scale, bias), bias.expand(rows, out))
    assert torch.equal(triton.input_gradient(normal(rows, out), weight, scale), torch.zeros(rows, inner, device=DEVICE))


def test_what_does_not_fit_is_refused() -> None:
    weight, scale = layer(64, 48)
    bad = [
        (normal(3, 63), weight, None),
        (normal(3, 64).double(), weight, None),
        (normal(3, 64), weight.float(), None),
        (normal(2, 3, 64), weight, None),
        (normal(3, 64), weight, (normal(3, 4), normal(47, 4))),
        (normal(3, 64), weight, (normal(2, 4), normal(48, 4))),
        (normal(3, 64), weight, (normal(3, 4), normal(48, 5))),
    ]
    for x, w, low in bad:
        with pytest.raises(LorakeetError, match="8-bit product of"):
            triton.product(x, w, scale, low_rank=low)


def test_the_device_is_named() -> None:
    can, how = triton.available(torch.device(DEVICE))
    assert can and "Triton" in how
