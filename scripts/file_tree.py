"""Write the tree of the package's files into ``docs/architecture.md``, one line a file: ``make docs``."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from import_graph import OUTSIDE, PACKAGE, module_name, parse, source_files

PAGE = PACKAGE.parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: written by make docs -->", "<!-- end of the tree -->"
#: Columns. Where the descriptions start.
INDENT = 32


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring or comment on one line, without marks of reST and the last stop."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s", paragraph, maxsplit=1)[0]
    plain = re.sub(r":\w+:`~?([^`]+)`", r"\1", sentence).replace("``", "")
    return plain.rstrip(".:")


def description(file: Path) -> str:
    """Return what a file says of itself: a module's docstring, or the first comment of a C file."""
    if file.suffix == ".py":
        return first_sentence(ast.get_docstring(parse(file)) or "")
    source = file.read_text(encoding="utf-8")
    found = re.search(r"/\*(.*?)\*/|((?:^//[^\n]*\n)+)", source, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^[ \t]*(//|\*)[ \t]?", "", found.group(1) or found.group(2), flags=re.MULTILINE) if found else ""
    return first_sentence(text)


def tree() -> str:
    """Return the tree: a folder's line is its package's docstring, files follow by name."""
    lines = ["src/lorakeet/"]
    done: set[Path] = {PACKAGE}
    for file in sorted(source_files(), key=_order):
        if file.name == "__init__.py" or module_name(file) in OUTSIDE:
            continue
        for folder in [parent for parent in reversed(file.parents) if PACKAGE in parent.parents and parent not in done]:
            done.add(folder)
            package = folder / "__init__.py"
            lines.append(_line(folder, f"{folder.name}/", description(package) if package.exists() else ""))
        lines.append(_line(file, file.name, description(file)))
    return "\n".join(lines)


def _order(file: Path) -> tuple[tuple[bool, str], ...]:
    """Return a key that puts the files of a folder before its sub-folders."""
    parts = file.relative_to(PACKAGE).parts
    return tuple((place < len(parts) - 1, part) for place, part in enumerate(parts))


def _line(path: Path, name: str, text: str) -> str:
    depth = len(path.relative_to(PACKAGE).parts)
    return f"{'  ' * depth + name:<{INDENT}} {text}".rstrip()


def with_tree(page: str) -> str:
    """Return the page with the tree of now between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n```text\n{tree()}\n```\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the page, or the one named on the command line."""
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(with_tree(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
