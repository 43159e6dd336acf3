"""A merged model as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from lorakeet.base.gguf_header import read_header
from lorakeet.base.source import find_source
from lorakeet.base.storage import bytes_to_store
from lorakeet.config import BaseSettings
from lorakeet.errors import MergeError
from lorakeet.export.gguf.files import FORMATS, stored_kind, write_model
from lorakeet.export.models import formats_of
from lorakeet.files import check_room
from lorakeet.loaded_model import open_model
from lorakeet.lora.checks.merge_loss import ACCEPTED_LOSS, LayerLoss, worst_loss

#: Name of the file of a model.
GGUF_MODEL = "model.gguf"
#: Format of GGUF -> the number format of torch in which a merge measures its loss.
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}


def merge_to_gguf(
    settings: BaseSettings,
    adapter: str,
    folder: Path,
    form: str,
    *,
    allow_other_base: bool = False,
    allow_untrained: bool = False,
    accept_loss: bool = False,
) -> dict[str, Any]:
    """Merge an adapter into its base and write ``model.gguf``.

    Args:
        settings: Settings of the base.
        adapter: Folder or hub id.
        folder: Folder to fill.
        form: Format of the matrices, a key of :data:`lorakeet.export.gguf.files.FORMATS`.
        allow_other_base: Accept an adapter that was trained on another base.
        allow_untrained: Accept an adapter that changes nothing.
        accept_loss: Accept that the format loses more than half of a layer's update.

    Returns:
        ``{"layers", "lost", "format"}``.

    Raises:
        BaseModelError: The architecture or the tokenizer has no form in GGUF.
        MergeError: The format would lose the update, or a layer cannot be merged.
        OutputError: The disk has too little room.
    """
    source, _, loaded = formats_of(settings)
    check_room(folder, bytes_to_store(source, "fp32" if form == "f32" else "fp16"))
    opened = open_model(loaded, [adapter], allow_other_base=allow_other_base, allow_untrained=allow_untrained)

    def store(parameter: Tensor) -> torch.dtype:
        return _DTYPES[form] if parameter.ndim > 1 else torch.float32

    report = opened.model.merge_adapter(accept_loss=accept_loss, store=store)
    lost = max(report.lost, _block_loss(opened.model, form, accept_loss))
    merged = opened.model.merge_and_unload()
    name = f"{opened.base.name} with {Path(adapter).resolve().name}"
    write_model(folder / GGUF_MODEL, merged, opened.base.tokenizer, name, form, _splitting_rule(settings))
    return {"layers": report.layers, "lost": lost, "format": form}


def _splitting_rule(settings: BaseSettings) -> str | None:
    """Return the splitting rule that a base in GGUF names for its tokenizer; None of another base."""
    source = find_source(settings.model, settings.revision)
    rule = read_header(source.path).get("tokenizer.ggml.pre") if source.kind == "gguf" else None
    return None if rule is None else str(rule)


def _block_loss(model: Any, form: str, accept: bool) -> float:
    """Return the largest share of a merged layer's update that a format of blocks takes; 0 for the others.

    Raises:
        MergeError: It is more than half, and that is not accepted.
    """
    kind = FORMATS[form][0]
    if kind != gguf.GGMLQuantizationType.Q8_0:
        return 0.0
    losses = []
    for name, layer in model.named_modules():
        before = getattr(layer, "originals", {}).get("weight")
        if before is not None:
            losses.append(_layer_loss(name, before.detach().float(), layer.base_layer.weight.detach().float(), kind))
    worst = worst_loss(losses)
    if worst is not None and worst.share > ACCEPTED_LOSS and not accept:
        raise MergeError(
            f"{form} is too coarse for this adapter: rounding takes {worst.share:.0%} of the update of {worst.name}",
            "choose --format f16, or --accept-loss",
        )
    return worst.share if worst else 0.0


def _layer_loss(name: str, before: Tensor, after: Tensor, kind: Any) -> LayerLoss:
    """Measure what a format of blocks takes of one layer's update: 1 − ⟨Q(W') − Q(W), ΔW⟩ / ‖ΔW‖².

    Both models are rounded, so the noise of the base is no loss. An update below the steps of a base that is on the
    grid of the format disappears. On another base it survives in the mean.
    """
    own, update = stored_kind(after, kind), (after - before).cpu()
    stored = [gguf.quants.dequantize(gguf.quants.quantize(w.cpu().numpy(), own), own) for w in (before, after)]
    change, size = torch.from_numpy(stored[1] - stored[0]), float(update.norm())
    kept = float((change * update).sum()) / size**2 if size else 1.0
    return LayerLoss(name, abs(1 - kept) * size, size, float(before.norm()))
