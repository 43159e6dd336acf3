"""Text that people see or that a run writes: without secrets, and without signs that steer a terminal."""

from __future__ import annotations

import os
import re

#: Text in place of a secret.
HIDDEN = "***"
#: Environment variables whose values are never shown.
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
#: Characters of the shortest secret; a shorter value of a variable would hide parts of ordinary words.
_SHORTEST = 8
#: Tokens by their own form: the hub's, GitHub's, OpenAI's and AWS's key ids, and a bearer header.
_TOKEN = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b|(?<=Bearer )[\w.~+/-]{16,}=*"
)
#: User and password in an address, and a token among its parameters.
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]{1,256}(?=@)|(?<=[?&]token=)[^&\s'\"]+|(?<=[?&]access_token=)[^&\s'\"]+")
#: Signs that a terminal obeys, and those that turn the direction of text; a line feed and a tab are none.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """Return ``text`` with every secret in it hidden: tokens, passwords in addresses, values of secret variables."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _IN_ADDRESS.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def holds_secret(text: str) -> bool:
    """Whether there is a secret in ``text``."""
    return redact(text) != text


def cut(text: str, length: int) -> str:
    """Return the first ``length`` characters of ``text``; a longer one ends with dots."""
    return text if len(text) <= length else f"{text[:length]}..."


def printable(text: str) -> str:
    """Return ``text`` with its steering signs written as escapes, such as ``\\x1b``."""
    return _STEERING.sub(lambda sign: ascii(sign[0])[1:-1], text)


def for_people(text: str) -> str:
    """Return ``text`` as a message shows it: without secrets and steering signs."""
    return printable(redact(text))
