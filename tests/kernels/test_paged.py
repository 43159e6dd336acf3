"""Rows over pages through compiled decoder layers, against plain torch in fp64; and the same bits in any company."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lorakeet.kernels import paged
from lorakeet.kernels.cpu import features
from lorakeet.kernels.cpu.features import Feature
from lorakeet.kernels.decoder_step import Layer, LinearWeights, Norm, Update
from lorakeet.kernels.int8.format import quantize_weight
from lorakeet.kernels.paged import LayerWeights, PagedLayers, Rows, UpdateTable, paged_layers_reference

pytestmark = pytest.mark.skipif(not paged.is_available(), reason="nothing is compiled on this machine")
PAGES, PAGE = 24, 32
#: Hidden size, heads, heads of the cache, head width, width of the feed-forward block, whether heads have norms and biases.
SHAPES = [(64, 4, 2, 16, 100, False), (52, 3, 1, 48, 75, True), (96, 2, 2, 80, 1300, True)]


class Model(NamedTuple):
    """Two layers and adapters of mixed rank."""

    weights: list[LayerWeights]
    layers: PagedLayers
    updates: list[list[list[Update | None]]]
    tables: list[UpdateTable]


def linear_weights(out: int, inner: int, bias: bool) -> LinearWeights:
    weight, scale = quantize_weight(torch.randn(out, inner) / inner**0.5)
    return LinearWeights(weight, scale, torch.randn(out) if bias else None)


def updates_of(rank: int, sizes: list[tuple[int, int]]) -> list[Update | None]:
    """Build updates of some of the linear layers."""
    made: list[Update | None] = []
    for at, (out, inner) in enumerate(sizes):
        a, b = torch.randn(rank, inner) / inner**0.5, torch.randn(out, rank) / rank**0.5
        output = torch.randn(2, out) if rank > 5 and at % 3 == 0 else None
        made.append(Update(a, b, 0.7, output) if at % 3 or rank > 5 else None)
    return made


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Model:
    hidden, heads, kv_heads, dim, inner, full = request.param
    torch.manual_seed(3)
    wide, narrow = heads * dim, kv_heads * dim
    sizes = [(wide, hidden), *[(narrow, hidden)] * 2, (hidden, wide), *[(inner, hidden)] * 2, (hidden, inner)]
    weights = []
    for _ in range(2):
        norms: list[Norm | None] = [Norm(torch.rand(hidden) + 0.5, 1e-5) for _ in range(2)]
        norms += [Norm(torch.rand(dim) + 0.5, 1e-6) if full else None for _ in range(2)]
        weights.append(LayerWeights([linear_weights(*size, full) for size in sizes], norms, dim, dim**-0.5))
    updates = [[updates_of(rank, sizes) for _ in range(2)] for rank in (3, 8, 17, 1)]
    return Model(weights, PagedLayers([Layer(*one) for one in weights]), updates, [*map(UpdateTable, updates)])


class Story(NamedTuple):
    """Tokens of several sequences: [pages, adapter or None, tokens]; a shared first page; and vectors for each token."""

    sequences: list[tuple[list[int], int | None, int]]
    x: list[Tensor]
    cosine: Tensor
    sine: Tensor


def story(model: Model, seed: int = 0) -> Story:
    torch.manual_seed(seed)
    sequences: list[tuple[list[int], int | None, int]] = [
        ([3], None, 1),
        ([5, 0, 9], 1, 70),
        ([7, 8], None, 17),
        ([2], 0, 16),
    ]
    sequences += [([11, 4], 2, 33), ([6, 1], 1, 18), ([10], 3, 5), ([12], 2, 2)]
    angle = 6 * torch.rand(PAGE * 4, model.layers.dim // 2).repeat(1, 2)
    x = [torch.randn(length, model.layers.hidden) for _, _, length in sequences]
    return Story(sequences, x, angle.cos(), angle.sin())


def pool(model: Model) -> Tensor:
    """Build keys and values of all pages; values that no row wrote are not finite."""
    return torch.full((2, 2, PAGES, model.layers.kv_heads, PAGE, model.layers.dim), torch.nan)


def run(model: Model, told: Story, chosen: list[tuple[int, int, int]], memory: Tensor) -> list[Tensor]:
    """Compute runs of tokens together: (sequence, first token, end)."""
    chosen_by_adapter = sorted(chosen, key=lambda one: -1 if (a := told.sequences[one[0]][1]) is None else a)
    rows = [(number, at) for number, first, end in chosen_by_adapter for at in range(first, end)]
    x = torch.stack([told.x[number][at] for number, at in rows]) if rows else torch.empty(0, model.layers.hidden)
    positions = [at for _, at in rows]
    adapters = [told.sequences[number][1] for number, _ in rows]
    given = Rows(
        [pages for pages, _, _ in told.sequences],
        [number for number, _ in rows],
        positions,
        [None if one is None else model.tables[one] for one in adapters],
    )
    h = model.layers.run(x, given, *memory, told.cosine[positions], told.sine[positions])
    where = dict(zip(rows, h, strict=True))
    return [torch.stack([where[number, at] for at in range(first, end)]) for number, first, end in chosen]


def whole(told: Story) -> list[tuple[int, int, int]]:
    return [(number, 0, length) for number, (_, _, length) in enumerate(told.sequences)]


def test_rows_are_as_plain_torch_computes_them(model: Model) -> None:
    told, memory = story(model), pool(model)
    found = run(model, told, whole(told), memory)
    wide = memory.double().nan_to_num(0) * 0
    for number, (pages, adapter, length) in enumerate(told.sequences):
        positions = list(range(length))
        own = None if adapter is None else model.updates[adapter]
        wanted = paged_layers_reference(
            model.weights,
            told.x[number].double(),
            [pages],
            [0] * length,
            positions,
            [own] * length,
            *wide,
            told.cosine[positions].double(),
            told.sine[positions].double(),
        )
        error = float((found[number] - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-3, f"sequence {number}: {error:.1e}"  # activations are rounded to 15 bits
    written = memory.isfinite()
    assert torch.equal(written, wide != 0)
    assert float((memory - wide)[written].abs().max() / wide.abs().max()) < 1e-3


def test_bits_do_not_depend_on_company_or_division(model: Model) -> None:
    told = story(model, 1)
    together_in = pool(model)
    together = run(model, told, whole(told), together_in)  # 155 rows: the loops for many
    for step in (1, 7, 16):
        memory = pool(model)
        parts: list[list[Tensor]] = [[] for _ in told.sequences]
        for first in range(0, 70, step):
            chosen = [
                (number, first, min(first + step, length))
                for number, (_, _, length) in enumerate(told.sequences)
                if first < length
            ]
            for (number, _, _), one in zip(chosen, run(model, told, chosen, memory), strict=True):
                parts[number].append(one)
        assert all(torch.equal(torch.cat(mine), one) for mine, one in zip(parts, together, strict=True)), step
        assert torch.equal(memory.nan_to_num(0), together_in.nan_to_num(0))
    memory = pool(model)
    assert all(torch.equal(run(model, told, [one], memory)[0], together[one[0]]) for one in whole(told))


def test_bits_do_not_depend_on_threads(model: Model) -> None:
    told, found, before = story(model, 4), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            memory = pool(model)
            parts = [
                whole(told),
                [(number, length - 1, length) for number, (_, _, length) in enumerate(told.sequences)],
            ]
            found.append([tensor for part in parts for tensor in run(model, told, part, memory)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, one) for other in found[1:] for mine, one in zip(other, found[0], strict=True))


def test_the_same_bits_in_tiles_of_amx(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    if Feature.AMX not in features.runnable():
        pytest.skip("Linux refuses the tiles of AMX")
    told, found = story(model, 3), []
    for said in (features.available() - {Feature.AMX}, features.available() | {Feature.AMX}):
        monkeypatch.setattr(features, "available", lambda said=said: said)
        found.append(run(model, told, whole(told), pool(model)))
    assert all(torch.equal(mine, one) for mine, one in zip(*found, strict=True))


def test_an_adapter_that_is_not_finite_spoils_its_own_rows_and_no_others(model: Model) -> None:
    told = story(model, 2)
    sound = run(model, told, whole(told), pool(model))
    for place in (0, 1):  # A, B
        spoilt = [[*layer] for layer in model.updates[1]]
        given = [*spoilt[1][4]]  # type: ignore[misc]
        given[place] = given[place].clone()
        given[place][1, 2] = torch.inf if place else torch.nan
        spoilt[1][4] = Update(*given)
        tables = [*model.tables]
        tables[1] = UpdateTable(spoilt)
        found = run(model._replace(tables=tables), told, whole(told), pool(model))
        for (_, adapter, _), one, other in zip(told.sequences, found, sound, strict=True):
            assert bool(one.isnan().all()) if adapter == 1 else torch.equal(one, other)


def test_no_rows_and_rows_outside_of_their_pages(model: Model) -> None:
    told, memory = story(model), pool(model)
    assert run(model, told, [], memory) == []
    layers, x, angles = model.layers, told.x[0], (told.cosine[:1], told.sine[:1])
    with pytest.raises(ValueError, match="position 32 is outside of the 32 tokens"):
        layers.run(x, Rows([[3]], [0], [32], [None]), *memory, *angles)
    with pytest.raises(ValueError, match="are outside of the pool"):
        layers.run(x, Rows([[PAGES]], [0], [0], [None]), *memory, *angles)
    with pytest.raises(ValueError, match="expected contiguous fp32"):
        layers.run(x.double(), Rows([[3]], [0], [0], [None]), *memory, *angles)
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        layers.run(x, Rows([[3]], [0], [0], [None]), *memory[..., :9, :].contiguous(), *angles)
