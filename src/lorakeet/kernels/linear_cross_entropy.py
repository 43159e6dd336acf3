"""Cross-entropy of a language-modelling head in chunks, without the full logits; the gradient is computed in the same pass.

    z = c(s·head(x)),   ℓ = Σ_t log Σ_v exp z_tv - z_t,y(t)

with s a scale (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``) and c(z) = z, or τ·tanh(z/τ) where logits are
capped at τ (Gemma 2). A few rows at a time: logits, loss, and at once

    ∂ℓ/∂head(x) = s·c'·(softmax(z) - onehot(y)),   c' = 1 - (z/τ)²   (1 without a cap)

which the head's backward carries to x and to its trainable parameters: a weight, a bias, an adapter. The gradient overwrites
the logits. Saved for backward are the gradient to x, as large as x, and those of the parameters.
A frozen head of nothing but an fp32 weight is one call of C on a CPU, with the same bits.
Computing the gradient in the forward pass: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels import fixed_order
from lorakeet.kernels.cpu import bindings, gemm
from lorakeet.kernels.cpu import head as compiled

#: Logits in fp32 held at once (32 MiB); :data:`MIN_ROWS` rows are taken in any case.
CHUNK_LOGITS = 1 << 23
#: Rows. Smallest chunk.
MIN_ROWS = 64

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitMap:
    """Map from the head's output to logits: s·z, or τ·tanh(s·z/τ) with a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def linear_cross_entropy_reference(x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap) -> Tensor:
    """Compute the reference: all logits at once, differentiated by autograd.

    Args:
        x: [n, hidden].
        targets: int64 [n].
        head: [n, hidden] -> [n, vocabulary].
        logit_map: Map from the head's output to logits.

    Returns:
        Loss of each row, fp32 [n].
    """
    return F.cross_entropy(logit_map(head(x).float()), targets, reduction="none")


