"""Mutations that keep most of an input valid: values of JSON and YAML, headers of safetensors, bytes of all else."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fuzzing.bundle import Entry, pack, unpack

#: Values in place of any other.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**12, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", " ", "x", "../outside/config.json", "OUTSIDE/config.json", "/dev/zero", "."),
    *("OUTSIDE/model.safetensors", "../outside/model.safetensors", "OUTSIDE/tokenizer.json", "~", "C:\\x", "a" * 5000),
    *("\x1b[2J", "\u202e", "\ud800", "(a+)+$", ".*.*.*.*.*.*.*.*x", "[", "(?P<x>", "hf_" + "a" * 34, "\0", "user/name"),
    *([], {}, [[]], [0], [None], [-1], [10**9], ["x"], {"": None}, {"x": {"x": {}}}, [[[[[[]]]]]]),
)
#: Keys that readers act on, to be added anywhere.
KEYS = (
    *("auto_map", "attn_implementation", "transformers_weights", "quantization_config", "architectures", "dtype"),
    *("base", "task", "unfrozen", "peft_type", "tokenizer_file", "vocab_file", "chat_template", "text", "messages"),
)
#: Pieces of text for files that are no JSON.
PIECES = (
    *("&a [*a]", "&a [x, x]", "*a", "<<: *a", "!!python/object:os.system", "!!int ''", "1:1:1", "0x" + "f" * 5000),
    *("\ufeff", "\x00", "\r", "\u2028", '"', "'", "[" * 2000, "{" * 2000, "%\n", "%%", "-- ", "\t", ";;;;", "sep=;"),
    *(
        "{% for i in range(99999) %}",
        "{% endfor %}",
        "{{ 9**9**9 }}",
        "{{ 'a'*10**9 }}",
        "|center(10**9)",
        "{% include 'x' %}",
    ),
    *(
        "OUTSIDE/secret.txt",
        "../outside/secret.txt",
        "NaN",
        "1e999",
        "9" * 5000,
        "\x1b[31m",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ),
)


def mutate(data: bytes, rng: random.Random, largest: int = 1 << 17, links: bool = True) -> bytes:
    """Return a changed input: a bundle stays one; with ``links``, files in it may become links and pipes."""
    if not data.startswith(b"== "):
        return _mutated_bytes(data, rng)[:largest]
    entries = unpack(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if entries:
            at = rng.randrange(len(entries))
            entries[at] = _mutated_entry(entries[at], rng, links)
    if entries and rng.random() < 0.03:
        entries.pop(rng.randrange(len(entries)))
    return pack(entries)[:largest]


def _mutated_entry(entry: Entry, rng: random.Random, links: bool) -> Entry:
    if links and rng.random() < 0.02:
        name = rng.choice(("config.json", "adapter_config.json", "data.jsonl", "secret.txt"))
        return Entry(
            "link", entry.name, rng.choice((f"../outside/{name}", f"OUTSIDE/{name}", "/dev/zero", ".")).encode()
        )
    if links and rng.random() < 0.01:
        return replace(entry, kind="pipe")
    suffix = entry.name.rpartition(".")[2]
    change: Callable[[bytes, random.Random], bytes] = _mutated_bytes
    if rng.random() < 0.8:
        change = {"json": _mutated_json, "safetensors": _mutated_header, "jsonl": _mutated_lines}.get(suffix, change)
    return replace(entry, content=change(entry.content, rng))


def _mutated_json(content: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _mutated_bytes(content, rng)
    return _dump(_mutated_value(value, rng))


def _mutated_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = _mutated_json(lines[at], rng)
    return b"\n".join(lines)


def _dump(value: Any) -> bytes:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of too many digits
        return b'{"r": ' + b"9" * 5000 + b"}"
    return text.encode()


def _mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with another header of the right length, or another length."""
    if len(content) < 8:
        return _mutated_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    header = _mutated_json(header, rng)
    if rng.random() < 0.2:
        rest = _mutated_bytes(rest, rng)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**62, 10**8, len(content), len(header) + 1))
    return struct.pack("<Q", size) + header + rest


def _mutated_value(value: Any, rng: random.Random) -> Any:
    """Return ``value`` with one value or key inside of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.random()
        if action < 0.05:
            del changed[key]
        elif action < 0.1:
            other = rng.choice([name for name in STRANGE if isinstance(name, str)])
            changed[other] = changed.pop(key)
        elif action < 0.15:
            changed[rng.choice(KEYS)] = rng.choice(STRANGE)
        else:
            changed[key] = _mutated_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:at] + value[at + 1 :]
        if action < 0.2:
            return value[:at] + [value[at]] * rng.choice((2, 1000)) + value[at:]
        return [*value[:at], _mutated_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 7, value))
    if isinstance(value, str) and rng.random() < 0.3:
        return _mutated_bytes(value.encode(errors="replace"), rng).decode(errors="replace")
    return rng.choice(STRANGE)


def _mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return ``content`` with a few bytes or pieces changed."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(7)
        if action == 0 and changed:
            changed[at % len(changed)] = rng.randrange(256)
        elif action == 1 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif action == 2:
            changed[at:at] = rng.choice(PIECES).encode(errors="surrogatepass")
        elif action == 3:
            end = min(len(changed), at + rng.choice((1, 4, 16, 100)))
            del changed[at:end]
        elif action == 4:
            end = min(len(changed), at + rng.choice((1, 4, 16, 100)))
            changed[at:at] = changed[at:end] * rng.choice((1, 2, 50))
        elif action == 5:
            changed[at : at + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            changed[at:at] = str(rng.choice((0, -1, 10**9, 10**30, "x", "null"))).encode()
    return bytes(changed)
