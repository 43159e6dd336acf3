"""Column mapping: from the names and types of a source's columns to one kind of data.

Each kind has sets of roles, each role known by a few column names, without regard to case. Where names do not tell,
``data.columns`` does: ``data.columns.text=body``. A member of a dict column is named with a dot: ``translation.en``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lorakeet.config import DataSettings, TaskName
from lorakeet.data.read.column_types import EMPTY_LIST, FLOAT, INT, NULL, ColumnType, ColumnTypes, type_names
from lorakeet.data.rows.kinds import Kind, Layout, Role, Roles, all_kinds, kinds_for
from lorakeet.errors import DataError, did_you_mean, nearest

Family = Literal["decoder", "encoder", "encoder-decoder"]
Types = Mapping[str, ColumnTypes]

#: Names by which a column of labels is known.
LABEL_NAMES = ("label", "labels", "class", "category", "score", "rating")
#: Names of columns that say what to learn, or that belong to a text; where no role takes one, it is missed.
TELLING_NAMES = (
    *("weight", "train", "loss_mask", "mask", "train_on_input", "train_on_inputs"),
    *("system", "history", "tools", "documents", "chat_template_kwargs", "images", "videos", "audios"),
)


def find_layout(types: Types, settings: DataSettings, task: TaskName, source: str) -> Layout:
    """Return the layout of ``source``, whose columns have ``types``, for ``task`` (``auto`` counts as ``CAUSAL_LM``).

    Args:
        types: Column -> types of its values.
        settings: ``columns`` maps roles to columns by hand.
        task: What is trained.
        source: Name of the source, for messages.

    Raises:
        DataError: ``data.columns`` names an unknown role or column, or a role that the task does not use. Or no columns
            are recognised, or several may be meant for one role.
    """
    task = "CAUSAL_LM" if task == "auto" else task
    given = {role: name if name in types else name.strip() for role, name in settings.columns.items()}
    _check_given(types, given, task, source)
    matches = list(_matches(types, given, kinds_for(task)))
    match = next((match for match in matches if not match.missing), None)
    if match is None:
        raise _nothing_found(types, matches, task, source)
    if match.unclear:
        raise _ambiguous(match, source)
    resolved = {
        column.name: column.type(
            _types_of(match.columns[column.name], types), _named(match.columns[column.name], source)
        )
        for column in match.kind.columns
        if not isinstance(column.type, ColumnType) and column.name in match.columns
    }
    return Layout(match.kind.name, match.columns, resolved)


def question_columns(
    types: Types, given: Mapping[str, str], task: TaskName, source: str, without: Collection[str] = ()
) -> Mapping[str, str]:
    """Return role -> column of the rows of ``source`` that a model is asked about; columns of answers are not needed.

    Args:
        types: Column -> types of its values.
        given: Role -> column, of the roles that are mapped by hand.
        task: What the model was trained for.
        source: Name of the source, for messages.
        without: Optional roles that the model does not take.

    Raises:
        DataError: a role that the task needs has no column, or several may be meant for it.
    """
    kind, asked = next((kind, kind.asked) for kind in kinds_for(task) if kind.asked is not None)
    roles = Roles(asked.required, {name: role for name, role in asked.optional.items() if name not in without})
    given = {role: column for role, column in given.items() if role in roles.all}
    _check_given(types, given, task, source)
    match = _match(kind, roles, types, given)
    if match.missing:
        raise _nothing_found(types, [match], task, source)
    if match.unclear:
        raise _ambiguous(match, source)
    return match.columns


def label_type(types: ColumnTypes, column: str) -> ColumnType:
    """Return the one type of a ``column`` of labels: whole numbers and fractions together are fractions.

    Raises:
        DataError: its labels are of several types.
    """
    found = {ColumnType("int", one.is_list) if one.base == "bool" else one for one in types}
    if found == {INT, FLOAT}:
        return FLOAT
    if len(found) > 1:
        raise DataError(f"{column} of labels holds {type_names(types)}", "write all labels in the same way")
    return next(iter(found), NULL)


def tag_type(types: ColumnTypes, column: str) -> ColumnType:
    """Return the type of a ``column`` of tags: lists of whole numbers, or else of strings."""
    if types == {EMPTY_LIST}:
        return EMPTY_LIST
    return ColumnType("int" if types == {ColumnType("int", is_list=True)} else "str", is_list=True)


def choose_task(family: Family, types: Types, columns: Mapping[str, str] | None = None) -> TaskName:
    """Return the task that a model of ``family`` is trained on with columns of ``types``.

    Args:
        family: Architecture of the base. Only for an encoder do the columns decide.
        types: Column -> types of its values.
        columns: ``data.columns``.
    """
    if family == "decoder":
        return "CAUSAL_LM"
    if family == "encoder-decoder":
        return "SEQ_2_SEQ_LM"
    tasks: tuple[TaskName, ...] = ("QUESTION_ANS", "TOKEN_CLS", "SEQ_CLS", "FEATURE_EXTRACTION")
    for task in tasks:
        if any(not match.missing for match in _matches(types, columns or {}, kinds_for(task))):
            return task
    return "MASKED_LM"


def columns_of(types: Types) -> str:
    """Return the columns and their types, for messages."""
    return ", ".join(f"{name!r} ({type_names(found)})" for name, found in types.items()) or "none"


def known_names() -> set[str]:
    """Return every name by which a column of any role of any kind is known."""
    return {name for role in _all_roles() for name in role.names}


@dataclass(frozen=True)
class _Match:
    kind: Kind
    columns: Mapping[str, str]  # role -> column
    missing: Mapping[str, Role]
    unclear: Mapping[str, list[str]]  # role -> columns that may be meant


def _matches(types: Types, given: Mapping[str, str], kinds: Iterable[Kind]) -> Iterable[_Match]:
    """Yield one match for each set of roles that has all of the ``given`` ones."""
    for kind in kinds:
        for roles in kind.roles:
            if given.keys() <= roles.all.keys():
                match = _match(kind, roles, types, given)
                if match.missing or roles.fits({role: _types_of(name, types) for role, name in match.columns.items()}):
                    yield match


def _match(kind: Kind, roles: Roles, types: Types, given: Mapping[str, str]) -> _Match:
    columns, missing, unclear = dict(given), {}, {}
    if roles.members_of and not given:
        columns = _members(roles, types)
    for name, role in sorted(roles.all.items(), key=lambda item: item[1].takes_rest):
        if name in columns:
            continue
        free = [column for column in types if column not in columns.values() and role.accepts(types[column])]
        found = _called(free, role)
        if not found and role.takes_rest:
            found = [column for column in free if not _is_member(column, types)]
        if len(found) == 1:
            columns[name] = found[0]
        elif found:
            unclear[name] = found
        elif name in roles.required:
            missing[name] = role
    return _Match(kind, {name: columns[name] for name in roles.all if name in columns}, missing, unclear)


def _called(columns: Iterable[str], role: Role) -> list[str]:
    """Return the columns called by one of the role's names; if any has the first of them, only those."""
    known = [column for column in columns if column.lower() in role.names]
    return [column for column in known if column.lower() == role.names[0]] or known


