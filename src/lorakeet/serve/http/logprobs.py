"""Log probabilities of tokens in OpenAI's two forms: that of chats, and the older one of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakeet.serve.engine.requests import TokenLogprob

#: Logarithm that stands for a probability of 0, which JSON cannot write; OpenAI's number.
_ZERO = -9999.0
#: Signs of byte-level tokenizers for the bytes 0 to 255, see :func:`_byte_signs`.
_SIGNS: dict[str, int] = {}


def chat_logprobs(tokenizer: Any, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the log probabilities of a chat's tokens."""
    content = []
    for one in tokens:
        likely = [_entry(tokenizer, token, logprob) for token, logprob in one.top]
        content.append({**_entry(tokenizer, one.token, one.logprob), "top_logprobs": likely})
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, tokens: Sequence[TokenLogprob], start: int = 0) -> dict[str, Any]:
    """Return the log probabilities of a completion's tokens.

    Args:
        tokenizer: Of the model.
        tokens: The tokens.
        start: Characters of the answer before the first.
    """
    texts = [token_text(tokenizer, one.token) for one in tokens]
    offsets = [start + sum(map(len, texts[:position])) for position in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [
            {token_text(tokenizer, token): _finite(logprob) for token, logprob in one.top} for one in tokens
        ],
        "text_offset": offsets,
    }


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a token; bytes that are no whole character are written as ``bytes:\\xe2\\x80``."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for; of a tokenizer that is not byte-level, those of its text."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    if token not in tokenizer.added_tokens_decoder and _is_byte_level(tokenizer):
        signs = _byte_signs()
        if all(sign in signs for sign in name):
            return bytes(signs[sign] for sign in name)
    if name.startswith("<0x") and name.endswith(">") and len(name) == 6:  # a byte of a tokenizer by sentencepiece
        return bytes([int(name[3:5], 16)])
    text: str = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.encode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in repr(getattr(backend, "decoder", None))


def _byte_signs() -> dict[str, int]:
    """Return the signs that byte-level tokenizers write bytes as; those that cannot be printed begin at U+0100."""
    if not _SIGNS:
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        _SIGNS.update({chr(byte): byte for byte in printed})
        _SIGNS.update({chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*printed}))})
    return _SIGNS


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": _finite(logprob),
        "bytes": list(token_bytes(tokenizer, token)),
    }


def _finite(logprob: float) -> float:
    return max(float(logprob), _ZERO)
