"""Files of strangers give one error, in seconds and in bounded memory; nothing outside of their folder is opened."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fuzzing.bundle import Entry, files, pack, unpack, write
from fuzzing.judge import Arena, judge
from fuzzing.targets import target
from lorakeet.cli import main
from lorakeet.config import BaseSettings, DataSettings
from lorakeet.data.read.source import find_sources
from lorakeet.errors import AdapterError, LorakeetError
from lorakeet.loaded_model import settings_of_base
from lorakeet.lora.config import LoraConfig

HUGE = {"weight": {"dtype": "F32", "shape": [1 << 25, 1 << 25], "data_offsets": [0, 1 << 52]}}
OVERFLOW = {"weight": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]}}
OVERLAP = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}
OUT_OF_RANGE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]}}
FP8 = {"base_model.model.q.lora_A.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}


def with_file(bundle: bytes, name: str, content: bytes, kind: str = "file") -> bytes:
    """Return a bundle with another file in place of that of its name."""
    kept = [entry for entry in unpack(bundle) if entry.name != name]
    return pack([*kept, Entry(kind, name, content)])


def changed(bundle: bytes, name: str, **values: Any) -> bytes:
    """Return a bundle with other values in one of its JSON files."""
    [old] = [json.loads(entry.content) for entry in unpack(bundle) if entry.name == name]
    return with_file(bundle, name, json.dumps({**old, **values}).encode())


def tensors(header: Any, data: bytes = bytes(8)) -> bytes:
    """Return a safetensors file of this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def error_of(kind: str, bundle: bytes, arena: Arena) -> str:
    """Return the error of a target for an input that the judge finds nothing wrong with."""
    assert judge(target(kind).run, bundle, arena) is None
    with arena.armed() as folder:
        write(bundle, folder)
        with pytest.raises(LorakeetError) as caught:
            target(kind).run(folder)
    return str(caught.value)


def adapter() -> bytes:
    return target("adapter").examples()[0]


def base() -> bytes:
    return target("base").examples()[0]


CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "lorakeet.json"
ADAPTERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a petabyte": (lambda: with_file(adapter(), WEIGHTS, tensors(HUGE)), "damaged"),
    "overflow": (lambda: with_file(adapter(), WEIGHTS, tensors(OVERFLOW)), "damaged"),
    "overlap": (lambda: with_file(adapter(), WEIGHTS, tensors(OVERLAP)), "damaged"),
    "out of range": (lambda: with_file(adapter(), WEIGHTS, tensors(OUT_OF_RANGE)), "damaged"),
    "long header": (lambda: with_file(adapter(), WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), "damaged"),
    "format": (lambda: with_file(adapter(), WEIGHTS, tensors(FP8, bytes(4))), "format float8_e4m3fn"),
    "rank": (lambda: changed(adapter(), CONFIG, r=10**9), "rank"),
    "rank of a layer": (lambda: changed(adapter(), CONFIG, rank_pattern={"k_proj": 10**8}), "rank"),
    "nan": (lambda: changed(adapter(), CONFIG, lora_alpha=float("nan")), "lora_alpha"),
    "huge number": (lambda: changed(adapter(), CONFIG, lora_alpha=10**400), "401 digits"),
    "too many digits": (lambda: with_file(adapter(), CONFIG, b'{"r": ' + b"9" * 5000 + b"}"), "not JSON"),
    "nested": (lambda: with_file(adapter(), CONFIG, b'{"r": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "not JSON"),
    "key twice": (lambda: with_file(adapter(), CONFIG, b'{"r": 8, "r": 9}'), "given twice"),
    "not UTF-8": (lambda: with_file(adapter(), CONFIG, b'{"r": "\xff"}'), "not JSON"),
    "large": (lambda: with_file(adapter(), CONFIG, b'{"x": "' + b"a" * (1 << 23) + b'"}'), "more than"),
    "endless pattern": (lambda: changed(adapter(), CONFIG, target_modules="(?:(?:\\w+)*)*\\.x"), "target_modules"),
    "notes": (lambda: changed(adapter(), NOTES, task={"type": "os.system"}), "task.type"),
    "fingerprint": (lambda: changed(adapter(), NOTES, base={"fingerprint": {"values": 1}}), "base.fingerprint"),
    "link": (
        lambda: with_file(adapter(), CONFIG, b"../outside/adapter_config.json", "link"),
        "leads out of the folder",
    ),
    "absolute link": (lambda: with_file(adapter(), WEIGHTS, b"OUTSIDE/model.safetensors", "link"), "leads out"),
    "link of notes": (lambda: with_file(adapter(), NOTES, b"../outside/lorakeet.json", "link"), "leads out"),
    "pipe": (lambda: with_file(adapter(), CONFIG, b"", "pipe"), "a pipe"),
    "device": (lambda: with_file(adapter(), CONFIG, b"/dev/zero", "link"), "leads out"),
    "folder": (
        lambda: with_file(adapter(), f"{CONFIG}/x", b"").replace(b"== file adapter_config.json ", b"== file x "),
        "a folder",
    ),
    "tokenizer": (
        lambda: with_file(target("adapter").examples()[-1], "tokenizer.json", b"../outside/tokenizer.json", "link"),
        "leads out",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_hostile_adapters(name: str, arena: Arena) -> None:
    make, expected = ADAPTERS[name]
    assert expected in error_of("adapter", make(), arena)


INDEX = "model.safetensors.index.json"


def index_to(name: str) -> bytes:
    """Return a base whose index leads to another file."""
    kept = pack([entry for entry in unpack(base()) if entry.name != "model.safetensors"])
    return with_file(kept, INDEX, json.dumps({"weight_map": {"lm_head.weight": name}}).encode())


BASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "layers": (lambda: changed(base(), "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "width": (lambda: changed(base(), "config.json", hidden_size=1 << 20, intermediate_size=1 << 20), "parameters"),
    "vocabulary": (lambda: changed(base(), "config.json", vocab_size=10**9), "parameters"),
    "heads": (lambda: changed(base(), "config.json", num_attention_heads=0), "config"),
    "kernel": (lambda: changed(base(), "config.json", attn_implementation="user/kernel"), "code of the hub"),
    "auto_map": (
        lambda: changed(base(), "config.json", model_type="x", auto_map={"AutoConfig": "evil.Config"}),
        "cannot be read",
    ),
    "weights elsewhere": (
        lambda: changed(base(), "config.json", transformers_weights="../outside/model.safetensors"),
        "transformers_weights",
    ),
    "index up": (lambda: index_to("../outside/model.safetensors"), "its own folder"),
    "index absolute": (lambda: index_to("OUTSIDE/model.safetensors"), "its own folder"),
    "index pickle": (lambda: index_to("pytorch_model.bin"), "safetensors"),
    "link": (lambda: with_file(base(), "config.json", b"../outside/config.json", "link"), "leads out"),
    "link of weights": (
        lambda: with_file(base(), "model.safetensors", b"../outside/model.safetensors", "link"),
        "leads out",
    ),
    "pipe": (lambda: with_file(base(), "generation_config.json", b"", "pipe"), "a pipe"),
    "template": (
        lambda: with_file(base(), "additional_chat_templates/a.jinja", b"../../outside/secret.txt", "link"),
        "leads out",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_hostile_bases(name: str, arena: Arena) -> None:
    make, expected = BASES[name]
    assert expected in error_of("base", make(), arena)


def test_paths_in_a_tokenizer_config_are_not_followed(arena: Arena) -> None:
    for key in ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "chat_template_file"):
        bundle = changed(base(), "tokenizer_config.json", **{key: str(arena.outside / "tokenizer.json")})
        assert judge(target("base").run, bundle, arena) is None


def gguf(header: bytes, tensors: int = 0, pairs: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs) + header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


GGUFS: dict[str, tuple[bytes, str]] = {
    "pairs": (gguf(b"", pairs=1 << 60), "truncated"),
    "tensors": (gguf(b"", tensors=1 << 60), "truncated"),
    "text": (gguf(struct.pack("<Q", 1 << 60), pairs=1), "a text of"),
    "array": (gguf(text("a") + struct.pack("<IIQ", 9, 12, 1 << 62), pairs=1), "GGUF"),
    "nested": (gguf(text("a") + struct.pack("<IIQ", 9, 9, 1) * 5000, pairs=1), "GGUF"),
    "shape": (gguf(text("t") + struct.pack("<I2QIQ", 2, 1 << 40, 1 << 40, 0, 0), tensors=1), "larger than the file"),
    "offset": (gguf(text("t") + struct.pack("<I1QIQ", 1, 1, 0, 1 << 60), tensors=1), "larger than the file"),
    "layers": (
        gguf(text("general.architecture") + struct.pack("<I", 8) + text("x")
             + text("x.block_count") + struct.pack("<II", 4, 10**9), pairs=2),
        "contradicts itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUFS)
def test_hostile_gguf_files(name: str, arena: Arena) -> None:
    content, expected = GGUFS[name]
    assert expected in error_of("gguf", content, arena)


def parquet_bomb() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a" * 8_000_000]}), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def arrow_with_wild_offsets() -> bytes:
    file = io.BytesIO()
    batch = pa.RecordBatch.from_arrays([pa.array(["a" * 7, "b" * 9])], ["text"])
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return file.getvalue().replace(struct.pack("<3i", 0, 7, 16), struct.pack("<3i", 0, 1 << 29, 1 << 30))


LAUGHS = "- &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(9)
)
DATA: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip bomb": (lambda: files(**{"a.txt.gz": gzip.compress(bytes(1 << 25), 9)}), "text"),
    "text bomb": (lambda: files(**{"a.jsonl.gz": gzip.compress(b"a" * (1 << 26), 9)}), "unpacks to more than"),
    "yaml bomb": (lambda: files(**{"a.yaml": LAUGHS.encode()}), "aliases stand for more"),
    "yaml code": (lambda: files(**{"a.yaml": b"- !!python/object/apply:os.system [id]\n"}), "YAML"),
    "deep json": (lambda: files(**{"a.json": b"[" * 10**5}), "JSON"),
    "deep row": (lambda: files(**{"a.jsonl": b'{"text": ' + b"[" * 10**5 + b"}\n"}), "JSON"),
    "digits": (lambda: files(**{"a.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n"}), "JSON"),
    "arrow offsets": (lambda: files(**{"a.arrow": arrow_with_wild_offsets()}), "arrow"),
    "parquet bomb": (lambda: files(**{"a.parquet": parquet_bomb()}), "expected at most"),
    "link": (lambda: pack([Entry("link", "a.jsonl", b"../outside/data.jsonl")]), "leads out"),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_data(name: str, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakeet.data.read.table_formats._FREE", 1 << 20)
    bundle, expected = DATA[name][0](), DATA[name][1]
    assert judge(target("data").run, bundle, arena) is None
    with arena.armed() as folder:
        write(bundle, folder)
        try:
            faults = [
                str(row.fault) for s in find_sources(DataSettings(path=str(folder))) for row in s.rows() if row.fault
            ]
        except LorakeetError as error:
            faults = [str(error)]
    assert any(expected in fault for fault in faults), faults[:3]


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_no_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "pipe":
        name = str(tmp_path / "pipe.jsonl")
        os.mkfifo(name)
    assert main(["doctor", name]) == 2
    assert "expected a file or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["/models/x", "../x", "./x", "~/x", "x.gguf", "a/b/c", "\\\\host\\x", "file:///x"])
def test_a_base_that_an_adapter_names_by_a_path_is_not_followed(named: str) -> None:
    config = LoraConfig(base_model_name_or_path=named, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="paths in an adapter are not followed"):
        settings_of_base(BaseSettings(), config, "some/adapter")
    given = BaseSettings(model="user/base")
    assert settings_of_base(given, config, "some/adapter") is given  # the user's own choice needs no name


def test_a_link_in_the_cache_of_the_hub_is_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    LoraConfig(target_modules=["q_proj"]).save_pretrained(blobs)
    (snapshot / CONFIG).symlink_to(Path("../../blobs") / CONFIG)
    assert LoraConfig.from_pretrained(snapshot).target_modules == ["q_proj"]
    (blobs / "elsewhere").symlink_to(tmp_path)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(Path("../../blobs/elsewhere") / CONFIG)
    with pytest.raises(AdapterError, match="leads out of the folder"):
        LoraConfig.from_pretrained(snapshot)
