"""Header of a GGUF file: its key-value pairs and the shapes of its tensors, held against the length of the file.

The file format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader that `transformers` uses trusts every
number in it, so each is checked here first.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from lorakeet.base.config_checks import WeightFacts, config_problems
from lorakeet.errors import BaseModelError

_UINT32, _STRING, _ARRAY = 4, 8, 9  # value types of the GGUF format
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # number type -> bytes of a value
#: Bytes of the longest text that is kept; a chat template has some thousand.
_LONGEST = 1 << 24
#: Most dimensions of a tensor.
_DIMENSIONS = 8
#: Weights of a byte in the smallest format of GGUF, with one and a half bits a weight.
_WEIGHTS_PER_BYTE = 6


def gguf_name(path: Path) -> str:
    """Return the model's name in a GGUF file (``general.name``), or else the file's stem.

    Raises:
        BaseModelError: It is no GGUF file, or it is truncated within its header.
    """
    return str(read_header(path).get("general.name") or path.stem)


def read_header(path: Path) -> dict[str, str | int]:
    """Read the strings and unsigned 32-bit integers of a GGUF file's key-value pairs, in milliseconds.

    Raises:
        BaseModelError: It is no GGUF file, or it is truncated within its header; or a number in it cannot be true.
    """
    header: dict[str, str | int] = {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, version, tensors, pairs = _unpack(file, "<4sIQQ")
            if magic != b"GGUF" or not 2 <= version <= 3:
                raise ValueError(f"it begins with {magic!r}, version {version}")
            for _ in range(pairs):
                key = _text(file)
                value = _value(file, *_unpack(file, "<I"))
                if value is not None:
                    header[key] = value
            facts = _tensor_facts(file, tensors, size)
    except (OSError, ValueError, KeyError, OverflowError, struct.error) as error:
        raise BaseModelError(
            f"{path} is truncated or no GGUF file: {error}",
            "give a folder, a hub id, or a GGUF file of version 2 or 3",
        ) from error
    _check_numbers(path, header, facts)
    return header


def _tensor_facts(file: BinaryIO, count: int, size: int) -> WeightFacts:
    """Read the shapes of the tensors, and check them against the length of the file."""
    numbers = longest = 0
    for _ in range(count):
        name = _text(file)
        (dimensions,) = _unpack(file, "<I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = _unpack(file, f"<{dimensions}Q")
        _, offset = _unpack(file, "<IQ")
        product = 1
        for length in shape:
            product *= length
        if product > size * _WEIGHTS_PER_BYTE or offset > size:
            raise ValueError(f"tensor {name[:80]!r} of shape {list(shape)} is larger than the file")
        numbers, longest = numbers + product, max(longest, *shape, 0)
    if numbers > size * _WEIGHTS_PER_BYTE:
        raise ValueError(f"its tensors have {numbers:,} weights, more than {size:,} bytes can hold")
    return WeightFacts(count, numbers, longest)


def _check_numbers(path: Path, header: dict[str, str | int], facts: WeightFacts) -> None:
    """Check that the architecture asks for no more layers, and no wider ones, than the tensors have.

    Raises:
        BaseModelError: It does.
    """
    family = str(header.get("general.architecture"))
    own = {key.removeprefix(f"{family}."): value for key, value in header.items() if key.startswith(f"{family}.")}
    counts = {"n_blocks": own.get("block_count"), "n_experts": own.get("expert_count")}
    problems = config_problems({name: value for name, value in counts.items() if value is not None}, facts)
    for name in ("embedding_length", "feed_forward_length", "vocab_size"):
        if isinstance(value := own.get(name), int) and value > facts.longest:
            problems.append(f"{name} is {value:,}, the longest side of a tensor is {facts.longest:,}")
    if problems:
        raise BaseModelError(f"{path} contradicts itself: {'; '.join(problems)}", "download it again")


def _value(file: BinaryIO, value_type: int) -> str | int | None:
    """Read a string or an unsigned 32-bit integer; skip arrays and other numbers."""
    if value_type == _STRING:
        return _text(file)
    if value_type == _UINT32:
        return int(_unpack(file, "<I")[0])
    if value_type == _ARRAY:
        item_type, count = _unpack(file, "<IQ")
        if item_type == _STRING:
            for _ in range(count):
                _text(file)
        else:
            file.seek(_BYTES[item_type] * count, 1)
        return None
    file.seek(_BYTES[value_type], 1)
    return None


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    if length > _LONGEST:
        raise ValueError(f"a text of {length} bytes in its header")
    content = file.read(length)
    if len(content) < length:
        raise ValueError(f"a text of {length} bytes, of which {len(content)} are there")
    return content.decode("utf-8", errors="replace")


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
