"""Pages of the documentation and their parts: fenced blocks, links, headings, table rows."""

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
    """Return the contents of the fenced blocks in these languages."""
    return [body for language, body in _FENCE.findall(read(page)) if language in languages]


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return _FENCE.sub("", read(page))


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the commands of console blocks as words, without the prompt ``$`` and without output."""
    for block in blocks(page, "console", "bash", "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        prompted = any(line.startswith("$ ") for line in lines)
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and (line.startswith("$ ") or not prompted):
                yield words


def sentences_with_commands(page: Path) -> Iterator[list[str]]:
    """Yield the commands ``lorakeet ...`` between single backticks in the prose."""
    for code in re.findall(r"`(lorakeet [^`\n]+)`", prose(page)):
        yield shlex.split(code)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, in GitHub's form."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Return the targets of links and images inside the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def fields(page: Path, heading: str) -> set[str]:
    """Return every `name` in the first column of the tables under a heading, up to the next heading of its level."""
    depth = len(heading) - len(heading.lstrip("#"))
    after = f"\n{read(page)}".split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"^#{{1,{depth}}} ", after, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return {field for row in rows for field in re.findall(r"`([^`]+)`", row)}
