"""YAML rows: the mappings of a YAML list, each with the line it begins on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import yaml

from lorakeet.data.read.record import Fault, FaultError
from lorakeet.security.yaml_loader import BoundedLoader

#: Tags of a key that is text, and of ``<<``, which takes the members of another mapping.
_TEXT_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
#: Errors of PyYAML's constructors, e.g. IndexError for ``!!int ""`` and OverflowError for a long ``1:2:3.0``.
_VALUE_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)
#: Line breaks of YAML 1.1 that are characters of a line elsewhere -> private characters that stand for them while parsing.
_NO_BREAKS = str.maketrans({sign: chr(0xF0000 + ord(sign)) for sign in "\x85\u2028\u2029"})
_BREAKS = {ord(private): sign for sign, private in _NO_BREAKS.items()}
_AS_YAML = "write each row as a mapping: - text: …"
_QUOTE_KEY = "put the key in quotes; YAML reads a bare yes, no, on or 7 as another type"


class _Loader(BoundedLoader):
    """Safe loader in Python that refuses a key that is not text or is given twice; the one in C overflows its stack."""

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        return value.translate(_BREAKS) if isinstance(value, str) else value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag not in _TEXT_KEYS:
                name = f"key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise FaultError("broken", f"{name} is not text", _QUOTE_KEY)
            if key.value in seen:
                raise FaultError("broken", f"key {key.value!r} is given twice", "keep one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_rows(lines: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any] | Fault]]:
    """Yield line and values, or line and fault, of the rows in the ``lines`` of a YAML file.

    Raises:
        FaultError: it is not YAML, or not one list.
    """
    starts = list(accumulate(map(len, lines), initial=0))[:-1]  # index of the first character of each line
    try:
        loader = _Loader("".join(lines).translate(_NO_BREAKS))
        for node in _items(loader):
            yield bisect_right(starts, node.start_mark.index), _row(loader, node)
    except yaml.reader.ReaderError as error:
        number = bisect_right(starts, error.position)
        raise FaultError("broken", f"line {number}: not YAML: character U+{error.character:04X}") from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        number = bisect_right(starts, mark.index) if mark else len(lines)
        raise FaultError("broken", f"line {number}: not YAML: {problem}", _AS_YAML) from None
    except RecursionError:
        raise FaultError("broken", f"line {bisect_right(starts, loader.index)}: nested too deep", _AS_YAML) from None


def _items(loader: _Loader) -> Iterator[yaml.Node]:
    """Yield the nodes of the list that is the only document.

    Raises:
        FaultError: it is not a list.
        yaml.YAMLError: it is not YAML, or not the only document.
    """
    if not loader.check_node():
        return
    loader.get_event()  # the start of the document
    if not loader.check_event(yaml.SequenceStartEvent):
        found = "a mapping" if loader.check_event(yaml.MappingStartEvent) else "a single value"
        raise FaultError("broken", f"holds {found}, expected a list of mappings", _AS_YAML)
    loader.get_event()
    while not loader.check_event(yaml.SequenceEndEvent):
        yield loader.compose_node(None, None)  # type: ignore[arg-type, misc]
    loader.get_event()
    loader.get_event()  # the end of the document
    if loader.check_node():
        begin = loader.peek_event().start_mark
        raise yaml.composer.ComposerError("expected one document", None, "found a second one", begin)


def _row(loader: _Loader, node: yaml.Node) -> Mapping[str, Any] | Fault:
    """Return the values of the mapping ``node``, or its fault."""
    try:
        value = loader.construct_object(node, deep=True)
    except FaultError as error:
        return error.fault
    except _VALUE_ERRORS as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        return Fault("broken", f"not a YAML value: {problem}")
    if isinstance(value, dict):
        return value
    return Fault("broken", f"holds {type(value).__name__}, expected a mapping", _AS_YAML)
