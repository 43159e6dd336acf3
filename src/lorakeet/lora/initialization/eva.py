"""EVA: A begins as the directions in which the inputs of a layer vary most, and ranks go where they explain most.

Paischer et al. 2024 (arXiv:2410.07170), section 3: for the inputs X of each layer, centered and seen batch by batch,

    X = U·Σ·Vᵀ        A = V_rᵀ        B = 0

computed by an incremental SVD (Ross et al. 2008) until the directions stay. Each has the share σᵢ²/‖X‖² of the variance; the
budget of all ranks goes to the largest shares, at most ρ·r to one layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorakeet.errors import AdapterError
from lorakeet.log import warn
from lorakeet.rng import seeded

#: Passes over the data after which directions that still turn are taken as they are.
_MOST_PASSES = 100
#: Multiple of the wanted directions from which on an SVD is randomized; an exact one would take minutes.
_RANDOMIZED = 8
_SEED = 0
#: Samples of a batch, and batches, that a run reads before its training.
BATCH, BATCHES = 8, 32


@dataclass
class InputSvd:
    """Incremental SVD of the centered inputs of a layer.

    Attributes:
        wanted: Number of directions.
        tau: Cosine similarity from which on a direction has converged.
        directions: [wanted, in], one in each row; None before the first batch.
        values: Their singular values.
        converged: Whether each has, in the last step.
        energy: ‖X‖² of the centered inputs.
    """

    wanted: int
    tau: float
    directions: Tensor | None = None
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    converged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    energy: float = 0.0
    _mean: Tensor = field(default_factory=lambda: torch.empty(0))
    _seen: int = 0

    def update(self, x: Tensor) -> None:
        """Take further inputs [n, in] into account; fewer than the wanted directions are left out."""
        x = x.float()
        count, mean = len(x), x.mean(0)
        self.wanted = min(self.wanted, x.shape[1])
        if count < self.wanted:
            return
        rows, total = x - mean, self._seen + count
        self.energy += float(rows.square().sum())
        if self.directions is not None:
            shift = self._mean - mean
            weight = self._seen * count / total
            self.energy += weight * float(shift.square().sum())
            rows = torch.cat([self.values[:, None] * self.directions, rows, weight**0.5 * shift[None]])
        values, directions = _svd(rows, self.wanted)
        before, self.directions, self.values = self.directions, directions, values
        if before is None:
            self.converged = torch.zeros(len(values), dtype=torch.bool)
            self._mean = mean
        else:
            self.converged = (before * directions).sum(1).abs().cpu() >= self.tau
            self._mean = (self._seen * self._mean + count * mean) / total
        self._seen = total

    @property
    def shares(self) -> list[float]:
        """Share of the variance of each direction."""
        return [float(value) ** 2 / max(self.energy, 1e-30) for value in self.values]


def _svd(rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values, and their right singular vectors as rows."""
    if min(rows.shape) > _RANDOMIZED * wanted:
        with seeded(_SEED):
            _, values, v = torch.svd_lowrank(rows, 2 * wanted, niter=4)
        return values[:wanted], v.T[:wanted]
    _, values, vh = torch.linalg.svd(rows, full_matrices=False)
    return values[:wanted], vh[:wanted]


