"""The package's modules, rooms and imports, read from the sources, and the rules of the house that they must keep.

A *room* is a package or a single module directly below ``lorakeet``; the packages inside ``data/`` and ``kernels/`` are
rooms too. Every import counts: those inside functions and those under ``TYPE_CHECKING`` as well.
"""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lorakeet"
#: Modules that belong to no room: the lazy public names, the entry point of ``python -m`` and the version.
OUTSIDE = frozenset({"", "__main__", "_version"})
#: Rooms whose sub-packages are rooms of their own.
DIVIDED = ("data", "kernels")
#: Files. The most that one folder holds, without ``__init__.py``.
MOST_FILES = 16
#: Lines. The longest file, of Python or C.
LONGEST_FILE = 350
#: Lines. The longest function, from ``def`` to its end, without its docstring.
LONGEST_FUNCTION = 50

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Long:
    """A file or function that is longer than allowed."""

    name: str
    lines: int


def module_name(file: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name below ``package``; a package has the name of its folder."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def python_files(package: Path = PACKAGE) -> Mapping[str, Path]:
    """Map each module's name to its file."""
    return {module_name(file, package): file for file in sorted(package.rglob("*.py"))}


def parse(file: Path) -> ast.Module:
    """Parse a Python file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def _targets(node: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    for name in names:
        if name.split(".")[0] != "lorakeet":
            continue
        target = name.removeprefix("lorakeet").removeprefix(".")
        yield target if target in known else target.rpartition(".")[0]


@cache
def module_graph(package: Path = PACKAGE) -> Graph:
    """Map each module of a folder that stands for ``lorakeet`` to the modules that it imports."""
    known = python_files(package)
    return {
        name: frozenset(
            target for node in ast.walk(parse(file)) for target in _targets(node, known) if target not in OUTSIDE
        )
        - {name}
        for name, file in known.items()
        if name not in OUTSIDE
    }


def room_of(module: str) -> str:
    """Return the room that a module is in."""
    first, *rest = module.split(".")
    if first in DIVIDED and rest and (PACKAGE / first / rest[0]).is_dir():
        return f"{first}.{rest[0]}"
    return first


def room_graph(modules: Graph) -> Graph:
    """Map each room to the rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, imports in modules.items():
        found[room_of(module)] |= {room_of(other) for other in imports}
    return {room: frozenset(others - {room}) for room, others in sorted(found.items())}


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that import each other, directly or through others (Tarjan's components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return sorted(found)


def floors(graph: Graph) -> dict[str, int]:
    """Map each room to its floor: 0 imports nothing, every other one is just above the highest room it imports.

    Raises:
        ValueError: the rooms form a circle.
    """
    if loop := circles(graph):
        raise ValueError(f"no floors in a circle: {loop[0]}")
    found: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((floor(other) for other in graph[room]), default=-1)
        return found[room]

    return {room: floor(room) for room in sorted(graph)}


@cache
def layer_contracts() -> tuple[Mapping[str, int], ...]:
    """Return the layers of each import contract in ``pyproject.toml``: module to rank, 0 at the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return tuple(
        {
            name.strip().removeprefix("lorakeet."): rank
            for rank, line in enumerate(contract["layers"])
            for name in line.split("|")
        }
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )


def _layer(module: str, ranks: Mapping[str, int]) -> str | None:
    """Return the entry of a contract that a module belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in ranks), None)


def upward(modules: Graph) -> list[tuple[str, str]]:
    """Return the imports that go up, or sideways between rooms of one layer, in any contract."""
    found = set()
    for ranks in layer_contracts():
        for module, imports in modules.items():
            mine = _layer(module, ranks)
            for other in imports:
                theirs = _layer(other, ranks)
                if mine and theirs and mine != theirs and ranks[mine] >= ranks[theirs]:
                    found.add((module, other))
    return sorted(found)


def folders() -> dict[str, int]:
    """Map each folder to the number of its source files; ``__init__.py`` is not counted."""
    found: dict[str, int] = defaultdict(int)
    for file in source_files():
        if file.name != "__init__.py":
            found[file.parent.relative_to(PACKAGE.parent).as_posix()] += 1
    return dict(found)


def source_files() -> list[Path]:
    """Return the Python and C files of the package."""
    return sorted(file for ending in ("py", "c", "h") for file in PACKAGE.rglob(f"*.{ending}"))


def long_files(most: int = LONGEST_FILE) -> list[Long]:
    """Return the files of more than ``most`` lines."""
    sizes = [(file, len(file.read_text(encoding="utf-8").splitlines())) for file in source_files()]
    return [Long(file.relative_to(PACKAGE).as_posix(), lines) for file, lines in sizes if lines > most]


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function, from ``def`` to its end, without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def long_functions(most: int = LONGEST_FUNCTION) -> list[Long]:
    """Return the Python functions of more than ``most`` lines."""
    return [
        Long(f"{name}.{node.name}", function_lines(node))
        for name, file in python_files().items()
        for node in ast.walk(parse(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > most
    ]


def violations(modules: Graph) -> list[str]:
    """Return what breaks a rule of the house, one line each."""
    found = [f"circle of modules: {', '.join(group)}" for group in circles(modules)]
    found += [f"circle of rooms: {', '.join(group)}" for group in circles(room_graph(modules))]
    found += [f"import upward: {module} imports {other}" for module, other in upward(modules)]
    found += [
        f"{folder} holds {files} files, at most {MOST_FILES}"
        for folder, files in folders().items()
        if files > MOST_FILES
    ]
    found += [f"{long.name} has {long.lines} lines, at most {LONGEST_FILE}" for long in long_files()]
    found += [f"{long.name} has {long.lines} lines, at most {LONGEST_FUNCTION}" for long in long_functions()]
    return found
