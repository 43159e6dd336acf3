"""Text files of users: the only reader of them, for data, prompts, texts to predict, and settings.

A text file is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end with a line feed, a carriage
return or both, and with nothing else: U+2028, U+0085 and a form feed are characters of a line. What is no text is an error
that names what it is, by its first bytes.
"""

from __future__ import annotations

import codecs
import gzip
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple

#: Bytes at the beginning of a file that its kind and its encoding are recognized by.
_HEAD = 4096
#: Characters of the longest line.
LONGEST_LINE = 1 << 26
#: Times its own size that a compressed file may unpack to, beyond the bytes that any may; text packs 3 to 30 times.
_RATIO, _FREE = 400, 1 << 24
#: Byte order mark -> encoding; that of UTF-32 comes first, since it begins as that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_AS_TEXT = "leave it out, or write its text into a .txt file"
_UNPACK = "unpack it first"
#: First bytes -> what a file with them is, and how to get at its text.
_SIGNATURES = {
    b"%PDF-": ("a PDF document", "extract its text, e.g. pdftotext {path}"),
    b"\x89PNG\r\n": ("a PNG image", _AS_TEXT),
    b"\xff\xd8\xff": ("a JPEG image", _AS_TEXT),
    b"GIF87a": ("a GIF image", _AS_TEXT),
    b"GIF89a": ("a GIF image", _AS_TEXT),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"PK\x05\x06": ("an empty zip archive", None),
    b"\x1f\x8b": ("gzip-compressed", "let its name end in .gz, or unpack it: gunzip -c {path}"),
    b"BZh91AY&SY": ("bzip2-compressed", "unpack it: bunzip2 {path}"),
    b"\xfd7zXZ\0": ("xz-compressed", "unpack it: unxz {path}"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "unpack it: unzstd {path}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", _UNPACK),
    b"PAR1": ("a parquet table", "let its name end in .parquet, or give data.format=parquet"),
    b"ARROW1\0\0": ("an arrow table", "let its name end in .arrow, or give data.format=arrow"),
    b"SQLite format 3\0": ("an SQLite database", "export its table as .csv"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Office document", "save it as .csv or .txt"),
    b"{\\rtf": ("a rich text document", "save it as plain text"),
    b"\x93NUMPY": ("a NumPy array", _AS_TEXT),
    b"\x89HDF\r\n": ("an HDF5 file", _AS_TEXT),
    b"GGUF\x02\0": ("a GGUF model", "give it as the model"),
    b"GGUF\x03\0": ("a GGUF model", "give it as the model"),
    b"\x7fELF": ("a program", None),
}
#: Member of a zip archive -> what an archive with it is, and how to get at its text.
_IN_ZIP = {
    "word/document.xml": ("a Word document (docx)", "save it as plain text"),
    "xl/workbook.xml": ("an Excel workbook (xlsx)", "save its sheet as .csv"),
    "ppt/presentation.xml": ("a PowerPoint document (pptx)", _AS_TEXT),
    "META-INF/container.xml": ("an EPUB book", "convert it to plain text"),
    "content.xml": ("an OpenDocument file", "save it as .csv or .txt"),
}


class NotTextError(ValueError):
    """A file is not text as it should be.

    Attributes:
        message: What it is and what was expected, without the path.
        hint: How to get at its text, if known.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class EncodingProblem(NamedTuple):
    """Reason that some text is not UTF-8, and how to correct it."""

    message: str
    hint: str


class _Gzip(gzip.GzipFile):
    """Compressed file that refuses to unpack to far more than text does (a "zip bomb"). A damaged one is an OSError."""

    def read(self, size: int | None = -1) -> bytes:
        return self._bounded(super().read, size)

    def read1(self, size: int = -1) -> bytes:
        return self._bounded(super().read1, size)

    def peek(self, n: int) -> bytes:
        return self._bounded(super().peek, n)

    def _bounded(self, unpack: Callable[[Any], bytes], size: int | None) -> bytes:
        try:
            chunk = unpack(size)
        except (EOFError, zlib.error) as error:  # gzip's own error is an OSError
            raise gzip.BadGzipFile(f"a damaged compressed file: {error}") from None
        packed = max(os.fstat(self.fileno()).st_size, 1)
        if self.tell() > max(_FREE, packed * _RATIO):
            raise NotTextError(f"it unpacks to more than {_RATIO} times its size, expected text", _UNPACK)
        return chunk


def open_bytes(path: Path) -> IO[bytes]:
    """Open ``path`` to read its bytes, unpacked if its name ends in ``.gz``."""
    return _Gzip(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of ``path``, each with ``\\n`` at its end; the last one as it is.

    Bytes that are not UTF-8 become half characters, so that each line can be checked alone (:func:`encoding_problem`).

    Raises:
        NotTextError: It is no text file, or in an encoding that is not read.
    """
    with open_bytes(path) as file:
        encoding = _encoding(file.peek(_HEAD), path)  # type: ignore[attr-defined]
        is_utf8 = encoding == "utf-8-sig"
        with TextIOWrapper(file, encoding, errors="surrogateescape" if is_utf8 else "strict") as text:
            try:
                yield from _bounded_lines(text)
            except UnicodeDecodeError as error:
                raise NotTextError(f"broken {encoding.upper()}: {error.reason}", "save it as UTF-8") from None


def _bounded_lines(text: TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a text, none longer than :data:`LONGEST_LINE`; a device or a compressed file has no end to it."""
    for number, line in enumerate(iter(partial(text.readline, LONGEST_LINE), ""), start=1):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise NotTextError(
                f"line {number} has more than {LONGEST_LINE:,} characters", "is this a text file at all?"
            )
        yield line


def all_lines(path: str | Path) -> list[str]:
    """Return the lines of ``path``, each with ``\\n`` at its end; the last one as it is.

    Raises:
        OSError: It cannot be read.
        NotTextError: It is no text file; the message has the line of a byte that is not UTF-8.
    """
    path, lines = Path(path), []
    for number, line in enumerate(read_lines(path), start=1):
        if problem := encoding_problem(line, path):
            raise NotTextError(f"line {number}: {problem.message}", problem.hint)
        lines.append(line)
    return lines


def read_text(path: str | Path) -> str:
    """Return the text of ``path``; raises as :func:`all_lines`."""
    return "".join(all_lines(path))


def encoding_problem(text: str, path: Path) -> EncodingProblem | None:
    """Return why a ``text`` read from ``path`` is not UTF-8 text; None if it is."""
    if "\0" in text:
        return EncodingProblem("a zero byte, expected UTF-8 text", "is this a text file at all?")
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "surrogateescape" writes byte 0x80 as U+DC80
        byte = ord(text[error.start]) - 0xDC00
        hint = f"convert it from the encoding that it has, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path}"
        return EncodingProblem(f"byte 0x{byte:02x} is not UTF-8", hint)
    return None


def preview(path: Path, size: int) -> tuple[bytes, str]:
    """Return the first ``size`` bytes of ``path``, and the text in them, whatever it is worth; its lines end with ``\\n``."""
    with open_bytes(path) as file:
        head = file.read(size)
    text = head.decode(_marked(head) or "utf-8", errors="replace").removeprefix("\ufeff")
    return head, text.replace("\r\n", "\n").replace("\r", "\n")


def _marked(head: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)


def _encoding(head: bytes, path: Path) -> str:
    """Return the encoding of a file by its first bytes.

    Raises:
        NotTextError: It is no text, or UTF-16 without a mark.
    """
    for signature, (kind, hint) in _SIGNATURES.items():
        if head.startswith(signature):
            if signature == b"PK\x03\x04":
                kind, hint = _kind_of_zip(path) or (kind, hint)
            raise NotTextError(f"{kind}, expected text", hint and hint.format(path=path))
    if encoding := _marked(head):
        return encoding
    if order := _utf16_order(head):
        hint = f"convert it: iconv -f UTF-16{order} -t UTF-8 {path}"
        raise NotTextError("UTF-16 without a byte order mark, expected UTF-8", hint)
    return "utf-8-sig"


def _utf16_order(head: bytes) -> str | None:
    """Return ``BE`` or ``LE`` where only the first or the second byte of two is often zero, and words come of it."""
    zeros = [head[parity::2].count(0) for parity in (0, 1)]
    if min(zeros) or max(zeros) * 4 <= len(head):
        return None
    order = "BE" if zeros[0] else "LE"
    text = head.decode(f"utf-16-{order}", errors="ignore")
    return order if sum(map(str.isalnum, text)) * 2 > len(text) else None


def _kind_of_zip(path: Path) -> tuple[str, str | None] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return None
    return next((kind for name, kind in _IN_ZIP.items() if name in names), None)
