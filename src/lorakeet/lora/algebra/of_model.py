"""Combination of adapters as a method of a model with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.lora.algebra.combine import combine
from lorakeet.lora.algebra.methods import make_method
from lorakeet.lora.lifecycle.rollback import all_or_nothing


class CombineMethods:
    """The method of a model with adapters that combines them; a part of :class:`lorakeet.lora.model.LoraModel`."""

    def add_weighted_adapter(
        self: Any,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Combine adapters into a new one; it is frozen and inactive until :meth:`set_adapter`.

        Args:
            adapters: Names of the adapters; each is plain LoRA without modules trained whole.
            weights: One for each, of any sign.
            adapter_name: Name of the new adapter.
            combination_type: One of :data:`lorakeet.lora.algebra.methods.METHODS`, all defined there on the dense ΔW.
            svd_rank: The rank of the methods with ``svd``; None: the largest rank of the adapters.
            svd_clamp: Quantile beyond which the methods with ``svd`` clamp the values of A and B.
            svd_full_matrices: Without effect: the result is the same.
            svd_driver: Without effect: the decomposition is computed in fp64 by the default driver.
            density: Share of the entries of each ΔW that pruning keeps.
            majority_sign_method: How TIES elects a sign: ``total`` or ``frequency``.

        Raises:
            AdapterError: no such adapter; one of them has more than A and B; or they cannot be combined in this way.
        """
        for name in adapters:
            self._check_known(name)
        more: dict[str, Any] = {"density": density, "majority_sign_method": majority_sign_method, "clamp": svd_clamp}
        combined = combine(self, adapters, weights, make_method(combination_type, rank=svd_rank, **more))
        with all_or_nothing(self):
            self.add_adapter(adapter_name, combined.config, strict=False)
            combined.fill(self, adapter_name)
