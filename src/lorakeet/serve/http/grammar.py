"""Answers that keep to a JSON schema, by llguidance: what a schema may ask for, and the state of each answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorakeet.security.shown import cut
from lorakeet.serve.http.errors import bad_request
from lorakeet.serve.http.tools.call_grammar import call_grammar
from lorakeet.serve.http.tools.forms import ToolForm

Mask = NDArray[np.bool_]

#: Characters of the largest schema; compiling the worst one of this size takes half a second.
LARGEST_SCHEMA = 1 << 15
#: Levels of the deepest schema.
DEEPEST_SCHEMA = 64
#: Bounds on the work for one schema, and for one token: about a fifth of the library's own.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    max_items_in_row=500,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
#: JSON without white space between its parts, which a model could go on with for ever; no key is passed over.
_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False}
#: The same for arguments of a call, with spaces as Python writes them and templates show them.
_CALL_OPTIONS = {**_OPTIONS, "key_separator": ": ", "item_separator": ", "}
#: Keys of a schema that lead to another document, if their values are texts; a property may have the same name.
_STEERING = ("$id", "$anchor", "$dynamicRef", "$recursiveRef")
#: Digits of the longest number. Small models write zeros for ever; fp64 needs 17 digits, and integers of 64 bits 19.
LONGEST_NUMBER = 24
_QUOTE, _ESCAPE = b'"\\'
_DIGITS = b"0123456789"
#: Field of the schema of an answer.
SCHEMA = "response_format.json_schema.schema"
#: Characters of llguidance's own message that an error shows.
_SHOWN = 300


class Grammars:
    """Maker of grammars for one tokenizer, which is taken apart once, in most of a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._lock = threading.Lock()
        self._taken_apart: LLTokenizer | None = None
        self._digits: Mask = np.zeros(0, bool)

    @property
    def are_possible(self) -> bool:
        """Whether there is a tokenizer.json and an end token, which grammars need."""
        return bool(getattr(self._tokenizer, "is_fast", False) and self._ends)

    def ready(self) -> LLTokenizer:
        """Return the tokenizer as llguidance reads it.

        The first call holds up all threads of the process for most of a second.

        Raises:
            ApiError: Grammars are not possible.
        """
        with self._lock:
            if self._taken_apart is None:
                if not self.are_possible:
                    message = "answers in JSON need a model with a fast tokenizer and an end token"
                    raise bad_request(message, "response_format")
                taken = from_tokenizer(self._tokenizer, eos_token=self._ends)  # type: ignore[arg-type]
                begins = [taken.decode_bytes([token])[:1] for token in range(taken.vocab_size)]
                self._digits = np.array([one != b"" and one in _DIGITS for one in begins], bool)
                self._taken_apart = taken
            return self._taken_apart

    def for_schema(self, schema: Mapping[str, Any]) -> SchemaGrammar:
        """Return the state of an answer that begins; nothing that the schema refers to is fetched.

        Raises:
            ApiError: The schema is too large, not valid, or has a rule that cannot be kept to.
        """
        text = json.dumps(schema)
        _check_schema(schema, SCHEMA)
        return self._begun(lambda: LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS), SCHEMA)

    def for_calls(
        self, form: ToolForm, tools: Mapping[int, Mapping[str, Any]], is_forced: bool = True
    ) -> SchemaGrammar:
        """Return the state of an answer that begins, whose calls keep to the parameters of these tools.

        Args:
            form: Form of the calls.
            tools: Tools in OpenAI's form, by their number in the request.
            is_forced: Whether the answer is one call and nothing else.

        Raises:
            ApiError: The parameters of a tool are no schema of an object, or none that can be kept to.
        """
        schemas = []
        for number, function in ((number, tool["function"]) for number, tool in tools.items()):
            schema = {"type": "object", **(function.get("parameters") or {})}
            _check_schema(schema, f"tools.{number}.function.parameters")
            if schema["type"] != "object":
                raise _refused("it is not of the type object", f"tools.{number}.function.parameters")
            schemas.append((function["name"], {"x-guidance": _CALL_OPTIONS, **schema}))
        specials = {text: token for token, text in form.special_ids(self._tokenizer).items()}
        lark = call_grammar(form, schemas, specials, is_forced=is_forced)
        if len(lark) > LARGEST_SCHEMA:
            raise _refused(f"they have {len(lark):,} characters, expected at most {LARGEST_SCHEMA:,}", "tools")
        return self._begun(lambda: LLMatcher.grammar_from_lark(lark), "tools")

    def _begun(self, compile_: Callable[[], str], param: str) -> SchemaGrammar:
        """Return the state of an answer that begins.

        Args:
            compile_: Function that returns the grammar as llguidance reads it.
            param: Field that the grammar comes from.

        Raises:
            ApiError: It cannot be kept to.
        """
        try:
            grammar = compile_()
        except ValueError as error:
            raise _refused(str(error), param) from None
        tokenizer = self.ready()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refused(matcher.get_error(), param)
        if warnings := matcher.get_grammar_warnings():
            raise _refused(warnings[0], param)
        begun = SchemaGrammar(matcher, tokenizer, self._digits)
        if not bool(begun.allowed().any()):
            raise _refused(matcher.get_error() or "no answer is valid", param)
        return begun