def share_ranks(shares: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """Return the rank of each layer: the ``budget`` directions with the largest shares of their layer's variance.

    Args:
        shares: Shares of the directions, by layer.
        budget: Sum of the ranks.
    """
    ordered = sorted(((share, name) for name, own in shares.items() for share in own), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(shares, 0)
    for _, name in ordered[:budget]:
        ranks[name] += 1
    return ranks


class _Recorder:
    """Forward hooks that hand the inputs of layers to a function."""

    def __init__(
        self, layers: Mapping[str, Any], take: Callable[[str, Tensor], None], prepare: Callable[[str, Any], Tensor]
    ):
        self.layers, self.take, self.prepare = layers, take, prepare

    def run(self, names: Iterable[str], forward: Callable[[], Any]) -> None:
        """Run the model once, and take the inputs of the layers of these names."""
        handles = [self.layers[name].register_forward_hook(self._hook(name)) for name in names]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.take(name, self.prepare(name, args))

        return hook


@torch.no_grad()
def input_directions(
    layers: Mapping[str, Any],
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    prepare: Callable[[Any, str, Any], Tensor],
    config: Any,
) -> dict[str, Tensor]:
    """Compute A of each layer from its inputs.

    Args:
        layers: Modules to watch, by name.
        ranks: Their ranks by the settings.
        batches: Batches; they are run again from the beginning until the directions have converged.
        forward: Function that runs the model on a batch.
        prepare: Function of a batch, a layer's name and its input: the inputs [n, in] that count.
        config: An :class:`~lorakeet.lora.initialization.settings.EvaConfig`.

    Returns:
        A [rank, in] by layer; a layer with rank 0 gets no adapter.

    Raises:
        AdapterError: There is no batch, or none has as many tokens as a layer has directions.
    """
    first = next(iter(batches), None)
    if first is None:
        raise AdapterError("the dataloader is empty, expected batches for EVA")
    same = _same_inputs(layers, partial(forward, first), partial(prepare, first))
    most = {
        name: max(round(ranks[other] * config.rho) for other in layers if same[other] == same[name]) for name in layers
    }
    states = {name: InputSvd(most[name], config.tau) for name in layers if same[name] == name}
    chosen: dict[str, int] = {name: most[name] for name in layers}

    def update(name: str, x: Tensor) -> None:
        states[name].update(x)

    for _ in range(_MOST_PASSES):
        for batch in batches:
            open_ones = [name for name, state in states.items() if not _is_done(state, _needed(name, chosen, same))]
            if not open_ones:
                return _first_directions(layers, states, same, chosen, config.whiten)
            recorder = _Recorder(layers, update, partial(prepare, batch))
            recorder.run(open_ones, partial(forward, batch))
            if all(state.directions is not None for state in states.values()):
                chosen = share_ranks({name: states[same[name]].shares for name in layers}, sum(ranks.values()))
        if unseen := [name for name, state in states.items() if state.directions is None]:
            raise AdapterError(
                f"no batch has {states[unseen[0]].wanted} tokens, the directions that {unseen[0]} needs",
                "give larger batches, or a lower r or rho",
            )
    warn(
        f"the directions of some inputs still turn after {_MOST_PASSES} passes over the data, and are taken as they are"
    )
    return _first_directions(layers, states, same, chosen, config.whiten)


def _same_inputs(
    layers: Mapping[str, Any], forward: Callable[[], Any], prepare: Callable[[str, Any], Tensor]
) -> dict[str, str]:
    """Map each layer to the first one with the same inputs in one batch; its SVD serves all of them."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}

    def take(name: str, x: Tensor) -> None:
        content = x.detach().float().cpu().contiguous().numpy().tobytes()
        same[name] = first.setdefault(hashlib.blake2b(content + str(x.shape).encode()).digest(), name)

    _Recorder(layers, take, prepare).run(layers, forward)
    if missing := [name for name in layers if name not in same]:
        raise AdapterError(f"{missing[0]} does not run on the first batch, so its inputs are unknown", "leave it out")
    return same


def _needed(name: str, chosen: Mapping[str, int], same: Mapping[str, str]) -> int:
    return max(chosen[other] for other, first in same.items() if first == name)


def _is_done(state: InputSvd, needed: int) -> bool:
    return state.directions is not None and bool(state.converged[:needed].all())


def _first_directions(
    layers: Iterable[str],
    states: Mapping[str, InputSvd],
    same: Mapping[str, str],
    chosen: Mapping[str, int],
    whiten: bool,
) -> dict[str, Tensor]:
    """Return A of each layer; with ``whiten``, each direction is divided by the root of its singular value.

    Args:
        layers: Names of the layers.
        states: The SVD of the inputs, by the first layer that has them.
        same: The first layer with the inputs of each.
        chosen: Ranks.
        whiten: As in the settings.
    """
    made = {}
    for name in layers:
        state = states[same[name]]
        assert state.directions is not None
        a = state.directions[: chosen[name]]
        made[name] = a / state.values[: chosen[name], None].sqrt() if whiten else a.clone()
    return made


def first_batches(samples: Iterable[Any], collate: Callable[[list[Any]], Any], most: int = BATCHES) -> list[Any]:
    """Return the first batches of samples, in their order.

    Args:
        samples: Samples.
        collate: Function that makes a batch of a list of them.
        most: Number of batches.
    """
    rows = list(islice(samples, BATCH * most))
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
