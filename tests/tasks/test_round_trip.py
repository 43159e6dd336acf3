"""What a training learns from is what evaluation, prediction and the doctor see, token by token, for wild texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lorakeet import LoraConfig, api, get_peft_model
from lorakeet.base.load import Base
from lorakeet.config import DataSettings, RunConfig, TaskSettings, make_run
from lorakeet.data.doctor.examine import examine
from lorakeet.data.encode.render import describe_sample
from lorakeet.data.prepare import prepare
from lorakeet.data.prepared import Prepared
from lorakeet.errors import DataError
from lorakeet.files import write_json
from lorakeet.ignore_index import IGNORE_INDEX
from lorakeet.inference.questions import read_questions
from lorakeet.loaded_model import LoadedModel
from lorakeet.tasks.task import Task
from lorakeet.tasks.taught import NOTES, taught_notes

#: Files of each kind; a failure is not shrunk, which would take minutes.
EXAMPLES = 3
#: Tokens of the longest sample; the model has positions for twice as many.
LONGEST = 24
SPECIALS = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
WORDS = [
    "the",
    "O'Neill's",
    "U.S.",
    "naïve",
    "日本語",
    "🦜",
    "don't,",
    "</s>",
    "<s>",
    "<unk>",
    "''",
    '"',
    "--",
    "é",
    "e\u0301",
]
#: White space between words; a file of lines cannot hold the last ones.
BLANKS = [" ", " ", "  ", "\t", "\u00a0", "\u2028", "\u0085", "\x0c", "\n", "\r\n"]


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Build a tokenizer of bytes: <s> text </s>, and a pair with types of tokens."""
    vocabulary = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [("Ġ", "t"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    names = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "mask_token": "<mask>",
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_input_names=inputs, **names
    )


TOKENIZER = byte_tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"


# ---- rows -------------------------------------------------------------------------------------------------------


@st.composite
def texts(draw: Callable[..., Any], one_line: bool = False, least: int = 1) -> str:
    """Draw words with wild white space between them; one in four texts is longer than a sample."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=least, max_size=4))
    if draw(st.integers(0, 3)) == 0:
        words += ["old", "parrot"] * 4
    blanks = draw(st.lists(st.sampled_from(BLANKS[:8] if one_line else BLANKS), min_size=1, max_size=3))
    return "".join(word + blanks[i % len(blanks)] for i, word in enumerate(words)).strip() if words else ""


@st.composite
def tagged(draw: Callable[..., Any]) -> dict[str, Any]:
    """Draw a row of words and tags."""
    words = draw(texts()).split() or ["the"]
    return {"tokens": words, "tags": ["AB"[len(word) % 2] for word in words]}


@st.composite
def question(draw: Callable[..., Any]) -> dict[str, Any]:
    """Draw a question, with or without an answer among the words of its context."""
    context, word = draw(texts()), draw(st.sampled_from(["owl", "crow", None]))
    if word is None:
        return {"question": draw(texts()), "context": context, "answers": {"text": [], "answer_start": []}}
    answers = {"text": [word], "answer_start": [len(context) + 1]}
    return {"question": draw(texts()), "context": f"{context} {word} was seen", "answers": answers}


def spoken(prompt: str, answer: str) -> dict[str, Any]:
    """Build a row of messages."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


ANY = ("jsonl", "json", "csv", "parquet")
LISTS = ("jsonl", "json", "parquet")


@dataclass(frozen=True)
class Kind:
    """Kind of rows.

    Attributes:
        task: The task.
        rows: Strategy of a row, by its number.
        formats: File formats that can hold such rows.
        labels: Names of the classes or tags.
        problem: Problem of SEQ_CLS.
        settings: Further settings of the data.
    """

    task: str
    rows: Callable[[int], st.SearchStrategy[dict[str, Any]]]
    formats: tuple[str, ...] = ANY
    labels: tuple[str, ...] | None = None
    problem: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def predicts(self) -> bool:
        """Whether `predict` answers such rows."""
        return self.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


KINDS = {
    "text": Kind("CAUSAL_LM", lambda n: st.builds(lambda t: {"text": t}, texts())),
    "lines": Kind("CAUSAL_LM", lambda n: st.builds(lambda t: {"text": t}, texts(one_line=True)), ("txt",)),
    "completion": Kind("CAUSAL_LM", lambda n: st.builds(lambda p, c: {"prompt": p, "completion": c}, texts(), texts())),
    "learn all": Kind(
        "CAUSAL_LM",
        lambda n: st.builds(lambda p, c: {"prompt": p, "completion": c}, texts(), texts()),
        settings={"learn": "all"},
    ),
    "chat": Kind("CAUSAL_LM", lambda n: st.builds(spoken, texts(), texts()), LISTS),
    "class": Kind(
        "SEQ_CLS",
        lambda n: st.builds(lambda t: {"text": t, "label": "xy"[n % 2]}, texts()),
        ANY,
        ("x", "y"),
        "single_label",
    ),
    "class of a pair": Kind(
        "SEQ_CLS",
        lambda n: st.builds(lambda a, b: {"text": a, "text_pair": b, "label": "xy"[n % 2]}, texts(), texts(least=0)),
        LISTS,
        ("x", "y"),
        "single_label",
    ),
    "other columns": Kind(
        "SEQ_CLS",
        lambda n: st.builds(lambda t: {"id": f"no. {n}", "body": t, "queue": "xy"[n % 2]}, texts()),
        ANY,
        ("x", "y"),
        "single_label",
        settings={"columns": {"text": "body", "label": "queue"}},
    ),
    "several labels": Kind(
        "SEQ_CLS",
        lambda n: st.builds(lambda t: {"text": t, "labels": ["x", "y"][: 1 + n % 2]}, texts()),
        LISTS,
        ("x", "y"),
        "multi_label",
    ),
    "number": Kind(
        "SEQ_CLS", lambda n: st.builds(lambda t: {"text": t, "score": n + 0.5}, texts()), problem="regression"
    ),
    "tags": Kind("TOKEN_CLS", lambda n: tagged(), LISTS, ("A", "B")),
    "answer": Kind("QUESTION_ANS", lambda n: question(), LISTS),
    "translation": Kind("SEQ_2_SEQ_LM", lambda n: st.builds(lambda s, t: {"source": s, "target": t}, texts(), texts())),
    "pair": Kind(
        "FEATURE_EXTRACTION", lambda n: st.builds(lambda a, p: {"anchor": a, "positive": f"{p} {n}"}, texts(), texts())
    ),
    "masked": Kind("MASKED_LM", lambda n: st.builds(lambda t: {"text": f"<mask> {t}"}, texts())),
    "masked lines": Kind(
        "MASKED_LM", lambda n: st.builds(lambda t: {"text": f"<mask> {t}"}, texts(one_line=True)), ("txt",)
    ),
}


def write(folder: Path, format: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a file of this format."""
    path = folder / f"rows.{format}"
    if format == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif format == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif format == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif format == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    return path


# ---- a tiny model for each task ---------------------------------------------------------------------------------

SIZE = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": len(TOKENIZER),
}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
BERTS: dict[str, Any] = {
    "SEQ_CLS": tf.BertForSequenceClassification,
    "TOKEN_CLS": tf.BertForTokenClassification,
    "QUESTION_ANS": tf.BertForQuestionAnswering,
    "FEATURE_EXTRACTION": tf.BertModel,
    "MASKED_LM": tf.BertForMaskedLM,
}


def opened_model(kind: Kind, folder: Path) -> LoadedModel:
    """Build a random model of the kind's task with an adapter, as if loaded from ``folder``."""
    torch.manual_seed(0)
    task = Task(kind.task, kind.problem, kind.labels)
    if kind.task == "CAUSAL_LM":
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, **IDS, max_position_embeddings=512))
    elif kind.task == "SEQ_2_SEQ_LM":
        sizes = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": len(TOKENIZER)}
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
        )
    else:
        config = tf.BertConfig(**SIZE, **IDS, max_position_embeddings=2 * LONGEST, **task.model_options())
        model = BERTS[kind.task](config)
    names = {"CAUSAL_LM": ["q_proj"], "SEQ_2_SEQ_LM": ["q"]}.get(kind.task, ["query"])
    adapted = get_peft_model(model.eval(), LoraConfig(r=1, target_modules=names))
    return LoadedModel(
        Base(adapted, TOKENIZER, "tiny", torch.float32, torch.device("cpu")), {str(folder): "default"}, task
    )


