"""Which column plays which part: from the names and types of the columns to one kind of rows.

Every kind has parts (roles) that a row must have and parts that it may have, each known by a few names, without regard
to case. Where the names do not tell, ``data.columns`` does: ``data.columns.text=body``. A column inside of another is
named with a dot: ``translation.en``.

Types are written as Python writes them: ``str``, ``int``, ``list[str]``, ``dict``, ``null`` (no value at all), or
several joined by `` or ``. In a CSV file, ``int`` and ``float`` are strings that all read as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lorakeet.config import DataSettings, TaskName
from lorakeet.errors import DataError, did_you_mean, nearest

Kind = Literal["text", "completion", "messages", "classes", "tags", "pairs", "translation", "question"]
Family = Literal["decoder", "encoder", "encoder-decoder"]
Names = tuple[str, ...]

#: Names by which a column of text is known; the first wins, two of the others are ambiguous.
TEXT_NAMES: Names = ("text", "quote", "quotation", "content", "sentence", "document", "body", "passage", "story")
_LABEL_NAMES: Names = ("label", "labels", "class", "category", "score", "rating")


@dataclass(frozen=True)
class Roles:
    """The parts of a row: role -> names by which its column is known, the role's own first."""

    required: Mapping[str, Names]
    optional: Mapping[str, Names] = field(default_factory=dict)

    @property
    def all(self) -> Mapping[str, Names]:
        return {**self.required, **self.optional}


_ALPACA = Roles(
    {"instruction": ("instruction",), "output": ("output", "response")},
    {"input": ("input", "context"), "system": ("system",)},
)

#: The columns that make a row of each kind; several sets of columns may make the same kind, the first that fits is taken.
KINDS: Mapping[Kind, tuple[Roles, ...]] = {
    "messages": (
        Roles({"messages": ("messages",)}, {"tools": ("tools",)}),
        Roles({"conversations": ("conversations", "conversation")}, {"tools": ("tools",), "system": ("system",)}),
        _ALPACA,
    ),
    "completion": (Roles({"prompt": ("prompt",), "completion": ("completion", "response")}, {"tools": ("tools",)}),),
    "text": (Roles({"text": TEXT_NAMES}),),
    "classes": (
        Roles(
            {"text": (*TEXT_NAMES, "text1", "sentence1", "premise"), "label": _LABEL_NAMES},
            {"text_pair": ("text_pair", "text2", "sentence2", "hypothesis")},
        ),
    ),
    "tags": (Roles({"tokens": ("tokens", "words"), "tags": ("tags", "labels", "ner_tags", "pos_tags", "upos")}),),
    "pairs": (
        Roles(
            {
                "anchor": ("anchor", "query", "sentence1", "text1", "question"),
                "positive": ("positive", "sentence2", "text2", "answer"),
            },
            {"negative": ("negative",)},
        ),
    ),
    "translation": (
        Roles({"source": ("source", "src", "prompt"), "target": ("target", "tgt", "completion")}),
        _ALPACA,
        Roles({"source": ("input",), "target": ("output",)}),
    ),
    "question": (
        Roles(
            {"question": ("question",), "context": ("context", "passage"), "answers": ("answers", "answer")},
            {"answer_start": ("answer_start",)},
        ),
    ),
}

#: The kinds of rows that a task learns from, the one it looks for first in front.
TASKS: Mapping[TaskName, tuple[Kind, ...]] = {
    "CAUSAL_LM": ("messages", "completion", "text"),
    "SEQ_CLS": ("classes",),
    "TOKEN_CLS": ("tags",),
    "SEQ_2_SEQ_LM": ("translation",),
    "QUESTION_ANS": ("question",),
    "FEATURE_EXTRACTION": ("pairs",),
    "MASKED_LM": ("text",),
}

#: What a column must hold to be taken for a role by its name alone; every other role is a string.
_HOLDS: Mapping[str, Names] = {
    "prompt": ("str", "list"),
    "completion": ("str", "list"),
    "messages": ("list", "str"),
    "conversations": ("list", "str"),
    "tools": ("list", "str", "null"),
    "label": ("str", "int", "float", "bool", "list"),
    "tokens": ("list", "str"),
    "tags": ("list", "str"),
    "answers": ("dict", "list", "str"),
    "answer_start": ("list", "int"),
}


@dataclass(frozen=True)
class Layout:
    """Rows of ``kind``; ``columns``: role -> column of the source, ``types``: role -> type of what that column holds."""

    kind: Kind
    columns: Mapping[str, str]
    types: Mapping[str, str] = field(default_factory=dict)


