"""Every error message of the package has one form; `lorakeet.errors` states it.

A message is one sentence in lower case without a period, and so is a hint. Each error says what to do: it has a hint, or its
message says what was expected.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakeet import errors

SOURCE = Path(errors.__file__).parent
ERRORS = {
    name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.LorakeetError)
}
#: Words. The longest message and hint; a placeholder counts as none.
LONGEST = 30
#: Stands for a placeholder of an f-string.
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Raised:
    """An error that is created in the source, with the literal parts of its message and hint; None: not a literal."""

    line: int
    message: str | None
    hint: str | None
    has_hint: bool


def literal(node: ast.expr | None) -> str | None:
    """Return a string literal with placeholders as holes; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal(node.left), literal(node.right)
        return None if left is None and right is None else f"{left or HOLE}{right or HOLE}"
    return None


def raised(source: str) -> Iterator[Raised]:
    """Yield every creation of one of Lorakeet's errors in a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", getattr(node.func, "attr", "")) not in ERRORS:
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        message = node.args[0] if node.args else keywords.get("message")
        hint = node.args[1] if len(node.args) > 1 else keywords.get("hint")
        given = hint is not None and not (isinstance(hint, ast.Constant) and hint.value is None)
        yield Raised(node.lineno, literal(message), literal(hint), given)


def form_offences(text: str) -> Iterator[str]:
    """Yield the offences of a message or hint against the form."""
    first = text.split()[0] if text.split() else ""
    if re.match(r"[A-Z][a-z]*$", first.rstrip(",:")) and not re.match(r"[A-Z]$", first):
        yield f"begins with a capital: {first!r}"
    if text != text.strip() or "  " in text or "\n" in text:
        yield "has stray white space"
    if text.endswith((".", "!", ":")) and not text.endswith("..."):
        yield f"ends with {text[-1]!r}"
    if re.search(r"[.!] [A-Z]", text):
        yield "is more than one sentence"
    words = [word for word in text.split() if re.search(r"[A-Za-z]", word)]
    if len(words) > LONGEST:
        yield f"has {len(words)} words, at most {LONGEST}"


def offences(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of every offence in a file."""
    for error in raised(source):
        for part, text in (("message", error.message), ("hint", error.hint)):
            if text is not None:
                yield from ((error.line, f"the {part} {offence}: {text[:90]!r}") for offence in form_offences(text))
        if error.message is not None and not error.has_hint and "expected" not in error.message:
            yield error.line, f"neither a hint nor what was expected: {error.message[:90]!r}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_messages_have_the_form(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ("DataError('The file is empty', 'give another')", "begins with a capital"),
        ("DataError('it is empty.', 'give another')", "ends with '.'"),
        ("DataError('it is empty. It has no rows', 'give another')", "more than one sentence"),
        ("errors.DataError('it is empty', 'Give another')", "the hint begins with a capital"),
        ("DataError('it is empty')", "neither a hint nor what was expected"),
        ("DataError('it is empty', None)", "neither a hint nor what was expected"),
        ("DataError(f'{path} is empty \\n', hint='give another')", "stray white space"),
        ("DataError('a' + f' {x} is empty.', 'give another')", "ends with '.'"),
        (f"ConfigError({' '.join(['word'] * 31)!r}, 'less')", "has 31 words"),
    ],
)
def test_the_check_finds_each_offence(call: str, complaint: str) -> None:
    assert any(complaint in found for _, found in offences(f"raise {call}"))


@pytest.mark.parametrize(
    "call",
    [
        "DataError('it is empty, expected rows')",
        "DataError(f'{path} is empty', hint)",
        "ConfigError('LoRA+ and FSDP exclude each other', 'use one ...')",
        "ConfigError('; '.join(problems), did_you_mean(word, known))",
        "ValueError('Not ours. Anything goes.')",
    ],
)
def test_the_check_leaves_good_messages_alone(call: str) -> None:
    assert list(offences(f"raise {call}")) == []


def test_the_check_sees_the_errors_of_the_package() -> None:
    found = [error for path in SOURCE.rglob("*.py") for error in raised(path.read_text(encoding="utf-8"))]
    assert len(found) > 150 and sum(error.message is not None for error in found) > 120


if __name__ == "__main__":
    for file in sorted(SOURCE.rglob("*.py")):
        for line, complaint in offences(file.read_text(encoding="utf-8")):
            print(f"{file.relative_to(SOURCE.parent.parent)}:{line}: {complaint}")
    sys.exit()