def linear_cross_entropy(
    x: Tensor,
    targets: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    logit_map: LogitMap | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum the cross-entropy of the rows of ``x``; differentiable in ``x`` and ``parameters``.

    Args:
        x: [n, hidden], n ≥ 0.
        targets: [n] int64, each an index into the vocabulary.
        head: [rows, hidden] -> [rows, vocabulary], row by row. Called once for each chunk.
        parameters: Parameters of ``head``; the trainable ones get a gradient, and nothing else there does.
        logit_map: Map from the head's output to logits; the identity if None.
        weight: W [vocabulary, hidden] of a head that is x·Wᵀ, and no more; None for any other head.

    Returns:
        A scalar, fp32; 0 with gradients of 0 for no rows.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    logit_map = logit_map or LogitMap()
    if weight is not None and not trainable and _compiled_supports(x, targets, weight, logit_map):
        many = _rows_in_tiles(len(targets), len(weight))
        total = _FrozenLinearCrossEntropy.apply(x[:many], targets[:many], weight, logit_map.scale)
        if many == len(targets):
            return total
        return total + _LinearCrossEntropy.apply(x[many:], targets[many:], head, logit_map)
    return _LinearCrossEntropy.apply(x, targets, head, logit_map, *trainable)


@torch.no_grad()
def row_losses(
    x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap | None = None, weight: Tensor | None = None
) -> Tensor:
    """Compute the cross-entropy of each row without a gradient.

    Args:
        x: [n, hidden].
        targets: int64 [n].
        head: [rows, hidden] -> [rows, vocabulary].
        logit_map: Map from the head's output to logits; the identity if None.
        weight: As for :func:`linear_cross_entropy`.

    Returns:
        fp32 [n].
    """
    logit_map = logit_map or LogitMap()
    if weight is not None and _compiled_supports(x, targets, weight, logit_map):
        return _compiled_losses(x, targets, weight, logit_map.scale, gradient=False)[0]
    losses = torch.zeros(len(targets), dtype=torch.float32, device=x.device)
    for rows in _chunks(x, targets, head):
        losses[rows], _ = _loss_and_gradient(head(x[rows]), targets[rows], logit_map, gradient=False)
    return losses


def _chunks(x: Tensor, targets: Tensor, head: Head) -> list[slice]:
    """Return slices of the rows, one for each chunk; the head determines the size of the vocabulary."""
    if not len(targets):
        return []
    vocabulary = getattr(head, "out_features", None)
    if vocabulary is None:
        with torch.no_grad():
            vocabulary = head(x[:1]).shape[-1]
    size = _chunk_rows(int(vocabulary))
    return [slice(start, min(start + size, len(targets))) for start in range(0, len(targets), size)]


def _chunk_rows(vocabulary: int) -> int:
    return max(MIN_ROWS, CHUNK_LOGITS // vocabulary)


def _rows_in_tiles(count: int, vocabulary: int) -> int:
    """Return the rows without a last chunk so small that other code multiplies it, with other bits."""
    few = count % _chunk_rows(vocabulary)
    return count - few if few <= gemm.GEMV_TOKENS else count


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, logit_map: LogitMap, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each row and its gradient to the logits, both fp32; overwrites fp32 logits.

    Without ``gradient`` the second tensor has no meaning.
    """
    z = logits.detach().float()
    if z.data_ptr() == logits.data_ptr() and logits._is_view():  # autograd forbids overwriting views
        z = z.clone()
    if logit_map.softcap is None and logit_map.scale > 0 and _kernel_supports(z, targets):
        return bindings.cross_entropy(z, targets, logit_map.scale, gradient), z
    if logit_map.scale != 1.0:
        z.mul_(logit_map.scale)
    slope = None
    if logit_map.softcap is not None:
        z.div_(logit_map.softcap).tanh_()
        slope = (1 - z * z) if gradient else None
        z.mul_(logit_map.softcap)
    z.sub_(z.amax(-1, keepdim=True))
    picked = targets[:, None]
    right = z.gather(1, picked)
    total = z.exp_().sum(-1, keepdim=True)
    losses = (total.log() - right)[:, 0]
    if gradient:
        z.mul_(logit_map.scale / total)  # s·softmax
        z.scatter_add_(1, picked, z.new_full((), -logit_map.scale).expand_as(picked))
        if slope is not None:
            z.mul_(slope)
    return losses, z


def _kernel_supports(z: Tensor, targets: Tensor) -> bool:
    """Whether the compiled kernel can read these."""
    return bindings.supports(z) and _are_targets(targets, *z.shape)


def _are_targets(targets: Tensor, count: int, vocabulary: int) -> bool:
    """Whether C can read these targets; torch reports those out of range."""
    fit = targets.dtype == torch.int64 and targets.shape == (count,) and bindings.is_cpu_contiguous(targets)
    return fit and int(targets.min()) >= 0 and int(targets.max()) < vocabulary


def _compiled_supports(x: Tensor, targets: Tensor, weight: Tensor, logit_map: LogitMap) -> bool:
    """Whether the head and its loss are one call of C, which has the bits of the chunks' own products."""
    if torch.is_autocast_enabled("cpu") or weight.requires_grad or logit_map.softcap is not None:
        return False
    fast = gemm.has_fast_f32() or fixed_order.is_active()
    fit = fast and logit_map.scale > 0 and compiled.supports_head(x, weight)
    return fit and _are_targets(targets, len(x), len(weight))


def _compiled_losses(
    x: Tensor, targets: Tensor, weight: Tensor, scale: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    return compiled.head_f32(x, weight, targets, scale, _chunk_rows(len(weight)), gradient)


class _FrozenLinearCrossEntropy(torch.autograd.Function):
    """x [n, hidden], targets [n], a frozen weight [vocabulary, hidden] -> Σ loss; the gradient is computed in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: Tensor, weight: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        losses, dx = _compiled_losses(x.detach(), targets, weight, scale, gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(dx)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dx,) = ctx.saved_tensors
        return dx * grad, None, None, None


def _chunk_loss(
    x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap, wanted: list[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Sum the loss of a chunk and compute its gradients to ``wanted``; its logits are freed before the next chunk's."""
    with torch.enable_grad():
        logits = head(x)
    losses, dlogits = _loss_and_gradient(logits, targets, logit_map, gradient=bool(wanted))
    made = torch.autograd.grad(logits, wanted, dlogits.to(logits.dtype), allow_unused=True) if wanted else ()
    return losses.sum(), made


class _LinearCrossEntropy(torch.autograd.Function):
    """x [n, hidden], targets [n], trainable parameters of the head -> Σ loss; all gradients are computed in forward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap, *trainable: Tensor
    ) -> Tensor:
        need = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        need_x = ctx.needs_input_grad[0]
        gradients: list[Tensor | None] = [torch.zeros_like(t) for t in (*[x] * need_x, *(trainable[i] for i in need))]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, targets, head):
            some = x[rows].detach().requires_grad_(need_x)
            wanted = [*[some] * need_x, *(trainable[i] for i in need)]
            loss, made = _chunk_loss(some, targets[rows], head, logit_map, wanted)
            total += loss
            for i, part in enumerate(made):
                gradient = gradients[i]
                if part is None or gradient is None:  # unused, for example a disabled adapter
                    gradients[i] = None
                elif need_x and i == 0:
                    gradient[rows] = part
                else:
                    gradient += part
        ctx.save_for_backward(*gradients)
        ctx.need, ctx.need_x, ctx.count = need, need_x, len(trainable)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        made = [None if kept is None else kept * grad.to(kept.dtype) for kept in ctx.saved_tensors]
        dx = made.pop(0) if ctx.need_x else None
        gradients: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(ctx.need, made, strict=True):
            gradients[i] = gradient
        return dx, None, None, None, *gradients