def _members(roles: Roles, types: Types) -> dict[str, str]:
    """Return the members of ``roles.members_of`` by role, if they are as many as the required roles."""
    members = [name for name in types if name.startswith(f"{roles.members_of}.")]
    return dict(zip(roles.required, members, strict=True)) if len(members) == len(roles.required) else {}


def _types_of(column: str, types: Types) -> ColumnTypes:
    return types.get(column, frozenset())


def _named(column: str, source: str) -> str:
    return f"{source}, column {column!r}"


def _is_member(name: str, types: Types) -> bool:
    return _types_of(name.rpartition(".")[0], types) == {ColumnType("dict")}


def _check_given(types: Types, given: Mapping[str, str], task: TaskName, source: str) -> None:
    users = _users()
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
    if not complaints and not any(True for _ in _matches(types, given, kinds_for(task))):
        complaints.append(f"data.columns: no kind of rows for {task} has {' and '.join(map(repr, given))} together")
    if complaints:
        raise DataError("; ".join(complaints), next(filter(None, hints), None))


def _users() -> dict[str, list[TaskName]]:
    """Return the tasks that use each role."""
    users: dict[str, list[TaskName]] = {}
    for kind in all_kinds():
        for roles in kind.roles:
            for role in roles.all:
                known = users.setdefault(role, [])
                known += [task for task in kind.encoders if task not in known]
    return users


