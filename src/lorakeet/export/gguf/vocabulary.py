"""The vocabulary of a tokenizer in GGUF: tokens with their types, merges or scores, and the rule that splits words.

llama.cpp has its own tokenizers. ``gpt2`` is byte-level BPE, with a splitting rule by name (``tokenizer.ggml.pre``).
``llama`` is the BPE of SentencePiece, which merges by score. A rule that llama.cpp has no name for is refused, since it
would split texts otherwise than in the training.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType

from lorakeet.errors import BaseModelError
from lorakeet.export.gguf.architecture import HINT

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Regular expression that splits texts -> llama.cpp's name of the rule.
_RULES = {f"{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe", f"{_WORDS}|\\p{{N}}|{_REST}": "qwen2"}
#: SentencePiece's mark of a space.
_SPACE = "▁"


def add_vocabulary(writer: Any, tokenizer: Any, rows: int, rule: str | None = None) -> None:
    """Add a tokenizer's vocabulary, special tokens and chat template.

    Args:
        writer: The ``gguf.GGUFWriter``.
        tokenizer: The tokenizer.
        rows: Rows of the model's embedding.
        rule: llama.cpp's name of the splitting rule, if it is known; None: by the tokenizer.

    Raises:
        BaseModelError: llama.cpp has no tokenizer like it.
    """
    state = _state(tokenizer)
    tokens, types = _tokens(state, rows)
    if sentencepiece := bool(state["model"].get("byte_fallback")):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(state, tokens))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule or splitting_rule(state))
        writer.add_token_merges([" ".join(pair) for pair in _merges(state)])
        writer.add_add_space_prefix(False)
    types = [
        TokenType.BYTE if sentencepiece and is_byte(token) else kind for token, kind in zip(tokens, types, strict=True)
    ]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
    ):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            add(number)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _state(tokenizer: Any) -> dict[str, Any]:
    """Return the parts of a tokenizer, as ``tokenizer.json`` has them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    if state["model"]["type"] != "BPE" or not state["model"]["merges"]:
        kind = f"{state['model']['type']} tokenizer" + (" without merges" if state["model"]["type"] == "BPE" else "")
        raise BaseModelError(f"cannot write a {kind} as GGUF, expected BPE", HINT)
    return dict(state)


def _tokens(state: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    """Return the token of each row of the embedding, and its type."""
    vocabulary = {number: token for token, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    if (last := max([*vocabulary, *added])) >= rows:
        raise BaseModelError(f"the tokenizer has a token {last}, the embedding has {rows} rows", "resize the embedding")
    tokens, types = [], []
    for number in range(rows):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED)
        else:
            tokens.append(vocabulary.get(number, f"[PAD{number}]"))
            types.append(TokenType.NORMAL if number in vocabulary else TokenType.UNUSED)
    return tokens, types


def is_byte(token: str) -> bool:
    """Whether a token of SentencePiece stands for one byte, such as ``<0x0A>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that are merged, the first ones first."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in state["model"]["merges"]]
    return [(first, second) for first, second in pairs]


def _scores(state: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return the scores with which SentencePiece merges in the same order: the earlier a merge, the higher its score."""
    ranks: dict[str, int] = {}
    for number, (first, second) in enumerate(_merges(state), 1):
        ranks.setdefault(first + second, number)
    return [-float(ranks.get(token, 0 if is_byte(token) else len(ranks) + 1)) for token in tokens]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    parts = [part for key in ("normalizer", "pre_tokenizer") for part in _steps(state.get(key))]
    prepends = any(part["type"] == "Prepend" and part.get("prepend") == _SPACE for part in parts)
    return prepends or any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, of nested ones too."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def splitting_rule(state: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits texts before the merges.

    Args:
        state: The parts of a byte-level BPE tokenizer, as ``tokenizer.json`` has them.

    Raises:
        BaseModelError: It has no name for the rule.
    """
    match _steps(state.get("pre_tokenizer")):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in _RULES:
            return _RULES[pattern]
    raise BaseModelError("llama.cpp has no name for the rule by which this tokenizer splits texts", HINT)