def find_layout(types: Mapping[str, str], settings: DataSettings, task: TaskName, source: str) -> Layout:
    """The layout of ``source``, whose columns have ``types``, for ``task`` (``auto`` counts as ``CAUSAL_LM``).

    Raises:
        DataError: ``data.columns`` names a role or a column that does not exist, or one that the task has no use for;
            no columns are recognised, or more than one may be meant.
    """
    task = "CAUSAL_LM" if task == "auto" else task
    given = settings.columns
    _check_given(types, given, task, source)
    matches = list(_matches(types, given, TASKS[task]))
    whole = next((match for match in matches if not match.missing), None)
    if whole is None:
        raise _nothing_found(types, matches, task, source)
    if whole.unclear:
        raise _ambiguous(whole, source)
    held = {role: _type_of(column, types) for role, column in whole.columns.items()}
    if "list" in held.get("prompt", "") + held.get("completion", "") and whole.kind == "completion":
        return Layout("messages", whole.columns, held)  # a prompt and a completion that are lists of messages
    if whole.kind == "classes":
        held["label"] = _label_type(held["label"], whole.columns["label"], source)
    if whole.kind == "tags" and held["tags"] == "str":  # words between blanks, as in a CSV file
        held["tags"] = "list[str]"
    return Layout(whole.kind, whole.columns, held)


def choose_task(family: Family, types: Mapping[str, str], columns: Mapping[str, str] | None = None) -> TaskName:
    """The task that a model of ``family`` learns from columns of ``types``, where ``columns`` are ``data.columns``."""
    if family == "decoder":
        return "CAUSAL_LM"
    if family == "encoder-decoder":
        return "SEQ_2_SEQ_LM"
    for task in ("QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS", "FEATURE_EXTRACTION"):
        if any(not match.missing for match in _matches(types, columns or {}, TASKS[task])):
            return task
    return "MASKED_LM"


def columns_of(types: Mapping[str, str]) -> str:
    """The columns and their types, for messages."""
    return ", ".join(f"{name!r} ({kind})" for name, kind in types.items()) or "none"


@dataclass(frozen=True)
class _Match:
    kind: Kind
    columns: Mapping[str, str]  # role -> column
    missing: Mapping[str, Names]  # role -> names that were sought
    unclear: Mapping[str, list[str]]  # role -> columns that may be meant


def _matches(types: Mapping[str, str], given: Mapping[str, str], kinds: Iterable[Kind]) -> Iterable[_Match]:
    """One match for each set of roles that has all of the ``given`` ones."""
    for kind in kinds:
        for roles in KINDS[kind]:
            if given.keys() <= roles.all.keys():
                yield _match(kind, roles, types, given)


def _match(kind: Kind, roles: Roles, types: Mapping[str, str], given: Mapping[str, str]) -> _Match:
    columns, missing, unclear = dict(given), {}, {}
    if kind == "translation" and not given and "source" in roles.required:
        columns = _hub_translation(types)
    for role, names in sorted(roles.all.items(), key=lambda item: item[0] == "text"):  # text takes what others leave
        if role in columns:
            continue
        free = [name for name in types if name not in columns.values() and _holds(role, types[name])]
        found = _named(free, names)
        if not found and role == "text":  # the only column of strings
            found = [name for name in free if not _is_inner(name, types)]
        if len(found) == 1:
            columns[role] = found[0]
        elif found:
            unclear[role] = found
        elif role in roles.required:
            missing[role] = names
    return _Match(kind, {role: columns[role] for role in roles.all if role in columns}, missing, unclear)


def _named(columns: Iterable[str], names: Names) -> list[str]:
    """The columns called by one of ``names``; if any is called by the first of them, only those."""
    known = [column for column in columns if column.lower() in names]
    return [column for column in known if column.lower() == names[0]] or known


def _holds(role: str, kind: str) -> bool:
    return any(part.partition("[")[0] in _HOLDS.get(role, ("str",)) for part in kind.split(" or "))


def _is_inner(name: str, types: Mapping[str, str]) -> bool:
    return types.get(name.rpartition(".")[0], "") == "dict"


def _hub_translation(types: Mapping[str, str]) -> dict[str, str]:
    """Source and target in a column ``translation`` of two languages: the first and the second of them."""
    inner = [name for name in types if name.startswith("translation.")]
    return dict(zip(("source", "target"), inner, strict=True)) if len(inner) == 2 else {}


def _type_of(column: str, types: Mapping[str, str]) -> str:
    return types.get(column, "null")


def _label_type(held: str, column: str, source: str) -> str:
    parts = set(held.replace("bool", "int").split(" or "))
    if parts == {"int", "float"}:
        return "float"
    if len(parts) == 1:
        return parts.pop()
    raise DataError(f"{source}, column {column!r} of labels holds {held}", "write all labels in the same way")


