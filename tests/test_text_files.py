"""One reader of text files: line ends, byte order marks, and files that are no text, wherever a user's text is opened."""

from __future__ import annotations

import ast
import gzip
import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorakeet.cli.generate import read_prompts
from lorakeet.cli.predict import _read
from lorakeet.config import DataSettings, read_run
from lorakeet.data.read.formats import read_file
from lorakeet.data.read.source import find_sources
from lorakeet.errors import ConfigError, DataError, LorakeetError
from lorakeet.text_files import NotTextError, all_lines, preview, read_text

SOURCE = Path(__file__).parents[1] / "src" / "lorakeet"
SIGNS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]  # line ends to str.splitlines alone

#: Module -> why it opens files itself: none of them holds text that a user wrote.
OWN_FILES = {
    "text_files.py": "the reader itself",
    "adapter/model_card.py": "a README, of which only a mark is sought",
    "base/gguf.py": "bytes",
    "base/gguf_header.py": "bytes",
    "cli/__init__.py": "/dev/null",
    "data/doctor/fix.py": "a copy that is written",
    "data/read/fortune.py": "bytes of an index",
    "files.py": "folders",
    "kernels/cpu/build.py": "C sources, /proc/cpuinfo",
    "kernels/cpu/machine.py": "/proc/cpuinfo",
    "plan/free_memory.py": "/proc/meminfo",
    "plan/saved_costs.py": "/proc/cpuinfo, JSON of the cache",
    "quant/mmap_release.py": "/proc/self/smaps",
    "rank/resize.py": "copies of files",
    "runs/folder_lock.py": "a lock",
    "runs/metrics_log.py": "lines that were written with \\u escapes",
    "runs/process_memory.py": "/proc/self/status",
    "security/json_file.py": "JSON, of which the bytes are counted",
    "serve/compiled/agreement.py": "bytes of this package, of which a hash is taken",
    "train/callbacks/progress.py": "a progress bar",
    "train/checkpoints/manifest.py": "bytes, of which the hash is taken",
    "serve/http/tokenizers.py": "bytes, of which a hash is taken",
}