@contextmanager
def inputs_of(model: Any) -> Iterator[list[list[int]]]:
    """Collect the token ids of every row that the model is called with, without padding and masks."""
    seen: list[list[int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
        if ids is None:  # a step of an encoder-decoder behind its first
            return
        if labels is not None and labels.shape == ids.shape and kwargs.get("masked"):
            ids = torch.where(labels.eq(IGNORE_INDEX), ids, labels)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        seen.extend(row[real].tolist() for row, real in zip(ids, mask[:, -ids.shape[1] :].bool(), strict=True))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ---- the property -----------------------------------------------------------------------------------------------


def learned(
    data: Prepared, columns: tuple[str, ...] = ("input_ids", "positive_ids", "negative_ids")
) -> list[list[int]]:
    """Return the token ids of all samples of a training."""
    return [ids for name in columns if name in data.train.column_names for ids in data.train[name][:]]


def check_doctor(config: RunConfig, task: TaskSettings, data: Prepared) -> None:
    """Check that the doctor counts and shows the samples of the training."""
    found = examine(config.data, task, TOKENIZER, samples=999)
    report = data.report
    assert found.usable == report.rows - report.empty
    assert (found.tokens, found.targets) == (report.train_tokens, report.train_targets)
    assert found.count("long") == report.cut
    names = data.labels
    shown = [describe_sample(TOKENIZER, sample, task.type, names) for sample in data.train]
    assert [sample.plain for sample in found.samples] == shown


def check_eval(opened: LoadedModel, folder: Path, path: Path, kind: Kind, data: Prepared) -> None:
    """Check that an evaluation, told nothing but the file, reads the samples of the training."""
    with inputs_of(opened.model) as seen:
        figures = api.evaluate_data(opened, str(folder), DataSettings(path=str(path)))
    if kind.task == "MASKED_LM":  # other tokens are masked in each measurement
        assert sorted(map(len, seen)) == sorted(map(len, learned(data)))
    elif kind.task == "SEQ_2_SEQ_LM":
        assert sorted(seen[: len(data.train)]) == sorted(learned(data))
    else:
        assert sorted(seen) == sorted(learned(data))
    if kind.task != "MASKED_LM":
        assert figures.get("tokens", figures.get("targets")) == data.report.train_targets


def check_predict(opened: LoadedModel, folder: Path, path: Path, kind: Kind, data: Prepared) -> None:
    """Check that a prediction for the file reads the samples of the training."""
    rows = read_questions(path, kind.task, {}, data.layout.columns)
    with inputs_of(opened.model) as seen:
        answers = api.predict(opened, str(folder), rows, batch_size=2)
    expected, rest = learned(data, ("input_ids",)), iter(seen)
    assert len(answers) == len(rows)
    assert all(ids in rest for ids in expected)  # in this order
    if not data.report.unlearnable and kind.task != "TOKEN_CLS":  # a long text is tagged in parts
        assert seen == expected
    elif not data.report.unlearnable:
        assert all(answer["words"][0]["tag"] for answer in answers)


def check_generate(opened: LoadedModel, folder: Path, name: str, rows: list[dict[str, Any]], data: Prepared) -> None:
    """Check that generation from a prompt reads the beginning of the sample."""
    prompts = [
        row["messages"][0]["content"] if name == "chat" else row["source" if name == "translation" else "prompt"]
        for row in rows
    ]
    with inputs_of(opened.model) as seen:
        for prompt in prompts:
            api.generate(opened, str(folder), [prompt], chat=name == "chat", max_new_tokens=1, greedy=True)
    if name == "translation":
        assert not seen  # the encoder runs alone
        return
    for ids, sample in zip(seen, data.train, strict=True):
        assert ids[:LONGEST] == sample["input_ids"][: len(ids)]


def round_trip(name: str, format: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Check that all commands see the samples that a training makes of the rows."""
    kind = KINDS[name]
    path = write(folder, format, rows)
    opened = opened_model(kind, folder)
    config = make_run({"data": {"path": str(path), "eval_fraction": 0.0, "max_length": LONGEST, **kind.settings}})
    task = TaskSettings.model_validate(
        {"type": kind.task, "problem": kind.problem or "auto", "labels": list(kind.labels) if kind.labels else None}
    )
    try:
        data = prepare(config.data, task, TOKENIZER, seed=42)
    except DataError:  # every target is cut away
        assert not examine(config.data, task, TOKENIZER).tokens
        return
    write_json(folder / "lorakeet.json", {NOTES: taught_notes(config, data.layout, chat={})})
    check_doctor(config, task, data)
    check_eval(opened, folder, path, kind, data)
    if kind.predicts:
        check_predict(opened, folder, path, kind, data)
    elif name in ("completion", "chat", "translation") and data.report.train_samples == len(rows):
        check_generate(opened, folder, name, rows, data)


@st.composite
def files(draw: Callable[..., Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    """Draw a format and rows of a kind."""
    kind = KINDS[name]
    return draw(st.sampled_from(kind.formats)), [draw(kind.rows(number)) for number in range(4)]


@pytest.mark.parametrize("name", KINDS)
def test_all_commands_see_what_was_learned(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(files(name))
    def holds(file: tuple[str, list[dict[str, Any]]]) -> None:
        round_trip(name, *file, tmp_path_factory.mktemp("trip"))

    holds()
