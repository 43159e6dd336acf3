"""The model card: a README.md with what the adapter is, how to load it, and how it was made.

The hub searches by its front matter: base model, library, task and tags, in PEFT's terms. A README.md without our marker was
written by the user and is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lorakeet.files import write_file
from lorakeet.lora.config import PeftConfig, TaskType
from lorakeet.security.paths import exists, is_file
from lorakeet.security.shown import redact

CARD_NAME = "README.md"
PLACE = "path/or/hub-id/of/this/adapter"
MARKER = "<!-- Written by Lorakeet with every save; delete this line to keep your own changes. -->"

#: Task -> the hub's name of it (its list no longer has text2text-generation), and the class that loads the base.
TASKS: dict[str | None, tuple[str | None, str]] = {
    TaskType.CAUSAL_LM: ("text-generation", "AutoModelForCausalLM"),
    TaskType.SEQ_2_SEQ_LM: ("text-generation", "AutoModelForSeq2SeqLM"),
    TaskType.SEQ_CLS: ("text-classification", "AutoModelForSequenceClassification"),
    TaskType.TOKEN_CLS: ("token-classification", "AutoModelForTokenClassification"),
    TaskType.QUESTION_ANS: ("question-answering", "AutoModelForQuestionAnswering"),
    TaskType.FEATURE_EXTRACTION: ("feature-extraction", "AutoModel"),
    None: (None, "AutoModel"),
}
#: Tasks whose head has one output for each label.
LABELLED = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)

SETTINGS = (
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "bias", "lora_bias"),
)
#: Name of a figure in ``summary.json`` -> its label in the card, for the figures that are shown.
FIGURES = {
    "steps": "optimizer steps",
    "samples": "samples seen",
    "tokens": "tokens in the loss",
    "train_loss_first": "training loss, first",
    "train_loss_last": "training loss, last",
    "eval_loss_before": "held-out loss before",
    "eval_loss_after": "held-out loss after",
}


def write_card(folder: Path, config: PeftConfig, notes: Mapping[str, Any]) -> None:
    """Write ``README.md`` into ``folder``, whole or not at all; one without our marker is left as it is.

    Args:
        folder: The adapter's folder.
        config: The adapter's settings.
        notes: Further facts of ``lorakeet.json``; those of :data:`FIGURES` are shown.

    Raises:
        OutputError: the folder cannot be written to.
    """
    path = folder / CARD_NAME
    if is_file(path) and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        return
    with write_file(path) as aside:
        aside.write_text(redact(card(config, notes)), encoding="utf-8")


def card(config: PeftConfig, notes: Mapping[str, Any]) -> str:
    """Return the text of the card: YAML front matter, then Markdown."""
    base = public_name(config.base_model_name_or_path)
    parts = [f"---\n{front_matter(config)}---\n\n{MARKER}", _introduction(base), _loading(config, base)]
    settings = {key: getattr(config, key) for key in SETTINGS} | config.variant_settings
    parts.append("## Settings\n\n" + _table(settings))
    if figures := {label: notes[key] for key, label in FIGURES.items() if notes.get(key) is not None}:
        parts.append("## Training\n\n" + _table(figures))
    return "\n\n".join(parts) + "\n"


def front_matter(config: PeftConfig) -> str:
    """Return the metadata as YAML."""
    base, pipeline = public_name(config.base_model_name_or_path), TASKS[config.task_type][0]
    tags = [*([f"base_model:adapter:{base}"] if base else []), "lora", "lorakeet", "transformers"]
    values = {"base_model": base, "library_name": "peft", "pipeline_tag": pipeline, "tags": tags}
    return yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False, allow_unicode=True)


def public_name(name: str | None) -> str | None:
    """Return ``name`` if it can be a model's name on the hub; None if it is a path on this machine, or empty."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not name.endswith(".gguf") and not exists(Path(name)) else None


def _introduction(base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else "a base model without a public name"
    return (
        f"# LoRA adapter for {base or 'a local model'}\n\n"
        f"A LoRA adapter ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) for {of}: two small trained matrices "
        "for each layer named below, added to the frozen weights. The base model is not included; loading the adapter "
        "needs it too."
    )


def _loading(config: PeftConfig, base: str | None) -> str:
    auto = TASKS[config.task_type][1]
    remark = "# or the class it was trained with\n" if config.task_type is None else ""
    if config.task_type in LABELLED:
        remark = "# give num_labels= too, the number it was trained with\n"
    return f"""## Load it

```python
from lorakeet import PeftModel
from transformers import {auto}

{remark}base = {auto}.from_pretrained("{base or "path/to/the/base"}")
model = PeftModel.from_pretrained(base, "{PLACE}")
```

The [`peft`](https://huggingface.co/docs/peft) package reads the same files: there, `from peft import PeftModel`."""


def _table(rows: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in rows.items() if value or type(value) in (int, float)}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in shown.items())])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
    if isinstance(value, dict):
        value = [f"{key}: {number}" for key, number in value.items()]
    items = value if isinstance(value, list) else [value]
    return ", ".join(f"`{item}`".replace("|", "\\|") for item in items)  # a regular expression may hold a |
