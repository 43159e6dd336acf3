"""Sandbox for chat templates of strangers: transformers' own, with bounds on steps, time and the size of every value.

Jinja's sandbox keeps a template from Python's internals. It does not keep it from endless loops, nor from texts and numbers
that fill the memory. Here each loop, call, operator and filter is counted, and its result is estimated before it is made.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _cached_compile_jinja_template, _render_with_assistant_indices

#: Characters of the longest template; the longest known has 30,000.
LONGEST_TEMPLATE = 1 << 20
#: Loops, calls, operators and filters of one conversation.
MOST_STEPS = 1_000_000
#: Seconds of the processor that one rendering may take: a conversation of a thousand turns takes a hundredth of it. Spans of
#: turns are found by several renderings. On a busy machine the clock runs faster.
MOST_SECONDS = 1.0
#: Characters and members of the largest value, and characters of a rendered conversation.
LARGEST = 1 << 24
#: Characters and members of all values that one conversation makes.
MOST_MADE = 1 << 29
#: Characters that a number, or a list beside its members, counts as.
_MEMBER = 16
#: Largest number that a filter or method may be given: a width, a count, an indentation.
LARGEST_ARGUMENT = 1_000_000
#: Bits of the largest integer.
_BITS = 4096
#: Steps after which the clock is read.
_CLOCK = 64
_WIDE_FORMAT = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*")
_NEUTRAL = (Namespace, dict)
_CONTAINERS = (list, tuple, dict, set, frozenset)


class _Budget:
    """Steps, characters and time that one rendering has left."""

    def __init__(self) -> None:
        self.steps, self.made, self.end = 0, 0, time.thread_time() + MOST_SECONDS

    def spend(self, size: int = 0) -> None:
        """Count one step, which makes a value of this size.

        Raises:
            SecurityError: There are too many, or they took too long, or the value or all of them are too large.
        """
        self.steps += 1
        self.made += size
        if size > LARGEST or self.made > MOST_MADE:
            raise SecurityError(f"a value of more than {LARGEST:,} characters, or too many values")
        if self.steps > MOST_STEPS:
            raise SecurityError(f"more than {MOST_STEPS:,} steps")
        if self.steps % _CLOCK == 0 and time.thread_time() > self.end:
            raise SecurityError(f"more than {MOST_SECONDS:g} s of the processor")


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


def render(template: str, marks: bool, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]] | None]:
    """Render a chat template.

    Args:
        template: Its source.
        marks: Whether to find the spans of its ``{% generation %}`` marks.
        variables: ``messages``, ``tools``, ``documents``, ``add_generation_prompt`` and special tokens.

    Returns:
        The text, and the spans; None without ``marks``.

    Raises:
        SecurityError: It takes too many steps, too long or too much memory, or asks for what the sandbox forbids.
        Exception: Whatever else its expressions raise.
    """
    token = _BUDGET.set(_Budget())
    try:
        compiled = _compiled(template)
        if not marks:
            return "".join(compiled.generate(**variables)), None
        text, spans = _render_with_assistant_indices(compiled, **variables)
        return text, [(start, end) for start, end in spans]
    finally:
        _BUDGET.reset(token)


class _Compiled:
    """Compiled template whose output is counted while it is made."""

    def __init__(self, template: Template) -> None:
        self._template, self.environment = template, template.environment

    def generate(self, **variables: Any) -> Iterator[str]:
        """Yield the parts of the output."""
        total = 0
        for part in self._template.generate(**variables):
            _check(total := total + len(part))
            yield part


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> _Compiled:
    if len(template) > LONGEST_TEMPLATE:
        raise SecurityError(f"it has {len(template):,} characters, expected at most {LONGEST_TEMPLATE:,}")
    environment = _cached_compile_jinja_template("").environment  # all that transformers offers to templates
    environment.__class__ = BoundedEnvironment
    environment.filters = {name: _bounded_filter(name, filter) for name, filter in environment.filters.items()}
    environment.finalize = _bounded_output
    return _Compiled(environment.from_string(template))


class _BoundedCode(CodeGenerator):
    """Code generator in which ``~`` asks the environment first."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - the name that Jinja calls
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on steps, time and sizes."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _BoundedCode

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        block: Any
        for block in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            block.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("step")).set_lineno(block.lineno))
        return super()._generate(source, *args, **options)

    @property
    def step(self) -> None:
        """Nothing: asking for it is counted."""
        _BUDGET.get().spend()

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro of a template."""
        size = 0
        if not isinstance(__function, Macro) and __function not in _NEUTRAL:
            own = getattr(__function, "__wrapped__", __function)  # the sandbox wraps the method format of texts
            receiver = getattr(own, "__self__", None)
            if getattr(own, "__name__", "") in ("format", "format_map"):
                _check_format(receiver)
            size = _work(receiver, args, kwargs)
        _BUDGET.get().spend(size)
        return super().call(__context, __function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator after its result is estimated; the name and the arguments are Jinja's.

        Args:
            context: Variables of the template.
            operator: Its sign.
            left: First operand.
            right: Second operand.
        """
        _BUDGET.get().spend(_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def join(self, parts: Iterable[Any]) -> str:
        """Join the operands of ``~``."""
        parts = list(parts)
        _BUDGET.get().spend(sum(map(_size, parts)))
        return "".join(map(str, parts))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a block or macro."""
        kept, total = [], 0
        for part in parts:
            _check(total := total + len(part))
            kept.append(part)
        _BUDGET.get().spend(total)
        return "".join(kept)


def _bounded_filter(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(filter)  # with the mark for a filter that takes the context
    def bounded(*args: Any, **kwargs: Any) -> Any:
        own = args[hasattr(filter, "jinja_pass_arg") :]
        if name == "format" and own:
            _check_format(own[0])
        size = _work(own[0] if own else None, own[1:], kwargs)
        if (budget := _BUDGET.get(None)) is not None:
            budget.spend(size)
        return filter(*args, **kwargs)

    return bounded


def _bounded_output(value: Any) -> Any:
    if not isinstance(value, str):
        _check(_size(value))
    return value


def _check(size: int) -> None:
    if size > LARGEST:
        raise SecurityError(f"a value of more than {LARGEST:,} characters")


def _work(receiver: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the product of the sizes of a method or filter's operands, the largest result that it can have.

    Raises:
        SecurityError: An argument is a huge number.
    """
    work = max(_size(receiver), 1)
    for value in (*args, *kwargs.values()):
        if isinstance(value, (int, float)) and abs(value) > LARGEST_ARGUMENT:
            raise SecurityError(f"an argument above {LARGEST_ARGUMENT:,}")
        work *= max(abs(int(value)) if isinstance(value, int) else _size(value), 1)
    return work


def _check_format(pattern: Any) -> None:
    if _WIDE_FORMAT.search(str(pattern)):
        raise SecurityError("a format wider than 99,999 characters")


def _operation(operator: str, left: Any, right: Any) -> int:
    """Return the largest size that the result of an operator can have.

    Raises:
        SecurityError: It is a huge number, or a wide format.
    """
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}.get(operator, 0)
        if bits > _BITS:
            raise SecurityError(f"an integer of more than {_BITS:,} bits")
        return 0
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    if operator != "*":
        return _size(left) + _size(right)
    count, value = (left, right) if isinstance(left, int) else (right, left)
    return abs(count) * max(_size(value), 1) if isinstance(count, int) else 0


def _size(value: Any) -> int:
    """Return the characters of a value, those of all values inside of it too; stop beyond the largest."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return _MEMBER
    total, waiting = 0, [value]
    while waiting and total <= LARGEST:
        inner = waiting.pop()
        total += len(inner) if isinstance(inner, (str, bytes)) else _MEMBER
        if isinstance(inner, _CONTAINERS):
            waiting.extend(inner)
            waiting.extend(inner.values() if isinstance(inner, dict) else ())
    return total
