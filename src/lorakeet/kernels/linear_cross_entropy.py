"""Cross-entropy of a language-modelling head that never builds all logits, with its gradient in the same pass.

    z = c(s·head(x)),   ℓ = Σ_t log Σ_v exp z_tv - z_t,y(t)

with s a scale (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``) and c(z) = z, or τ·tanh(z/τ) where logits are
capped at τ (Gemma 2). A few rows at a time: logits, loss, and at once

    ∂ℓ/∂head(x) = s·c'·(softmax(z) - onehot(y)),   c' = 1 - (z/τ)²   (1 without a cap)

which the head takes on to x and to whatever learns in it: a weight, a bias, an adapter. The logits' own memory becomes
their gradient. What is kept for backward is the gradient to x, as large as x, and those of the parameters.
Computing the gradient in the forward pass: Wijmans et al. 2024, arXiv:2411.09009, and Hsu et al. 2024, arXiv:2410.10989.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakeet.kernels.cpu import bindings

#: Logits held in fp32 at once (32 MiB), unless that is fewer than :data:`MIN_ROWS` rows.
CHUNK_LOGITS = 1 << 23
MIN_ROWS = 64

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitMap:
    """What is done to the head's output before the softmax: τ·tanh(s·z/τ)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def linear_cross_entropy_reference(x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap) -> Tensor:
    """The slow truth: all logits at once, differentiated by autograd; the loss of each row [n], fp32."""
    return F.cross_entropy(logit_map(head(x).float()), targets, reduction="none")


def linear_cross_entropy(
    x: Tensor, targets: Tensor, head: Head, parameters: Sequence[Tensor] = (), logit_map: LogitMap | None = None
) -> Tensor:
    """Summed cross-entropy of the rows of ``x``; differentiable in ``x`` and ``parameters``.

    Args:
        x: [n, hidden], n ≥ 0.
        targets: [n] int64, each an index into the vocabulary.
        head: [rows, hidden] -> [rows, vocabulary], each row for itself. Called once for each chunk.
        parameters: What learns inside ``head``; nothing else there gets a gradient.
        logit_map: What follows the head; nothing if None.

    Returns:
        A scalar, fp32; 0 with gradients of 0 for no rows.
    """
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    return _LinearCrossEntropy.apply(x, targets, head, logit_map or LogitMap(), *learned)


@torch.no_grad()
def row_losses(x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap | None = None) -> Tensor:
    """Cross-entropy of each row [n], fp32, without a gradient; arguments as of :func:`linear_cross_entropy`."""
    losses = torch.zeros(len(targets), dtype=torch.float32, device=x.device)
    for rows in _chunks(x, targets, head):
        losses[rows], _ = _loss_and_gradient(head(x[rows]), targets[rows], logit_map or LogitMap(), gradient=False)
    return losses


def _chunks(x: Tensor, targets: Tensor, head: Head) -> list[slice]:
    """Slices of the rows, few enough at a time. The vocabulary is what the head says it is."""
    if not len(targets):
        return []
    vocabulary = getattr(head, "out_features", None)
    if vocabulary is None:
        with torch.no_grad():
            vocabulary = head(x[:1]).shape[-1]
    size = max(MIN_ROWS, CHUNK_LOGITS // int(vocabulary))
    return [slice(start, min(start + size, len(targets))) for start in range(0, len(targets), size)]


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, logit_map: LogitMap, gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its gradient to the logits (else something of no use), both fp32. Overwrites fp32 logits."""
    z = logits.detach().float()
    if z.data_ptr() == logits.data_ptr() and logits._is_view():  # autograd guards views against being overwritten
        z = z.clone()
    if logit_map.softcap is None and logit_map.scale > 0 and _loop_takes(z, targets):
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


def _loop_takes(z: Tensor, targets: Tensor) -> bool:
    """Whether the compiled loop can take these; a target that is none is for torch to refuse."""
    fit = (
        targets.dtype == torch.int64
        and targets.shape == z.shape[:1]
        and bindings.supports(z)
        and bindings.is_cpu_contiguous(targets)
    )
    return fit and int(targets.min()) >= 0 and int(targets.max()) < z.shape[1]


def _loss_of_some(
    x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap, wanted: list[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Summed loss of a few rows, and its gradients to ``wanted``; their logits go before others are made."""
    with torch.enable_grad():
        logits = head(x)
    losses, dlogits = _loss_and_gradient(logits, targets, logit_map, gradient=bool(wanted))
    made = torch.autograd.grad(logits, wanted, dlogits.to(logits.dtype), allow_unused=True) if wanted else ()
    return losses.sum(), made


class _LinearCrossEntropy(torch.autograd.Function):
    """x [n, hidden], targets [n], what learns in the head -> Σ loss; all gradients are made in forward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, targets: Tensor, head: Head, logit_map: LogitMap, *learned: Tensor
    ) -> Tensor:
        need = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        need_x = ctx.needs_input_grad[0]
        gradients: list[Tensor | None] = [torch.zeros_like(t) for t in (*[x] * need_x, *(learned[i] for i in need))]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows in _chunks(x, targets, head):
            some = x[rows].detach().requires_grad_(need_x)
            wanted = [*[some] * need_x, *(learned[i] for i in need)]
            loss, made = _loss_of_some(some, targets[rows], head, logit_map, wanted)
            total += loss
            for i, part in enumerate(made):
                gradient = gradients[i]
                if part is None or gradient is None:  # not in use, as an adapter that is switched off
                    gradients[i] = None
                elif need_x and i == 0:
                    gradient[rows] = part
                else:
                    gradient += part
        ctx.save_for_backward(*gradients)
        ctx.need, ctx.need_x, ctx.count = need, need_x, len(learned)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        made = [None if kept is None else kept * grad.to(kept.dtype) for kept in ctx.saved_tensors]
        dx = made.pop(0) if ctx.need_x else None
        gradients: list[Tensor | None] = [None] * ctx.count
        for i, gradient in zip(ctx.need, made, strict=True):
            gradients[i] = gradient
        return dx, None, None, None, *gradients