def opens_files(tree: ast.AST) -> list[int]:
    """Return the lines of calls that open a file, read it whole, or split text at more than line feeds; not of JSON."""
    found = []
    json_values = [node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_json(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in json_values:
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if isinstance(called, ast.Name) and name == "read_text":  # the reader's own
                continue
            of_words = name == "splitlines" and ".strip()" in ast.unparse(called)  # of an error, or for a display
            if name in ("read_text", "read_bytes", "open", "fdopen", "TextIOWrapper", "splitlines") and not of_words:
                found.append(node.lineno)
    return found


def _is_json(node: ast.Call) -> bool:
    """Whether a call parses JSON, which is read as programs write it."""
    return ast.unparse(node.func) == "json.loads"


def test_no_other_module_opens_text() -> None:
    found = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := opens_files(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not {module: lines for module, lines in found.items() if module not in OWN_FILES}
    assert opens_files(ast.parse("Path(name).read_text().splitlines()")) and opens_files(ast.parse("open(name)"))


@pytest.mark.parametrize("sign", SIGNS)
def test_only_line_feeds_and_carriage_returns_end_lines(sign: str, tmp_path: Path) -> None:
    text = f"one{sign}two"
    plain, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    plain.write_bytes(f"{text}\r\nthree\rfour\n\n".encode())
    lines.write_text(json.dumps({"text": text, "prompt": text}, ensure_ascii=sign < " ") + "\n\n", encoding="utf-8")
    assert all_lines(plain) == [f"{text}\n", "three\n", "four\n", "\n"]
    assert _read(plain) == read_prompts(plain) == [text, "three", "four"]
    assert _read(lines) == read_prompts(lines) == [text]
    rows = tmp_path / "t.yaml"
    for quote in ("", "'", '"') if sign > " " else ():  # YAML has no control characters
        rows.write_text(f"- text: {quote}{text}{quote}\n  prompt: x\n", encoding="utf-8")
        assert [record.values for record in read_file(rows)] == [{"text": text, "prompt": "x"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_byte_order_marks_say_the_encoding(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    for name, text in (
        ("t.csv", "text,label\nnaïve ☃,a\n"),
        ("t.txt", "naïve ☃\n"),
        ("t.json", '[{"text": "naïve ☃"}]'),
    ):
        path = tmp_path / name
        path.write_bytes((mark + text).encode(encoding))
        assert _read(path) == ["naïve ☃"]
        assert [record.values and record.values["text"] for record in read_file(path)] == ["naïve ☃"]
    path = tmp_path / "run.yaml"
    path.write_bytes((mark + "lora: {r: 3}\n").encode(encoding))
    assert read_run(path).lora.r == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.ndjson", '{"text": "one", "prompt": "one"}\n'),
        ("x.json", '[{"text": "one", "prompt": "one"}]'),
        ("x.csv", "text;prompt\none;one\n"),
        ("x.TSV", "text\tprompt\none\tone\n"),
        ("x.yaml", "- {text: one, prompt: one}\n"),
        ("x.JSONL", '\ufeff{"text": "one", "prompt": "one"}\n\n'),
        ("x.txt.gz", "one\n"),
        ("x", "one\n"),
        ("x.md", "one\n"),
        ("x.txt", "\n \n\ufeffone".lstrip("\n ")),
    ],
)
def test_texts_to_answer_are_read_by_their_format(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert _read(path) == read_prompts(path) == ["one"]


def test_a_damaged_compressed_file_is_one_error(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.gz", gzip.compress(b'{"text": "a"}\n' * 40, mtime=0)
    damaged = [whole[:end] for end in range(2, len(whole))]
    damaged += [
        whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(len(whole)) for flip in (6, 255)
    ]
    for data in damaged:
        path.write_bytes(data)
        for read in (all_lines, lambda path: preview(path, 4096)):
            with suppress(OSError, NotTextError):
                read(path)
        with suppress(DataError):
            find_sources(DataSettings(path=str(path)))


def test_texts_to_answer_of_a_table(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one"], "prompt": ["one"]}).to_parquet(tmp_path / "x.parquet")
    assert _read(tmp_path / "x.parquet") == read_prompts(tmp_path / "x.parquet") == ["one"]


@pytest.mark.parametrize("content", ['{"text": 3, "prompt": 3}\n', '{"text": ""}\n', "", "\n\n", "[1]", "{"])
def test_what_is_no_text_is_refused_with_its_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text(content)
    for reader in (_read, read_prompts):
        with pytest.raises(DataError, match=r"n\.jsonl"):
            reader(path)
        with pytest.raises(DataError, match="cannot be read|does not exist"):
            reader(tmp_path / "missing.txt")


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


KINDS = {
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "PNG": b"\x89PNG\r\n\x1a\n\0\0",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "zip archive": zipped("a.txt"),
    "Word": zipped("[Content_Types].xml", "word/document.xml"),
    "Excel": zipped("[Content_Types].xml", "xl/workbook.xml"),
    "OpenDocument": zipped("mimetype", "content.xml"),
    "gzip": gzip.compress(b'{"text": "a"}\n'),
    "parquet": b"PAR1\x15\x04\x15",
    "SQLite": b"SQLite format 3\0\x10\0",
    "old Office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0",
    "UTF-16 without": "just text\n".encode("utf-16-be"),
    "zero byte": b"MZ\x90\0\x03\0\0",
    "0xef is not UTF-8": "naïve\n".encode("latin-1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_is_named(kind: str, tmp_path: Path) -> None:
    refusals: list[tuple[Any, str, type[LorakeetError]]] = [
        (_read, "f.jsonl", DataError),
        (read_prompts, "f.csv", DataError),
        (read_run, "f.yaml", ConfigError),
    ]
    for reader, name, error in refusals:
        path = tmp_path / name
        path.write_bytes(KINDS[kind])
        with pytest.raises(error, match=kind) as caught:
            reader(path)
        assert "\n" not in caught.value.message
        assert ("iconv" in (caught.value.hint or "")) == (kind in ("UTF-16 without", "0xef is not UTF-8"))
    if kind != "parquet":  # which is read where the name does not say otherwise
        path = tmp_path / "f.bin"
        path.write_bytes(KINDS[kind])
        assert kind in str([record.fault for record in read_file(path)])


def test_a_broken_end_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("naïve".encode("utf-16")[:-1])
    with pytest.raises(NotTextError, match="broken UTF-16"):
        read_text(path)
