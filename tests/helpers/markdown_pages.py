"""The pages of the documentation, and what is in them: fenced blocks, links, headings, table rows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of the fenced blocks in these languages."""
    return [body for language, body in _FENCE.findall(read(page)) if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def command_lines(page: Path) -> Iterator[list[str]]:
    """Each command of the console blocks as words; ``$`` before it and what it prints are left out."""
    for block in blocks(page, "console", "bash", "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        prompted = any(line.startswith("$ ") for line in lines)
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and (line.startswith("$ ") or not prompted):
                yield words


def sentences_with_commands(page: Path) -> Iterator[list[str]]:
    """``lorakeet ...`` between single backticks in the prose."""
    for code in re.findall(r"`(lorakeet [^`\n]+)`", prose(page)):
        yield shlex.split(code)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Targets of links and images that stay within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def fields(page: Path, heading: str) -> set[str]:
    """Every `name` in the first column of the tables under a heading, up to the next one of its depth or less."""
    depth = len(heading) - len(heading.lstrip("#"))
    after = f"\n{read(page)}".split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"^#{{1,{depth}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return {field for row in rows for field in re.findall(r"`([^`]+)`", row)}