def _all_roles() -> Iterable[Role]:
    return (role for kind in all_kinds() for roles in kind.roles for role in roles.all.values())


def _exists(column: str, types: Types) -> bool:
    return column in types or ColumnType("dict") in _types_of(column.partition(".")[0], types)


def _nothing_found(types: Types, matches: Iterable[_Match], task: TaskName, source: str) -> DataError:
    matches = sorted(matches, key=lambda match: len(match.missing))
    parts = [" + ".join([*match.columns, *match.unclear, *match.missing]) for match in matches]
    sought = {name: role for match in reversed(matches) for name, role in match.missing.items()}
    hint = " or --text-column NAME" if "text" in sought else ""
    example = "text" if "text" in sought else next(iter(matches[0].missing))
    return DataError(
        f"{source} has no columns for {task}: expected {', or '.join(dict.fromkeys(parts))}; it has {columns_of(types)}",
        f"say which column is what: {_nearest_column(types, sought) or f'data.columns.{example}=NAME{hint}'}",
    )


def _nearest_column(types: Types, sought: Mapping[str, Role]) -> str | None:
    """Return the setting for a column of a fitting type whose name is like one of those ``sought``."""
    for name, role in sought.items():
        free = [column for column, found in types.items() if role.accepts(found) and len(column) > 2]
        for known in role.names:
            for column in nearest(known, free, 1):
                return f"data.columns.{name}={column}"
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
    """Merge the layouts of all sources, by name: the first one's, with the roles and the types of the others added.

    Raises:
        DataError: they are not of one kind, or their labels are not of one type.
    """
    kinds: dict[str, str] = {}
    for source, layout in layouts.items():
        kinds.setdefault(layout.kind, source)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({source})" for kind, source in kinds.items())
        raise DataError(f"the data is of more than one kind: {found}", "say with data.columns which columns to learn")
    columns: dict[str, str] = {}
    types: dict[str, ColumnType] = {}
    for source, layout in layouts.items():
        columns = {**layout.columns, **columns}
        for name, type in layout.types.items():
            types[name] = _one_type(types.get(name, type), type, name, source)
    return Layout(next(iter(kinds)), columns, types)


def with_columns_of(merged: Layout, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Return ``layouts`` with the optional columns of all of them; a source without one has no value in it."""
    names = set(merged.column_names)
    return {source: replace(one, absent=frozenset(names - set(one.column_names))) for source, one in layouts.items()}


def _one_type(first: ColumnType, second: ColumnType, name: str, source: str) -> ColumnType:
    if first == second:
        return first
    if {first, second} == {INT, FLOAT}:
        return FLOAT
    if first.is_list and second.is_list and not (first.base and second.base):  # all lists of one source are empty
        return first if first.base else second
    raise DataError(f"{source} has {name} of type {second}, others have {first}", "write all labels in the same way")


def unused_columns(types: Types, layout: Layout | None, names: Collection[str]) -> list[str]:
    """Return the columns called by one of ``names`` that hold something and that ``layout`` leaves unused."""
    used = layout.columns.values() if layout is not None else ()
    return [name for name, found in types.items() if found and name.lower() in names and name not in used]
