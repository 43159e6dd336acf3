"""Targets of the fuzzer: each reads the folder that an input was unpacked into, as a user's command would."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from pydantic import ValidationError

from fuzzing.bundle import INPUT, files
from helpers.bytewise import TEMPLATE, byte_tokenizer
from helpers.chat_templates import CHATML, THINKING
from helpers.tiny_base import save_base
from helpers.tiny_training import tiny_llama
from lorakeet.adapter.inspect import inspect_adapter
from lorakeet.adapter.inspection_text import inspection_text
from lorakeet.adapter.peft_model import PeftModel, get_peft_model
from lorakeet.adapter.serialization import read_notes
from lorakeet.adapter.vocabulary import adapter_tokenizer
from lorakeet.base.gguf_header import gguf_name
from lorakeet.base.load import load_base
from lorakeet.chat.template import render_chat
from lorakeet.chat.turns import assistant_turns
from lorakeet.config import BaseSettings, DataSettings, TaskSettings, read_run
from lorakeet.data.doctor.examine import examine
from lorakeet.data.read.source import find_sources
from lorakeet.loaded_model import adapter_task, open_model
from lorakeet.lora.config import LoraConfig, PeftConfig
from lorakeet.runs.metrics_log import first_and_last, read_metrics
from lorakeet.runs.run_folder import read_summary
from lorakeet.tasks.taught import Taught
from lorakeet.train.checkpoints.manifest import MANIFEST, latest_checkpoint, write_manifest
from lorakeet.train.checkpoints.state_files import read_state, write_state

#: Rows of a data file that are read.
_ROWS = 300


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: Its name on the command line, and of its folder of seeds.
        run: Function that reads a folder; it may raise Lorakeet's errors only.
        examples: Function that makes valid inputs.
        links: Whether files may be links and pipes; those of a run, and of settings that a user names, may be by right.
    """

    name: str
    run: Callable[[Path], None]
    examples: Callable[[], list[bytes]]
    links: bool = True


# -- adapters ---------------------------------------------------------------------------------------------------------


@functools.cache
def _model() -> Any:
    return tiny_llama()


def read_adapter(folder: Path) -> None:
    """Inspect an adapter, read its notes and tokenizer, and put it on a tiny model."""
    problems = []
    for step in (_inspect, _notes, _load, _open):
        try:
            step(str(folder))
        except ValueError as error:  # Lorakeet's are; others are raised again below
            problems.append(error)
    for problem in problems:
        raise problem


def _inspect(folder: str) -> None:
    found = inspect_adapter(folder)
    json.dumps(found)
    inspection_text(found)


def _notes(folder: str) -> None:
    Taught.from_notes(read_notes(folder))
    adapter_task(folder, PeftConfig.from_pretrained(folder)).model_options()
    adapter_tokenizer(folder)


def _load(folder: str) -> None:
    model = _model()
    try:
        PeftModel.from_pretrained(model, folder, allow_other_base=True)
    finally:
        if isinstance(model, PeftModel):
            model.unload()
    PeftModel.from_pretrained(model, folder)
    model.unload()


@functools.cache
def _base() -> str:
    return str(save_base(Path(tempfile.mkdtemp(prefix="lorakeet-fuzz-base-")) / "base"))


def _open(folder: str) -> None:
    open_model(BaseSettings(model=_base()), [folder], allow_other_base=True)


