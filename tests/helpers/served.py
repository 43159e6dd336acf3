"""A tiny base, adapters of several sorts for it, and the answers that they give alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from helpers.bytewise import byte_tokenizer, llama_config
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.base.load import Base, load_base
from lorakeet.inference.generate import complete
from lorakeet.lora.config import LoraConfig

#: Settings of the adapters, by name: mixed ranks, targets and variants.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "small": {"r": 1, "target_modules": ["q_proj"]},
    "wide": {"r": 16, "lora_alpha": 8},
    "rslora": {"r": 8, "use_rslora": True},
    "mlp": {"r": 3, "target_modules": ["down_proj", "up_proj"]},
    "patterns": {"r": 2, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 3}},
    "dora": {"r": 4, "use_dora": True},
    "head": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@dataclass
class Served:
    """A base in a folder, its adapters, and answers that are remembered.

    Attributes:
        folder: Folder of the base.
        adapters: Folder with a folder for each adapter: ``plain``, and ``plain-2`` with other weights, and so on.
    """

    folder: Path
    adapters: Path
    alone: Base = field(init=False)
    _texts: dict[tuple[str | None, str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alone = self.base()

    def base(self) -> Base:
        """Load the base again, without adapters."""
        return load_base(str(self.folder), dtype="fp32", device="cpu")

    def answer(self, adapter: str | None, prompt: str, max_tokens: int) -> str:
        """Return the greedy answer of an adapter's folder, or of the base, to one prompt alone."""
        key = (adapter, prompt, max_tokens)
        if key not in self._texts:
            model: Any = self.alone.model
            if adapter is not None:
                if adapter not in getattr(model, "peft_config", {}):
                    PeftModel.from_pretrained(model, self.adapters / adapter, adapter)
                model.set_adapter(adapter, inference_mode=True)
            elif isinstance(model, PeftModel):
                with model.disable_adapter():
                    [self._texts[key]] = self._complete(prompt, max_tokens)
                return self._texts[key]
            [self._texts[key]] = self._complete(prompt, max_tokens)
        return self._texts[key]

    def _complete(self, prompt: str, max_tokens: int) -> list[str]:
        return complete(self.alone.model, self.alone.tokenizer, [prompt], max_new_tokens=max_tokens, greedy=True)


def make_served(root: Path) -> Served:
    """Write a tiny base and two sets of weights for each kind of adapter."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    base = load_base(str(root / "base"), dtype="fp32", device="cpu")
    for seed, (name, settings) in enumerate(KINDS.items()):
        for version in ("", "-2"):
            model = get_peft_model(base.model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings}))
            torch.manual_seed(seed + 100 * len(version))
            with torch.no_grad():
                for parameter in model.adapter_parameters("default"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
            model.save_pretrained(root / "adapters" / f"{name}{version}")
            model.unload()
    return Served(root / "base", root / "adapters")
