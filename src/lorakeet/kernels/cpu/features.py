"""Features of this processor that decide which kernel runs; no other module asks for them.

The compiled library answers through one C function (``csrc/features.c``). It lists a feature only if it has code for it
and the operating system permits it. Without a library torch answers, for its own int8 product.

``LORAKEET_CPU_FEATURES`` overrides the answer with a list such as ``avx2,vnni``; an empty list means no feature. A list of
names with signs, such as ``-vnni,+amd``, adds and removes features. It selects kernels, for tests and comparisons. It cannot
name a feature whose kernels would not run here.
"""

from __future__ import annotations

import os
from enum import StrEnum
from functools import cache

import torch

from lorakeet.errors import ConfigError
from lorakeet.kernels.cpu.build import library, switched_off


class Feature(StrEnum):
    """A feature of a processor, under the name that ``csrc/features.c`` gives it."""

    #: The library has the tiled products (``gemm_*.c``).
    AVX2 = "avx2"
    #: The tiled products use vectors of 512 bits.
    AVX512 = "avx512"
    #: 8-bit dot products (AVX-512 VNNI or AVX-VNNI).
    VNNI = "vnni"
    #: A processor of AMD, on which ``gemm_f32.c`` is faster than the matrix library of torch.
    AMD = "amd"
    #: 8-bit products in tiles (AMX-INT8), which Linux permits.
    AMX = "amx"
    #: 16-bit products (AVX512_BF16) in torch: bf16 is no slower than fp32. Our loops have none.
    BF16 = "bf16"


def detected() -> frozenset[Feature]:
    """Return the features that this processor has, and whose compiled products are right on it."""
    loaded = library()
    if loaded is None:
        return _of_torch() | ({Feature.VNNI} if torch.cpu._is_vnni_supported() else set())
    return _of_torch() | {Feature(name) for name in set(loaded.lk_cpu_features().decode().split()) - switched_off()}


def _of_torch() -> frozenset[Feature]:
    """Return the features whose kernels are torch's own."""
    return frozenset({Feature.BF16} if torch.cpu._is_avx512_bf16_supported() else ())


def runnable() -> frozenset[Feature]:
    """Return the features whose kernels run here, if slowly.

    8-bit dot products are emulated exactly: by ``gemm_w8a8_grouped.c``, and without a library by torch. So is bf16, by
    torch, and AMX by a library for processors without it (``csrc/gemm/amx.h``). The choice of the fp32 product by vendor is
    one of speed alone.
    """
    emulated = {Feature.VNNI, Feature.BF16}
    if (loaded := library()) is not None and Feature.AVX2 in detected():
        emulated |= {Feature.AMD, Feature.AMX} if loaded.lk_emulates_amx() else {Feature.AMD}
    return (detected() | emulated) - {Feature(name) for name in switched_off() if name}


@cache
def available() -> frozenset[Feature]:
    """Return the features to choose kernels by: those detected, or those that ``LORAKEET_CPU_FEATURES`` names.

    Raises:
        ConfigError: The variable names an unknown feature, or one whose kernels do not run here.
    """
    asked = os.environ.get("LORAKEET_CPU_FEATURES")
    names = _said(detected(), asked)
    possible = sorted(runnable())
    if wrong := sorted((names - set(possible)) | (_named(asked) - set(Feature))):
        raise ConfigError(
            f"LORAKEET_CPU_FEATURES: {', '.join(wrong)} cannot be used on this machine",
            hint=f"leave it out, or name some of: {', '.join(possible) or 'none'}",
        )
    return frozenset(Feature(name) for name in names)


def has_bf16() -> bool:
    """Whether torch has fast products in bf16 here, or the override says so; nothing is compiled for the answer."""
    return Feature.BF16 in _said(_of_torch(), os.environ.get("LORAKEET_CPU_FEATURES"))


def _said(found: frozenset[Feature], asked: str | None) -> set[str]:
    """Return the names of the features that are there, given those ``found`` and what is ``asked`` for."""
    words = _words(asked)
    if asked is None or (words and all(word[0] in "+-" for word in words)):
        added = {word[1:] for word in words if word[0] == "+"}
        return ({*map(str, found)} | added) - {word[1:] for word in words if word[0] == "-"}
    return set(words)


def _named(asked: str | None) -> set[str]:
    return {word.lstrip("+-") for word in _words(asked)}


def _words(asked: str | None) -> list[str]:
    return [word.strip().lower() for word in (asked or "").split(",") if word.strip()]


def has(feature: Feature) -> bool:
    """Whether kernels may use a feature."""
    return feature in available()
