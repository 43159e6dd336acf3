"""Settings of the training data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorakeet.setting_types import Count, Fraction, Positive, Section, Text


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
