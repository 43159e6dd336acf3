"""The NF4 format of a frozen weight: 4-bit codes, one scale for each block of 64 values, and scales that are rounded too.

    w ≈ VALUES[code] · a            a = table[q] · s + m

The sixteen values are quantiles of the normal distribution, scaled to −1…1. Blocks run through the weight row by row. The
scale a of a block is its largest magnitude. With double quantization a is stored as a code q of 8 bits. m is the mean of all
scales, and s the largest magnitude of 256 of them without that mean. ``table`` has 256 values that are dense around 0. That
is 4.13 bits a weight. Dettmers et al. 2023 ("QLoRA", arXiv:2305.14314, section 3 and appendix E).

The layout is that of `bitsandbytes`: two codes a byte, the first one in the upper half.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.errors import LorakeetError
from lorakeet.kernels.cpu.abi import NF4_VALUES

#: Values of a weight that share a scale.
BLOCK = 64
#: Scales that share a scale of their own.
SCALE_BLOCK = 256
#: Codes of a scale.
SCALE_CODES = 256
#: The sixteen values, by code (QLoRA, appendix E).
VALUES = NF4_VALUES
#: Largest error of a rounded value over the scale of its block: half of the widest gap, and the rounding of the scale itself.
MAX_ERROR = 0.16


class Nf4Tensors(NamedTuple):
    """A weight [out, in] in four bits; a value that refers to its tensors.

    Attributes:
        weight: Codes, uint8 [⌈out·in/2⌉, 1].
        absmax: Scales of the blocks: codes, uint8 [blocks]; or fp32 [blocks], if ``nested`` is None.
        nested: fp32 [:func:`nested_size`]: the mean, the table of 256 values, and the scale of each 256 scales; or None.
        shape: (out, in).
    """

    weight: Tensor
    absmax: Tensor
    nested: Tensor | None
    shape: tuple[int, int]


def code_count(shape: tuple[int, int]) -> int:
    """Return the number of bytes that hold the codes of a weight."""
    return -(-shape[0] * shape[1] // 2)


def block_count(shape: tuple[int, int]) -> int:
    """Return the number of blocks of a weight."""
    return -(-shape[0] * shape[1] // BLOCK)


def is_readable(tensors: Nf4Tensors) -> bool:
    """Whether compiled products can read a weight: not empty, each row has whole blocks, and each tensor its size."""
    return all(tensors.shape) and tensors.shape[1] % BLOCK == 0 and _fits(tensors)


def _fits(tensors: Nf4Tensors) -> bool:
    codes, absmax, nested, shape = tensors
    if codes.dtype != torch.uint8 or codes.numel() != code_count(shape):
        return False
    if absmax.shape != (block_count(shape),) or absmax.dtype != (torch.float32 if nested is None else torch.uint8):
        return False
    return nested is None or (nested.dtype == torch.float32 and nested.shape == (nested_size(shape),))


def nested_size(shape: tuple[int, int]) -> int:
    """Return the length of ``nested`` for a weight."""
    return 1 + SCALE_CODES - (-block_count(shape) // SCALE_BLOCK)


@cache
def _constants() -> tuple[Tensor, Tensor]:
    """Return the sixteen values, and both values of each of the 256 bytes [256, 2]."""
    values = torch.tensor(VALUES)
    code = torch.arange(256)
    return values, torch.stack((values[code // 16], values[code % 16]), 1)


@cache
def scale_table() -> Tensor:
    """Return the 256 values of a scale's code, fp32 in order: seven decades of each sign, with ever more values, 0 and 1.

    It is the dynamic table of Dettmers 2015 (arXiv:1511.04561), with the numbers of `bitsandbytes`.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middle = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        found += [*middle.tolist(), *(-middle).tolist()]
    return torch.tensor(sorted(found))


def quantize(weight: Tensor, double: bool = True) -> Nf4Tensors:
    """Round a weight to NF4.

    Args:
        weight: [out, in], any floating dtype, finite.
        double: Round the scales to 8 bits, too.
    """
    out, inner = weight.shape
    shape, device = (out, inner), weight.device
    flat = weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if len(blocks) else flat.new_zeros(0)
    scaled = blocks * torch.where(absmax == 0, 1.0, absmax.reciprocal()).unsqueeze(1)
    values = _constants()[0].to(device)
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8).view(-1)
    codes = F.pad(codes[: len(flat)], (0, len(flat) % 2))
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    if not double:
        return Nf4Tensors(packed, absmax, None, shape)
    return Nf4Tensors(packed, *_quantize_scales(absmax), shape)


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Round the scales of blocks [n] to 8 bits: codes uint8 [n], and ``nested``."""
    table = scale_table().to(absmax.device)
    mean = absmax.mean() if len(absmax) else absmax.new_zeros(())
    groups = F.pad(absmax - mean, (0, -len(absmax) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = groups.abs().amax(1) if len(groups) else absmax.new_zeros(0)
    scaled = groups / torch.where(largest == 0, 1.0, largest).unsqueeze(1)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8).view(-1)
    return codes[: len(absmax)].clone(), torch.cat((mean.view(1), table, largest))


def _check(tensors: Nf4Tensors) -> None:
    if not _fits(tensors):
        got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors[:3] if t is not None)
        raise LorakeetError(f"4-bit weight {list(tensors.shape)} of {got}: expected codes and scales of its blocks")


def block_scales(tensors: Nf4Tensors) -> Tensor:
    """Return the scale of each block, fp32 [blocks].

    Raises:
        LorakeetError: The tensors do not have the sizes of the shape.
    """
    _check(tensors)
    absmax, nested = tensors.absmax, tensors.nested
    if nested is None:
        return absmax
    table, largest = nested[1 : 1 + SCALE_CODES], nested[1 + SCALE_CODES :]
    return table[absmax.int()].mul_(largest.repeat_interleave(SCALE_BLOCK)[: len(absmax)]).add_(nested[0])


def dequantize(
    tensors: Nf4Tensors, dtype: torch.dtype = torch.float32, rows: slice = slice(None), scales: Tensor | None = None
) -> Tensor:
    """Return values of the weight.

    Args:
        tensors: The weight [out, in].
        dtype: Of the result.
        rows: Output channels, a run of them; all by default.
        scales: Those of :func:`block_scales`, if they are known.

    Returns:
        [out, in], or the output channels ``rows``.

    Raises:
        LorakeetError: The tensors do not have the sizes of the shape.
    """
    _check(tensors)
    out, inner = tensors.shape
    first, last, _ = rows.indices(out)
    scales = block_scales(tensors) if scales is None else scales
    begin, end = first * inner // BLOCK * BLOCK, last * inner  # whole blocks
    codes = tensors.weight.view(-1)[begin // 2 : -(-end // 2)]
    values = _constants()[1].to(codes.device)[codes.int()].view(-1)
    wide = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK) * scales[begin // BLOCK : -(-end // BLOCK), None]
    return wide.view(-1)[first * inner - begin : end - begin].view(last - first, inner).to(dtype)


def dequantize_at(tensors: Nf4Tensors, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the output channels ``rows``, int64 [n], of the weight; [n, in]."""
    inner = tensors.shape[1]
    at = rows.unsqueeze(1) * inner + torch.arange(inner, device=rows.device)
    values = _constants()[1].to(rows.device)[tensors.weight.view(-1)[at // 2].int()]
    return (torch.where(at % 2 == 0, values[..., 0], values[..., 1]) * block_scales(tensors)[at // BLOCK]).to(dtype)