@functools.cache
def adapter_examples() -> list[bytes]:
    """Make adapters of several settings, and the base that they are put on."""
    _base()
    made = []
    changes: list[dict[str, Any]] = [
        {},
        {"target_modules": ".*(q|v)_proj", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "o_proj"]},
        {"lora_bias": True, "target_modules": ["o_proj"]},
        {"trainable_token_indices": [1, 3], "layers_to_transform": [0], "layers_pattern": "layers"},
    ]
    for values in changes:
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **values})
        model = get_peft_model(tiny_llama(), config)
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place, notes={"task": {"type": "CAUSAL_LM", "problem": None, "labels": None}})
            made.append(_bundle(Path(place), ("adapter_config.json", "lorakeet.json", "adapter_model.safetensors")))
    with tempfile.TemporaryDirectory() as place:
        byte_tokenizer().save_pretrained(place)
        made.append(made[0] + _bundle(Path(place), ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")))
    return made


def _bundle(folder: Path, names: tuple[str, ...]) -> bytes:
    contents = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return files(**contents)


# -- bases ------------------------------------------------------------------------------------------------------------


def read_base(folder: Path) -> None:
    """Load a base from a folder."""
    load_base(BaseSettings(model=str(folder)))


@functools.cache
def base_examples() -> list[bytes]:
    """Make a tiny base in one file, and in two with an index."""
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
    with tempfile.TemporaryDirectory() as place:
        folder = save_base(Path(place) / "base")
        whole = _bundle(folder, names)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        keys = sorted(tensors)
        parts = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
        for part, chosen in parts.items():
            safetensors.torch.save_file({key: tensors[key] for key in chosen}, folder / part, {"format": "pt"})
        weight_map = {key: part for part, chosen in parts.items() for key in chosen}
        index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
        sharded = files(**{"model.safetensors.index.json": index}) + _bundle(folder, (*names[:4], *parts))
    return [whole, sharded]


def read_gguf(folder: Path) -> None:
    """Read the header of a GGUF file."""
    gguf_name(folder / INPUT)


def gguf_examples() -> list[bytes]:
    """Make headers of GGUF files, with a few tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.name") + struct.pack("<I", 8) + text("Tiny"),
        text("llama.block_count") + struct.pack("<II", 4, 2),
        text("llama.embedding_length") + struct.pack("<II", 4, 32),
        text("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.0, 1.0),
    ]
    tensors = [text(f"blk.{n}.w") + struct.pack("<I2QIQ", 2, 32, 4, 0, 512 * n) for n in range(2)]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs))
    return [head + b"".join(pairs) + b"".join(tensors) + bytes(2048), head + b"".join(pairs)]


# -- runs and settings ------------------------------------------------------------------------------------------------


def read_run_folder(folder: Path) -> None:
    """Read all files of a run's folder."""
    steps: tuple[Callable[[], Any], ...] = (
        lambda: read_run(folder / "run.yaml", []),
        lambda: first_and_last(read_metrics(folder / "metrics.jsonl")),
        lambda: read_summary(folder),
        lambda: latest_checkpoint(folder / "checkpoints"),
        lambda: read_state(folder / "checkpoints" / "checkpoint-2", "optimizer"),
    )
    problems = []
    for step in steps:
        try:
            step()
        except (ValueError, OSError, RuntimeError) as error:
            problems.append(error)
    for problem in problems:
        raise problem


def run_examples() -> list[bytes]:
    """Make the folder of a run with a checkpoint."""
    metrics = "".join(json.dumps({"step": n, "loss": 1 / n, "lr": 1e-3}) + "\n" for n in range(1, 12))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "a.safetensors").write_bytes(b"four")
        write_state(Path(place), "optimizer", {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "lr": (0.5, 1e-3)})
        state = _bundle(Path(place), ("optimizer.json", "optimizer.safetensors")).replace(
            b"== file ", b"== file checkpoints/checkpoint-2/"
        )
        write_manifest(Path(place), {"seed": "1"}, {"torch": "2"}, {"logged": 1})
        manifest = (Path(place) / MANIFEST).read_bytes()
    inner = {f"checkpoints/checkpoint-2/{MANIFEST}": manifest, "checkpoints/checkpoint-2/a.safetensors": b"four"}
    return [
        files(
            run__yaml=read_run(None, []).to_yaml().encode(),
            metrics__jsonl=metrics.encode(),
            summary__json=json.dumps({"steps": 11, "train_loss_last": 0.1}).encode(),
            **inner,
        )
        + state
    ]


def read_settings(folder: Path) -> None:
    """Read a file of settings, and each line of ``overrides`` as one."""
    path = folder / "overrides"
    overrides = path.read_text(errors="replace").replace("\0", "").split("\n")[:50] if path.is_file() else []
    for override in overrides:
        try:
            read_run(None, [override])
        except ValueError as error:
            problem = error
            if isinstance(problem, ValidationError) or not hasattr(problem, "hint"):
                raise
    read_run(folder / "run.yaml", overrides[:3])


def settings_examples() -> list[bytes]:
    """Make settings of several forms."""
    text = b"base: {model: a/b}\nlora: &l {r: 16, target_modules: [q_proj]}\ndata:\n  path: x.jsonl\n"
    return [
        files(run__yaml=read_run(None, []).to_yaml().encode(), overrides=b"lora.r=4\ndata.path=[a, b]"),
        files(run__yaml=text, overrides=b"train.lr=1e-4\nlora.target_modules=.*q\nlora.rank_pattern={q: 3}"),
    ]


# -- data -------------------------------------------------------------------------------------------------------------


def read_data(folder: Path) -> None:
    """Examine the data in a folder as the doctor does, and read its rows."""
    settings = DataSettings(path=str(folder), limit=_ROWS)
    for source in find_sources(settings):
        for _ in islice(source.rows(), _ROWS):
            pass
    examine(settings, TaskSettings()).to_dict()


@functools.cache
def data_examples() -> list[bytes]:
    """Make a file of each format."""
    rows = [
        {"text": "The first sentence, with ümlauts.", "label": "a", "n": 1},
        {"text": "A second one.", "label": "b", "n": 2},
    ]
    chat = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]
    table = pa.Table.from_pylist(rows)
    nested = pa.Table.from_pylist([{"tags": ["a", "b"], "answers": {"text": ["x"], "answer_start": [1]}}] * 3)
    arrow, stream, parquet = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(stream, nested.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(nested)
    pq.write_table(table, parquet)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    import gzip

    return [
        files(a__jsonl=lines),
        files(a__jsonl="".join(json.dumps(row) + "\n" for row in chat).encode()),
        files(a__json=json.dumps({"train": rows}).encode()),
        files(a__yaml=yaml.safe_dump(rows).encode()),
        files(a__csv=b'text;label\n"one; two";a\nthree;b\n'),
        files(a__tsv=b"text\tlabel\none\ta\nthree\tb\n"),
        files(a__parquet=parquet.getvalue()),
        files(a__arrow=arrow.getvalue()),
        files(a__arrow=stream.getvalue()),
        files(a__txt=b"One paragraph.\n\nAnother\none.\n"),
        files(quotes=b"A quotation.\n\t\t-- Someone\n%\nAnother one.\n%\n"),
        files(**{"a.jsonl.gz": gzip.compress(lines)}),
        files(a__arrow=arrow.getvalue(), state__json=b'{"_data_files": [{"filename": "a.arrow"}]}'),
    ]


# -- templates --------------------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer() -> Any:
    return byte_tokenizer()


def read_template(folder: Path) -> None:
    """Render conversations with a template."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = (folder / INPUT).read_bytes().decode(errors="replace")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because.", "tool_calls": [call]},
    ]
    for chosen, prompt in ((messages[:2], True), (messages[1:2], False)):
        render_chat(tokenizer, chosen, prompt)
    assistant_turns(tokenizer, [messages[1], {"role": "assistant", "content": "So."}])


def template_examples() -> list[bytes]:
    """Return templates, benign and hostile."""
    hostile = [
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro m(n) %}{{ m(n+1) }}{% endmacro %}{{ m(0) }}",
        "{{ messages|map(attribute='content')|join('x')|upper|center(90)|replace('a', 'b') }}",
        "{{ '%s %5d' % ('a', 3) }}{{ 'x{:>5}'.format(2) }}{{ 2 ** 8 * 'ab' }}{{ messages.__class__ }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% include 'x' %}",
    ]
    return [template.encode() for template in (TEMPLATE, CHATML, THINKING, *hostile)]


def targets() -> Iterator[Target]:
    """Yield all targets."""
    yield Target("adapter", read_adapter, adapter_examples)
    yield Target("base", read_base, base_examples)
    yield Target("gguf", read_gguf, gguf_examples)
    yield Target("run", read_run_folder, run_examples, links=False)
    yield Target("settings", read_settings, settings_examples, links=False)
    yield Target("data", read_data, data_examples)
    yield Target("template", read_template, template_examples)


def target(name: str) -> Target:
    """Return the target of a name."""
    return next(one for one in targets() if one.name == name)


torch.set_num_threads(1)