class SchemaGrammar:
    """State of one answer; see :class:`lorakeet.serve.engine.requests.Grammar`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, digits: Mask) -> None:
        """Begin an answer.

        Args:
            matcher: State of the grammar.
            tokenizer: The tokenizer as llguidance reads it.
            digits: Tokens that begin with a digit, bool [vocabulary].
        """
        self._matcher, self._tokenizer, self._digits = matcher, tokenizer, digits
        self._run = _DigitRun()
        self._mask: Mask | None = None

    def copy(self) -> SchemaGrammar:
        """Return the state for another answer that begins."""
        return SchemaGrammar(self._matcher.deep_copy(), self._tokenizer, self._digits)

    def allowed(self) -> Mask:
        """Return the tokens that may come next, bool [vocabulary]; none if a limit was met."""
        if self._mask is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little").view(bool)
            self._mask = np.zeros_like(mask) if self._matcher.is_error() else self._shorter_numbers(mask)
        return self._mask

    def _shorter_numbers(self, mask: Mask) -> Mask:
        """Return the tokens that may come next, without a further digit of a long number, if it may end here."""
        if self._run.digits < LONGEST_NUMBER:
            return mask
        size = min(len(mask), len(self._digits))
        others = mask.copy()
        others[:size] &= ~self._digits[:size]
        return others if bool(others.any()) else mask

    def accept(self, token: int) -> None:
        """Take a chosen token."""
        self._mask = None
        self._run.add(self._tokenizer.decode_bytes([token]))
        self._matcher.consume_token(token)

    def is_complete(self) -> bool:
        """Whether nothing may follow, so that the answer is whole."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class _DigitRun:
    """Digits at the end of a JSON text, outside of its strings.

    Attributes:
        digits: Their number.
    """

    def __init__(self) -> None:
        self.digits = 0
        self._in_string = self._is_escaped = False

    def add(self, content: bytes) -> None:
        """Read further bytes of the text."""
        for byte in content:
            self.digits = self.digits + 1 if byte in _DIGITS and not self._in_string else 0
            if self._is_escaped:
                self._is_escaped = False
            elif byte == _QUOTE:
                self._in_string = not self._in_string
            else:
                self._is_escaped = self._in_string and byte == _ESCAPE


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Refuse a schema that is large or deep, or that leads out of itself."""
    size = len(json.dumps(schema))
    if size > LARGEST_SCHEMA:
        raise _refused(f"it has {size:,} characters, expected at most {LARGEST_SCHEMA:,}", param)
    if "x-guidance" in schema:  # options of llguidance, such as to pass over keys
        raise _refused("it has the key 'x-guidance'", param)
    level: list[Any] = [schema]
    for _ in range(DEEPEST_SCHEMA):
        for one in level:
            if isinstance(one, Mapping):
                _check_object(one, param)
        level = [inner for one in level for inner in _members(one)]
        if not level:
            return
    raise _refused(f"it has more than {DEEPEST_SCHEMA} levels", param)


def _check_object(one: Mapping[str, Any], param: str) -> None:
    reference = one.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise _refused(
            f"it refers to {cut(reference, 80)!r}, and only its own parts, such as #/$defs/name, are read", param
        )
    for key in _STEERING:
        if isinstance(one.get(key), str):
            raise _refused(f"it has the key {key!r}", param)


def _members(one: Any) -> Iterator[Any]:
    values = one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
    yield from (value for value in values if isinstance(value, Mapping | list))


def _refused(why: str, param: str) -> Exception:
    text = cut(" ".join(why.replace("<non-verbose/>", "").split()), _SHOWN)
    return bad_request(f"the schema cannot be kept to: {text}", param)
