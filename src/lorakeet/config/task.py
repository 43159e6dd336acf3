"""Settings of the task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorakeet.setting_types import Float, Section, Text

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