def _check_given(types: Mapping[str, str], given: Mapping[str, str], task: TaskName, source: str) -> None:
    users = {
        role: [
            name for name, kinds in TASKS.items() if any(role in roles.all for kind in kinds for roles in KINDS[kind])
        ]
        for role in _every_role()
    }
    complaints, hints = [], []
    for role, column in given.items():
        if role not in users:
            complaints.append(f"data.columns.{role}: no such part of a row; known are {', '.join(sorted(users))}")
            hints.append(did_you_mean(role, users))
        elif task not in users[role]:
            complaints.append(f"data.columns.{role}: {task} has no use for it")
            hints.append(f"leave it out, or learn another task: task.type={users[role][0]}")
        if not _exists(column, types):
            complaints.append(f"{source} has no column {column!r}; it has {columns_of(types)}")
            hints.append(did_you_mean(column, types))
    if not complaints and not any(True for _ in _matches(types, given, TASKS[task])):
        complaints.append(f"data.columns: no kind of rows for {task} has {' and '.join(map(repr, given))} together")
    if complaints:
        raise DataError("; ".join(complaints), next(filter(None, hints), None))


def _every_role() -> list[str]:
    return list(dict.fromkeys(role for shapes in KINDS.values() for roles in shapes for role in roles.all))


def _exists(column: str, types: Mapping[str, str]) -> bool:
    outer = column.partition(".")[0]
    return column in types or "dict" in types.get(outer, "").split(" or ")


def _nothing_found(types: Mapping[str, str], matches: Iterable[_Match], task: TaskName, source: str) -> DataError:
    matches = sorted(matches, key=lambda match: len(match.missing))
    parts = [" + ".join([*match.columns, *match.unclear, *match.missing]) for match in matches]
    sought = {role: names for match in reversed(matches) for role, names in match.missing.items()}
    hint = " or --text-column NAME" if "text" in sought else ""
    example = "text" if "text" in sought else next(iter(matches[0].missing))
    return DataError(
        f"{source} has no columns for {task}: expected {', or '.join(dict.fromkeys(parts))}; it has {columns_of(types)}",
        f"say which column is what: {_nearest_column(types, sought) or f'data.columns.{example}=NAME{hint}'}",
    )


def _nearest_column(types: Mapping[str, str], sought: Mapping[str, Names]) -> str | None:
    """The setting for a column whose name is like one of those ``sought`` and that holds what such a role holds."""
    for role, names in sought.items():
        free = [column for column, kind in types.items() if _holds(role, kind) and len(column) > 2]
        for name in names:
            for column in nearest(name, free, 1):
                return f"data.columns.{role}={column}"
    return None


def _ambiguous(match: _Match, source: str) -> DataError:
    complaints = [
        f"{source} has more than one column of {role}: {', '.join(map(repr, found))}"
        for role, found in match.unclear.items()
    ]
    choices = [f"data.columns.{role}={found[0]}" for role, found in match.unclear.items()]
    flag = f" (or --text-column {match.unclear['text'][0]})" if "text" in match.unclear else ""
    return DataError("; ".join(complaints), f"name the one to learn: {' '.join(choices)}{flag}")


def merge_layouts(layouts: Mapping[str, Layout]) -> Layout:
    """One layout for all sources, by name: the first one's, with the parts and the types of the others added.

    Raises:
        DataError: they are not of one kind, or their labels are not of one type.
    """
    kinds: dict[Kind, str] = {}
    for source, layout in layouts.items():
        kinds.setdefault(layout.kind, source)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({source})" for kind, source in kinds.items())
        raise DataError(f"the data is of more than one kind: {found}", "say with data.columns which columns to learn")
    columns: dict[str, str] = {}
    types: dict[str, str] = {}
    for source, layout in layouts.items():
        columns = {**layout.columns, **columns}
        for role, held in layout.types.items():
            types[role] = _one_type(types.get(role, held), held, role, source)
    return Layout(next(iter(kinds)), columns, types)


def _one_type(first: str, second: str, role: str, source: str) -> str:
    if first == second or role not in ("label", "tags"):
        return first
    if {first, second} == {"int", "float"}:
        return "float"
    if first.startswith(second) or second.startswith(first):  # "list", where all of a source's lists are empty
        return max(first, second, key=len)
    raise DataError(f"{source} has {role} of type {second}, others have {first}", "write all labels in the same way")


def label_columns(types: Mapping[str, str], layout: Layout | None) -> list[str]:
    """Columns of labels that ``layout`` leaves unused."""
    used = layout.columns.values() if layout is not None else ()
    return [name for name in types if name.lower() in _LABEL_NAMES and name not in used]
